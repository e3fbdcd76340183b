"""Choose the number of outliers of each matrix: by trying temperatures, or greedily by quantization errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import ops
from ..methods import Statistics, quantize_matrix
from ..models import LinearWeight
from ..models.folding import narrowest
from ..packed import QuantizedMatrix
from ..plan import PlanEntry
from .exact import ExactWeights
from .journal import Found, Journal
from .matrices import Matrices
from .outliers import SHARES, greedy_split, split
from .record import Trial


@dataclass(frozen=True)
class Quantizer:
    """Quantizes matrices, and keeps the weights of largest magnitude as outliers, which do not affect the scales.

    Attributes:
        linears: the matrices.
        homes: matrix name to the device on which it is quantized (:func:`quantrature.analysis.path.homes_of`).
        entries: matrix name to plan entry.
        statistics: matrix name to calibration statistics, for methods that need them.
    """

    linears: Sequence[LinearWeight]
    homes: Mapping[str, torch.device]
    entries: Mapping[str, PlanEntry]
    statistics: Mapping[str, Statistics]

    def original(self, linear: LinearWeight) -> torch.Tensor:
        """Return the original weights of a matrix on its device, contiguous, in the narrowest exact dtype."""
        return narrowest(linear.weight.to(self.homes[linear.name]).contiguous())

    def matrix(self, linear: LinearWeight, count: int) -> QuantizedMatrix:
        """Quantize one matrix with ``count`` outliers."""
        weight = self.original(linear)
        places = ops.topk(weight.view(-1), count)[1] if count else None
        statistics = self.statistics.get(linear.name)
        return quantize_matrix(linear.name, weight, self.entries[linear.name], places, statistics)

    def all(self, counts: Sequence[int]) -> dict[str, QuantizedMatrix]:
        """Quantize all matrices with these numbers of outliers; return the quantized matrices by name."""
        return {linear.name: self.matrix(linear, count) for linear, count in zip(self.linears, counts, strict=True)}


@dataclass(frozen=True)
class Selected:
    """The outliers of each matrix.

    Attributes:
        counts: number of outliers of each matrix, in the order of the matrices.
        temperature: the temperature with the lowest loss; ``None`` if none was tried.
        trials: loss changes of all temperatures that were tried.
    """

    counts: Sequence[int]
    temperature: float | None = None
    trials: tuple[Trial, ...] = ()


def select(
    matrices: Matrices, journal: Journal, quantizer: Quantizer, mean_pqi: Mapping[str, float], exact: ExactWeights
) -> Selected:
    """Choose the number of outliers of each matrix, and quantize all matrices again with these outliers.

    The quantized matrices are in ``matrices.stored`` afterwards.

    Args:
        matrices: the matrices; they measure the loss change of each trial.
        journal: records the trials.
        quantizer: quantizes the matrices.
        mean_pqi: matrix name to mean PQI without outliers.
        exact: number of outliers, and how to choose them.
    """
    budget, _ = exact.counts(matrices.linears)
    if exact.selection == "greedy":
        counts = greedy_counts(quantizer, mean_pqi, budget, exact.max_outlier_fraction)
        matrices.stored = quantizer.all(counts)
        return Selected(counts)
    sizes = [linear.numel for linear in matrices.linears]
    of_matrices = [mean_pqi[linear.name] for linear in matrices.linears]
    best: tuple[Sequence[int], Trial] | None = None
    stored: dict[str, QuantizedMatrix] = {}
    trials = []
    for temperature in exact.temperatures:
        counts = split(budget, sizes, of_matrices, temperature, exact.max_outlier_fraction)

        def attempt(counts: Sequence[int] = counts) -> Found:
            matrices.stored = quantizer.all(counts)
            return matrices.measure(), {}

        known = (step := f"temperature {temperature}") in journal
        trials.append(Trial(temperature, journal.of(step, attempt)[0]))
        if best is None or trials[-1].measured_loss_change < best[1].measured_loss_change:
            best, stored = (counts, trials[-1]), {} if known else matrices.stored
    assert best is not None
    matrices.stored = stored or quantizer.all(best[0])
    return Selected(best[0], best[1].temperature, tuple(trials))


def greedy_counts(quantizer: Quantizer, mean_pqi: Mapping[str, float], budget: int, largest_share: float) -> list[int]:
    """Return counts by :func:`greedy_split`, from the errors of each matrix at the outlier fractions ``SHARES``."""
    errors = []
    for linear in quantizer.linears:
        exact = linear.weight.to(quantizer.homes[linear.name]).float()
        by_count = {}
        for share in SHARES:
            count = math.floor(min(share, largest_share) * linear.numel)
            if count not in by_count:
                image = quantizer.matrix(linear, count).dequantize("float32")
                by_count[count] = float((image - exact).abs().sum(dtype=torch.float64))
        errors.append(by_count)
    sizes = [linear.numel for linear in quantizer.linears]
    gains = [mean_pqi[linear.name] * linear.numel for linear in quantizer.linears]
    return greedy_split(budget, sizes, gains, errors, largest_share)
