"""An integral together with its proof: the loss change that it must add up to, measured on the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.gradients import Share
from .integral import Integral, integrate
from .objective import Objective, at_start, mean_over
from .path import WeightPath
from .quadrature import quadrature
from .sensitivity import Proof
from .snapshot import Snapshot


class Effort(NamedTuple):
    """How an integral is taken; see :func:`quantrature.analyze`."""

    rule: str
    nodes: int
    tol: float | None = None
    max_nodes: int = 32
    abs_mode: str = "after_mean"
    map_folder: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"rule": self.rule, "nodes": self.nodes, "tol": self.tol, "abs_mode": self.abs_mode}


class Prover:
    """Integrates along paths that all start at the same weights, whose loss is measured once.

    Args:
        model: that the paths are of.
        windows: of the calibration text, (windows, tokens).
        batch_size: windows of one forward pass.
        objective: name out of ``OBJECTIVES``.
    """

    def __init__(self, model: torch.nn.Module, windows: torch.Tensor, batch_size: int, objective: str = "nll") -> None:
        self.model, self.windows, self.batch_size = model, windows, batch_size
        self._name = objective
        self._start: tuple[Objective, float] | None = None

    def _at_start(self, path: WeightPath) -> tuple[Objective, float]:
        """The objective, and F at the original weights; the model is moved there if this is not known yet."""
        if self._start is None:
            path.move_to(0)
            self._start = at_start(self._name, self.model, self.windows, self.batch_size)
        return self._start

    @property
    def share(self) -> torch.Tensor:
        """The windows that this process takes."""
        return Share(self.windows).windows

    def measure(self, path: WeightPath) -> float:
        """F(w~) - F(w), nats per token; leaves the model at w."""
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
        effort: Effort,
        advance: Callable[[int], Any],
        snapshot: Callable[[int], Snapshot | None] = lambda nodes: None,
    ) -> tuple[Integral, Proof]:
        """The integral, with nodes added until the tolerance holds, and its comparison with the measured change."""
        measured = self.measure(path)
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
            del integral  # the next has accumulators of its own
            nodes = min(2 * nodes, effort.max_nodes)
