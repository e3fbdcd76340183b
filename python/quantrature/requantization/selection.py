"""How many outliers each matrix gets, found by trying: at some temperatures, or greedily by the errors."""

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
    """Quantizes matrices in their homes, with their largest weights left out of the fit and kept exactly.

    Attributes:
        linears: the matrices.
        homes: by name, the device on which each is quantized (:func:`quantrature.analysis.path.homes_of`).
        entries: by name, how.
        statistics: by name, for methods that need them.
    """

    linears: Sequence[LinearWeight]
    homes: Mapping[str, torch.device]
    entries: Mapping[str, PlanEntry]
    statistics: Mapping[str, Statistics]

    def original(self, linear: LinearWeight) -> torch.Tensor:
        """The weight of a matrix in its home, contiguous, in the narrowest dtype that holds it."""
        return narrowest(linear.weight.to(self.homes[linear.name]).contiguous())

    def matrix(self, linear: LinearWeight, count: int) -> QuantizedMatrix:
        """One matrix with so many outliers."""
        weight = self.original(linear)
        places = ops.topk(weight.view(-1), count)[1] if count else None
        statistics = self.statistics.get(linear.name)
        return quantize_matrix(linear.name, weight, self.entries[linear.name], places, statistics)

    def all(self, counts: Sequence[int]) -> dict[str, QuantizedMatrix]:
        """All of them, by name."""
        return {linear.name: self.matrix(linear, count) for linear, count in zip(self.linears, counts, strict=True)}


@dataclass(frozen=True)
class Selected:
    """The outliers of each matrix.

    Attributes:
        counts: in the order of the matrices.
        temperature: that gave them; ``None`` where none was sought.
        trials: of temperatures.
    """

    counts: Sequence[int]
    temperature: float | None = None
    trials: tuple[Trial, ...] = ()


def select(
    matrices: Matrices, journal: Journal, quantizer: Quantizer, mean_pqi: Mapping[str, float], exact: ExactWeights
) -> Selected:
    """Give each matrix its outliers; the stored forms with them are then in place."""
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
    """Counts by :func:`greedy_split`, from the error of each matrix at a few shares of outliers."""
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
