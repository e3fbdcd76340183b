"""The matrices of a model while ReQuant works on them: stored forms beside the originals, and the way between."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import ops
from ..analysis.integral import Integral
from ..analysis.path import Moved, WeightPath
from ..analysis.proving import Effort, Prover
from ..models import LinearWeight
from ..storage import QuantizedMatrix
from .record import Stage


def narrowest(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers in the 16-bit dtype that holds all of them, where there is one: kept weights cost less so."""
    if weight.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if torch.equal(narrow.float(), weight):
                return narrow
    return weight


class Matrices:
    """Stored forms that change from step to step, and what is known of each.

    The model itself stays at its original weights between the calls, and is there again when the ``with`` block ends.

    Args:
        model: dense, with the original weights.
        linears: the matrices.
        stored: their quantized forms by name.
        original: makes the weight that is kept, (out_features, in_features), contiguous and on the CPU.
        windows, batch_size, effort: of the integrals.
        advance: called with the number of windows whose gradient was taken.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        linears: Sequence[LinearWeight],
        stored: Mapping[str, QuantizedMatrix],
        original: Callable[[LinearWeight], torch.Tensor],
        windows: torch.Tensor,
        batch_size: int,
        effort: Effort,
        advance: Callable[[int], Any],
    ) -> None:
        self.linears = list(linears)
        self.stored = dict(stored)
        self.original = original
        self.stages: list[Stage] = []
        self._prover = Prover(model, windows, batch_size)
        self._effort, self._advance = effort, advance
        moved = [Moved(linear, functools.partial(self._image, linear.name)) for linear in self.linears]
        self._path = WeightPath(model, moved)

    def __enter__(self) -> Matrices:
        self._path.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._path.__exit__(kind, error, trace)

    def _image(self, name: str) -> torch.Tensor:
        return self.stored[name].dequantize("float32")

    @property
    def weights(self) -> int:
        """How many there are in all matrices."""
        return sum(linear.numel for linear in self.linears)

    @property
    def kept(self) -> int:
        """How many of them are kept exactly."""
        return sum(m.outliers.nnz for m in self.stored.values() if m.outliers is not None)

    def measure(self) -> float:
        """The loss change of the stored forms on the calibration text, nats per token."""
        return self._prover.measure(self._path)

    def reached(self, stage: str) -> None:
        """Note a stage and its measured loss change."""
        self.stages.append(Stage(stage, self.kept, self.measure()))

    def integrate(self, stage: str) -> Integral:
        """PQI of the way from the originals to the stored forms; note the stage with prediction and measurement."""
        integral, proof = self._prover.prove(self._path, stage, "", self._effort, self._advance)
        self.stages.append(
            Stage(
                stage,
                self.kept,
                proof.measured_loss_change,
                proof.predicted_loss_change,
                proof.gradient_evaluations,
            )
        )
        return integral

    def restore(self, linear: LinearWeight, places: torch.Tensor) -> None:
        """Keep some more weights of a matrix exactly; the grid stays as it is.

        Args:
            linear: the matrix.
            places: int64 in the flattened matrix, none of them kept already.
        """
        if not len(places):
            return
        matrix = self.stored[linear.name]
        if matrix.outliers is not None:
            places = torch.cat([matrix.outliers.positions(), places])
        _, sparse = ops.extract_outliers(self.original(linear), indices=places.sort().values)
        self.stored[linear.name] = dataclasses.replace(matrix, outliers=sparse)

    def detach(self, maps: Mapping[str, torch.Tensor], count: int) -> dict[str, int]:
        """Restore the weights with the largest values of the maps, ranked over all matrices together.

        Args:
            maps: matrix name to a value for each weight, not negative; overwritten.
            count: how many; those kept already are not taken again.

        Returns:
            Matrix name to how many of it were restored.
        """
        values = []
        for linear in self.linears:
            of_matrix = maps[linear.name].contiguous()
            sparse = self.stored[linear.name].outliers
            if sparse is not None:
                of_matrix.view(-1)[sparse.positions()] = -1.0  # below all others
            values.append(of_matrix)
        chosen = ops.topk(values, count, key="value")
        for linear, (_, places) in zip(self.linears, chosen, strict=True):
            self.restore(linear, places)
        return {linear.name: len(places) for linear, (_, places) in zip(self.linears, chosen, strict=True)}

    def detach_stepwise(
        self, state: str, count: int, steps: int, *, prove: bool
    ) -> tuple[dict[str, int], Integral | None]:
        """Restore the most significant weights in steps, each ranked by an integral of its own (Algorithm 2).

        Args:
            state: name of the stage that the stored forms are at.
            count: weights to restore in all.
            steps: over which they are spread evenly.
            prove: integrate at the end, too, for a prediction of the result.

        Returns:
            Matrix name to how many were restored, and the integral at the end.
        """
        restored = dict.fromkeys(self.stored, 0)
        for step in range(1, steps + 1) if count else ():
            maps = self.integrate(state).maps
            taken = self.detach(maps, count * step // steps - count * (step - 1) // steps)
            restored = {name: n + taken[name] for name, n in restored.items()}
            state = f"detach {step}"
        if prove:
            return restored, self.integrate(state)
        self.reached(state)
        return restored, None
