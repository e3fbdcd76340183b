"""What a matrix is expected to cost in loss when it is stored in some way, from its signed PQI at a few settings.

PQI gives the loss change of each matrix at reference settings, for example 2, 3 and 4 bits in groups of 64. Between
them the loss change follows the energy of the quantization error, E = sum (w~ - w)^2: log loss is interpolated
linearly in log E between the two references whose energies enclose that of the setting, and is proportional to E
beyond the first and the last reference.

A signed PQI may be negative or next to nothing, by chance of the calibration text, and no allocation should trade on
that. A loss change therefore counts as at least FLOOR times what its error energy costs on average over all matrices
at the same reference: FLOOR * E_i * sum_j loss_j / sum_j E_j.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .._C import InvalidArgumentError
from .options import Option

FLOOR = 0.1
"""Share of the average cost of its error energy that a matrix costs at least."""


@dataclass(frozen=True)
class Reference:
    """A setting at which the loss change of a matrix is known."""

    error: float
    loss_change: float


def analytic_error(option: Option, columns: int) -> float:
    """Error energy per weight of a min-max grid on normal weights, in units that are the same for all settings.

    The square of the step: the expected range of a group, in standard deviations, over the number of steps. At equal
    group sizes and many bits this is the 4^-bits of the textbook. What outliers change is left out.
    """
    group = columns if option.group_size == -1 else min(option.group_size, columns)
    # Expected largest of n normal numbers, by Blom's approximation.
    largest = NormalDist().inv_cdf((group - 0.375) / (group + 0.25)) if group > 1 else 0.1
    step: float = 2 * largest / (2**option.bits - 1)
    return step * step


class LossModel:
    """Predicts the loss change of each matrix of a model, nats per token, for any setting.

    Error energies are those that were measured. Where one is missing, that of the setting most like it is scaled by
    the ratio of their analytic energies; when a reference's is missing for any matrix, all are analytic.

    Args:
        names, columns, numels: name, in_features and number of weights of each matrix.
        loss_changes: for each matrix, setting to loss change at the references.
        errors: for each matrix, setting to error energy, where measured, in the analysis.
        candidates: the same for the grids to predict, where they are of another kind.

    Attributes:
        floored: reference to how many matrices counted as more than their own PQI says there.
        measured: whether the energies of the references were measured.

    Raises:
        InvalidArgumentError: for a matrix without references, and for numbers that are not finite.
    """

    def __init__(
        self,
        names: Sequence[str],
        columns: Sequence[int],
        numels: Sequence[int],
        loss_changes: Sequence[Mapping[str, float]],
        errors: Sequence[Mapping[str, float]],
        candidates: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        settings = list(loss_changes[0]) if loss_changes else []
        for name, changes, error in zip(names, loss_changes, errors, strict=True):
            if not changes or set(changes) != set(settings):
                raise InvalidArgumentError(
                    f"[allocate] method pqi needs the loss change of every matrix at the same settings: got "
                    f"{', '.join(changes) or 'none'} for {name}; analyze with the metric pqi"
                )
            for what, values in (("loss change", changes), ("error energy", error)):
                for key, value in values.items():
                    if not math.isfinite(value) or (what == "error energy" and value < 0):
                        raise InvalidArgumentError(
                            f"[allocate] every {what} must be a number{' of 0 or more' * (values is error)}: "
                            f"got {value} for {name} at {key}"
                        )
        self.measured = all(key in error for error in errors for key in settings)
        self._columns, self._numels = list(columns), list(numels)
        self._errors = [
            {Option.parse(key): value for key, value in error.items()} if self.measured else {} for error in errors
        ]
        self._references: list[list[Reference]] = [[] for _ in names]
        self.floored: dict[str, int] = {}
        for key in settings:
            option = Option.parse(key)
            energies = [self.error(i, option) or 0.0 for i in range(len(names))]
            losses = [changes[key] for changes in loss_changes]
            # A reference that as a whole harms nothing has no average to speak of; the sizes of its changes have.
            of_all = sum(losses) if sum(losses) > 0 else sum(map(abs, losses))
            rate = of_all / sum(energies) if sum(energies) > 0 else 0.0
            least = [FLOOR * rate * energy for energy in energies]
            self.floored[key] = sum(loss < low for loss, low in zip(losses, least, strict=True))
            for references, energy, loss, low in zip(self._references, energies, losses, least, strict=True):
                references.append(Reference(energy, max(loss, low)))
        for references in self._references:
            references.sort(key=lambda reference: reference.error)
        if candidates is not None and self.measured:
            self._errors = [{Option.parse(key): value for key, value in error.items()} for error in candidates]

    def error(self, i: int, option: Option) -> float | None:
        """Error energy of matrix i at a setting; ``None`` for outliers that were not measured."""
        measured = self._errors[i]
        if option in measured:
            return measured[option]
        if option.outliers:
            return None
        analytic = analytic_error(option, self._columns[i])
        plain = [known for known in measured if not known.outliers]
        if not plain:
            return analytic * self._numels[i]
        ratios = [(analytic / analytic_error(known, self._columns[i]), known) for known in plain]
        ratio, known = min(ratios, key=lambda pair: abs(math.log(pair[0])))
        return measured[known] * ratio

    def predict(self, i: int, option: Option) -> float | None:
        """Loss change of matrix i, nats per token; ``None`` when its error energy is not known."""
        energy = self.error(i, option)
        if energy is None:
            return None
        known = [r for r in self._references[i] if r.error > 0 and r.loss_change > 0]
        if not known or energy <= 0:
            return 0.0
        first, last = known[0], known[-1]
        if energy <= first.error:
            return first.loss_change * energy / first.error
        if energy >= last.error:
            return last.loss_change * energy / last.error
        at = np.interp(math.log(energy), [math.log(r.error) for r in known], [math.log(r.loss_change) for r in known])
        return math.exp(float(at))
