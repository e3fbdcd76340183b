"""The matrices of a model during ReQuant: their quantized forms, their original weights, and the integrals between."""

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
from ..analysis.proving import Prover
from ..models import LinearWeight
from ..packed import QuantizedMatrix
from .journal import Found, Journal
from .record import KeptWeights, Requantization, Stage

QUANTIZED = "quantized"
"""Name of the first stage: matrices as their method quantizes them, before any weight is restored."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The significant weights of each matrix.

    Attributes:
        counts: matrix name to number of weights.
        predicted_loss_change: matrix name to the loss change, in nats per token, that the last integral predicts;
            ``None`` without that integral.
    """

    counts: Mapping[str, int]
    predicted_loss_change: Mapping[str, float] | None = None


class Matrices:
    """Holds the quantized matrices, which change from step to step, and records the stages that they reach.

    Between calls, and at the end of the ``with`` block, the model has its original weights.

    Args:
        prover: computes integrals and measures loss changes on the calibration text. Its model is dense and has the
            original weights.
        homes: matrix name to the device on which its original weights and its quantized form are kept
            (:func:`quantrature.analysis.path.homes_of`).
        linears: the matrices.
        stored: matrix name to quantized matrix.
        original: function that returns the original weights of a matrix, (out_features, in_features), contiguous, on
            the device that ``homes`` names, in the dtype in which unquantized weights are stored.
        journal: records the results of the integrals.
        advance: function that is called with a number of windows whose gradients were computed, for progress.
    """

    def __init__(
        self,
        prover: Prover,
        homes: Mapping[str, torch.device],
        linears: Sequence[LinearWeight],
        stored: Mapping[str, QuantizedMatrix],
        original: Callable[[LinearWeight], torch.Tensor],
        journal: Journal,
        advance: Callable[[int], Any],
    ) -> None:
        self.linears = list(linears)
        self.homes = homes
        self.stored = {name: matrix.to(homes[name]) for name, matrix in stored.items()}
        self.original = original
        self.stages: list[Stage] = []
        self._prover = prover
        self._journal, self._advance = journal, advance
        moved = [
            Moved(linear, functools.partial(self._image, linear.name), homes[linear.name]) for linear in self.linears
        ]
        self._path = WeightPath(prover.model, moved, prover.effort.map_folder)
        self._mean_pqi: dict[str, float] = {}

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
    def kept(self) -> int:
        """Number of unquantized weights in all matrices."""
        return sum(m.outliers.nnz for m in self.stored.values() if m.outliers is not None)

    def measure(self) -> float:
        """Measure the loss change of the quantized matrices on the calibration text, in nats per token."""
        return self._prover.measure(self._path)

    def reached(self, stage: str) -> None:
        """Measure the loss change, and record that the matrices have reached a stage."""
        self.stages.append(Stage(stage, self.kept, self.measure()))

    def integrate(self, stage: str, use: Callable[[Integral], Found]) -> Found:
        """Compute PQI from the original to the current weights, and record the stage that the matrices have reached.

        The stage gets the predicted and the measured loss change. If the journal has the result of this stage, nothing
        is computed.

        Args:
            stage: name of the stage. At most one integral is computed for each stage.
            use: function that computes the result from the integral. It may overwrite the maps of the integral.

        Returns:
            The value and the tensors that ``use`` returned.
        """

        def make() -> Found:
            integral, proof = self._prover.prove(
                self._path,
                stage,
                "",
                self._advance,
                functools.partial(self._journal.snapshot, stage),
            )
            reached = Stage(
                stage,
                self.kept,
                proof.measured_loss_change,
                proof.predicted_loss_change,
                proof.gradient_evaluations,
            )
            value, tensors = use(integral)
            return [dataclasses.asdict(reached), value], tensors

        if stage in self._journal:
            self._advance(self._prover.effort.nodes * len(self._prover.share))
        (reached, value), tensors = self._journal.of(stage, make)
        self.stages.append(Stage(**reached))
        return value, tensors

    def mean_pqi(self, stage: str) -> dict[str, float]:
        """Compute PQI from the original to the current weights, and return the mean of each matrix by name."""

        def means(integral: Integral) -> Found:
            return {name: float(values.double().mean()) for name, values in integral.maps.items()}, {}

        self._mean_pqi = self.integrate(stage, means)[0]
        return self._mean_pqi

    def restore(self, linear: LinearWeight, places: torch.Tensor) -> None:
        """Restore the original values of some weights of a matrix; its codes, scales and zero points are not changed.

        Args:
            linear: the matrix.
            places: int64 indices into the flattened matrix, of quantized weights.
        """
        if not len(places):
            return
        matrix = self.stored[linear.name]
        places = places.to(self.homes[linear.name])
        if matrix.outliers is not None:
            places = torch.cat([matrix.outliers.positions(), places])
        _, sparse = ops.extract_outliers(self.original(linear), indices=places.sort().values)
        self.stored[linear.name] = dataclasses.replace(matrix, outliers=sparse)

    def largest(self, maps: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Return the indices of the quantized weights with the largest values, ranked over all matrices together.

        Args:
            maps: matrix name to a value for each weight, at least 0; overwritten. If all maps are on one device, the
                weights are ranked there, else on the CPU.
            count: number of weights, of all matrices together.

        Returns:
            Matrix name to indices into the flattened matrix, int64, on the CPU.
        """
        devices = {maps[linear.name].device for linear in self.linears}
        together = devices.pop() if len(devices) == 1 else torch.device("cpu")
        values = []
        for linear in self.linears:
            of_matrix = maps[linear.name].contiguous()
            sparse = self.stored[linear.name].outliers
            if sparse is not None:
                of_matrix.view(-1)[sparse.positions().to(of_matrix.device)] = -1.0  # below all others
            values.append(of_matrix.to(together))
        chosen = ops.topk(values, count, key="value")
        return {linear.name: places.cpu() for linear, (_, places) in zip(self.linears, chosen, strict=True)}

    def detach_stepwise(self, state: str, count: int, steps: int, *, prove: bool) -> Restored:
        """Restore the weights with the largest PQI in several steps (arXiv 2503.01901, Algorithm 2).

        Each step computes PQI again, from the original to the current weights.

        Args:
            state: name of the current stage.
            count: number of weights to restore, all steps together.
            steps: number of steps; each restores an equal share, up to rounding.
            prove: whether to compute an integral at the end, too, to predict the loss change of the result.

        Returns:
            The number of restored weights of each matrix; with ``prove``, also the predicted loss changes.
        """

        def ranked(helping: int, integral: Integral) -> Found:
            return None, self.largest(integral.maps, helping)

        restored = {linear.name: 0 for linear in self.linears}
        for step in range(1, steps + 1) if count else ():
            helping = count * step // steps - count * (step - 1) // steps
            _, places = self.integrate(state, functools.partial(ranked, helping))
            for linear in self.linears:
                self.restore(linear, places[linear.name])
                restored[linear.name] += len(places[linear.name])
            state = f"detach {step}"
        if prove:
            return Restored(restored, self.integrate(state, lambda integral: (dict(integral.signed), {}))[0])
        self.reached(state)
        return Restored(restored)

    def record(
        self, outliers: Sequence[int], restored: Restored, settings: Mapping[str, Any], prints: tuple[str, str]
    ) -> Requantization:
        """Return the record of the steps so far, without trials of temperatures.

        Args:
            outliers: number of outliers of each matrix, in the order of the matrices.
            restored: the significant weights.
            settings: arguments to store in the record.
            prints: fingerprints of the model and of the calibration text.
        """
        predicted = restored.predicted_loss_change or {}
        kept = tuple(
            KeptWeights(
                linear.name,
                linear.numel,
                count,
                restored.counts[linear.name],
                self._mean_pqi.get(linear.name),
                predicted.get(linear.name),
            )
            for linear, count in zip(self.linears, outliers, strict=True)
        )
        nbytes = sum(matrix.nbytes for matrix in self.stored.values())
        grid_nbytes = sum(matrix.dense.nbytes for matrix in self.stored.values())
        return Requantization(kept, tuple(self.stages), (), None, nbytes, grid_nbytes, settings, *prints)
