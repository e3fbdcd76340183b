"""Compute a PQI together with its proof: the loss change that it predicts, and the one measured on the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._C import InvalidArgumentError
from ..models.gradients import Share
from .integral import Integral, integrate
from .objective import Objective, at_start, check_objective, mean_over
from .path import WeightPath
from .quadrature import quadrature
from .sensitivity import Proof
from .snapshot import Snapshot


class Effort(NamedTuple):
    """Settings of an integral; see :func:`quantrature.analyze`."""

    rule: str = "gauss"
    nodes: int = 4
    tol: float | None = None
    max_nodes: int = 32
    abs_mode: str = "after_mean"
    map_folder: Path | None = None
    objective: str = "nll"

    @property
    def settings(self) -> dict[str, Any]:
        """Objective, rule, nodes, tolerance and ``abs_mode`` as a dictionary, for records."""
        return {
            "objective": self.objective,
            "rule": self.rule,
            "nodes": self.nodes,
            "tol": self.tol,
            "abs_mode": self.abs_mode,
        }

    def check(self, caller: str) -> None:
        """Raise an InvalidArgumentError for an invalid objective, rule, number of nodes or tolerance.

        Args:
            caller: name of the public function, for the message.
        """
        check_objective(self.objective, caller)
        quadrature(self.rule, self.nodes, caller)
        if self.tol is not None and self.tol <= 0:
            raise InvalidArgumentError(f"[{caller}] tol must be above 0: got {self.tol}")


class Prover:
    """Integrates along paths that start at the same original weights; their loss is measured only once.

    Args:
        model: the model of the paths.
        windows: token ids of the calibration text, (samples, seqlen).
        batch_size: windows per forward pass.
        effort: settings of the integrals.
    """

    def __init__(
        self, model: torch.nn.Module, windows: torch.Tensor, batch_size: int, effort: Effort | None = None
    ) -> None:
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self.effort = effort or Effort()
        self._start: tuple[Objective, float] | None = None

    def _at_start(self, path: WeightPath) -> tuple[Objective, float]:
        """Return the objective and F at the original weights; the first call moves the model there to measure F."""
        if self._start is None:
            path.move_to(0)
            self._start = at_start(self.effort.objective, self.model, self.windows, self.batch_size)
        return self._start

    @property
    def share(self) -> torch.Tensor:
        """The windows of this process, under ``torch.distributed``."""
        return Share(self.windows).windows

    def measure(self, path: WeightPath) -> float:
        """Return F(w~) - F(w), in nats per token; afterwards, the model has its original weights."""
        objective, before = self._at_start(path)
        path.move_to(1)
        change = mean_over(objective, self.model, self.windows, self.batch_size, 1.0) - before
        path.move_to(0)
        return change

    def prove(
        self,
        path: WeightPath,
        setting: str,
        method: str,
        advance: Callable[[int], Any],
        snapshot: Callable[[int], Snapshot | None] = lambda nodes: None,
    ) -> tuple[Integral, Proof]:
        """Integrate, and compare the predicted with the measured loss change.

        If the difference is larger than ``tol`` times the measured change, the integral is computed again with twice as
        many nodes, up to ``max_nodes``.

        Args:
            path: path from the original to the quantized weights, inside its ``with`` block.
            setting: bits and group size, such as ``b3g64``, for the proof.
            method: quantization method, for the proof.
            advance: function that is called with a number of finished windows, for progress.
            snapshot: function from a number of nodes to the file that the integral is saved to and resumed from.
        """
        effort, measured = self.effort, self.measure(path)
        nodes, evaluations = effort.nodes, 0
        while True:
            integral = integrate(
                path,
                self.windows,
                quadrature(effort.rule, nodes),
                objective=self._at_start(path)[0],
                batch_size=self.batch_size,
                abs_mode=effort.abs_mode,
                map_folder=effort.map_folder,
                snapshot=snapshot(nodes),
                advance=advance,
            )
            path.move_to(0)
            evaluations += integral.gradient_evaluations
            predicted = sum(integral.signed.values())
            within = None if effort.tol is None else abs(predicted - measured) <= effort.tol * abs(measured)
            if within is not False or nodes >= effort.max_nodes:
                return integral, Proof(setting, method, effort.rule, nodes, predicted, measured, evaluations, within)
            del integral  # frees the accumulators before the next integral allocates its own
            nodes = min(2 * nodes, effort.max_nodes)
