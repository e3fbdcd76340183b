"""Predict the loss change of any plan from the signed PQI of each matrix at a few settings.

PQI gives the loss change due to each matrix at reference settings, for example 2, 3 and 4 bits with group size 64, if
all other matrices have the same setting. Matrices interact: their joint loss change grows faster than their error
energies E = sum (w~ - w)^2. A matrix costs less if the other matrices cost little. Therefore

    loss change of a plan = (sum_i c_i) ** p,

where c_i is the cost of matrix i: S_i / L ** (1 - 1/p) at a reference where its PQI is S_i and the sum over all
matrices is L. A plan that was integrated (:func:`quantrature.analysis.integrate_plan`) is a further reference, at which
each matrix has its own setting. The power p >= 1 is chosen so that costs grow like energies from one reference to the
next. With the energies at reference b relative to those at a, weighted by the PQI at a, it is p = log(L_b / L_a) /
log(sum_i S_ia E_ib / E_ia / L_a). If there is one reference, or the loss grows slower than the
energies, p is 1: signed PQIs then just add up. The power is monotone, so the plan with the smallest cost has the
smallest loss change.

Between references, log c_i is interpolated linearly in log E; beyond the first and the last, c_i is proportional to E.
This predicts best for the calibration text.

A plan should be good for any text, but a choice among many costs prefers those that are low by chance. The random part
of a cost is the first-order part of PQI, gradient times error. Its variance grows like E, as does the cost itself. The
minimum-variance estimate of a matrix's cost per unit of energy is then the sum of its costs at all references divided
by the sum of their energies. Plans are chosen by this estimate.

By chance of the calibration text, a signed PQI can be negative or almost zero; the allocation must not exploit this.
Therefore a loss change counts as at least FLOOR times the average cost of its error energy over all matrices at the
same reference: FLOOR * E_i * sum_j loss_j / sum_j E_j. The added amount is subtracted from all matrices, because their
sum is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .._C import InvalidArgumentError
from ..plan.option import Option

FLOOR = 0.1
"""Smallest cost of a matrix, as a fraction of the average cost of its error energy."""


@dataclass(frozen=True)
class Reference:
    """A setting at which the cost of a matrix is known."""

    error: float
    cost: float


def analytic_error(option: Option, columns: int) -> float:
    """Estimate the squared error per weight of rtn on normally distributed weights, in arbitrary units.

    It is the square of the step size: the expected range of a group, in standard deviations, divided by the number of
    steps. For equal group sizes and many bits this is proportional to 4^-bits. Outliers are not considered.
    """
    group = columns if option.group_size == -1 else min(option.group_size, columns)
    # Expected largest of n normal numbers, by Blom's approximation.
    largest = NormalDist().inv_cdf((group - 0.375) / (group + 0.25)) if group > 1 else 0.1
    step: float = 2 * largest / (2**option.bits - 1)
    return step * step


class LossModel:
    """Predicts the loss change of plans from the cost of each matrix at each setting.

    Measured error energies are used. If one is missing, the energy of the most similar setting is scaled by the ratio
    of their analytic energies. If the energy of a reference is missing for any matrix, all energies are analytic.

    Args:
        names, columns, numels: name, in_features and number of weights of each matrix.
        loss_changes: for each matrix, reference setting to loss change, in nats per token.
        errors: for each matrix, setting to error energy, as far as the analysis measured it.
        plans: for each plan that was integrated, the setting of each matrix (``None`` if it is not quantized), and its
            loss change.
        candidates: the same for the settings to predict, if they use another method or kind of grid.

    Attributes:
        power: p, the power of the sum of costs.
        floored: reference to the number of matrices whose cost was raised to the floor.
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
        plans: Sequence[tuple[Sequence[Option | None], Sequence[float]]] = (),
    ) -> None:
        settings = list(loss_changes[0]) if loss_changes else []
        for name, changes, error in zip(names, loss_changes, errors, strict=True):
            if not changes or set(changes) != set(settings):
                raise InvalidArgumentError(
                    f"[allocate] strategy pqi needs the loss change of every matrix at the same settings: got "
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
        chosen: dict[str, Sequence[Option | None]] = {key: [Option.parse(key)] * len(names) for key in settings}
        losses_at: dict[str, Sequence[float]] = {
            key: [of_matrix[key] for of_matrix in loss_changes] for key in settings
        }
        for number, (options, losses) in enumerate(plans, 1):
            chosen[f"plan {number}"], losses_at[f"plan {number}"] = options, losses
        energies = {
            key: [0.0 if option is None else self.error(i, option) or 0.0 for i, option in enumerate(options)]
            for key, options in chosen.items()
        }
        self.power = _power([(energies[key], losses_at[key]) for key in chosen])
        self.floored: dict[str, int] = {}
        self._references: list[list[Reference]] = [[] for _ in names]
        for key, losses in losses_at.items():
            # A reference that as a whole harms nothing has no average to speak of; the sizes of its changes have.
            of_all = sum(losses) if sum(losses) > 0 else sum(map(abs, losses))
            rate = of_all / sum(energies[key]) if sum(energies[key]) > 0 else 0.0
            least = [FLOOR * rate * energy for energy in energies[key]]
            self.floored[key] = sum(loss < low for loss, low in zip(losses, least, strict=True))
            raised = [max(loss, low) for loss, low in zip(losses, least, strict=True)]
            # Together the matrices cost what was measured, whatever the floor has added.
            whole = sum(losses) if sum(losses) > 0 else sum(raised)
            unit = sum(raised) / whole ** (1 / self.power) if whole > 0 else 1.0
            for references, energy, loss in zip(self._references, energies[key], raised, strict=True):
                if energy > 0 or key in settings:  # not of a matrix that a plan leaves unquantized
                    references.append(Reference(energy, loss / unit))
        for references in self._references:
            references.sort(key=lambda reference: reference.error)
        if candidates is not None and self.measured:
            self._errors = [{Option.parse(key): value for key, value in error.items()} for error in candidates]

    def error(self, i: int, option: Option) -> float | None:
        """Return the squared error of matrix i at a setting; ``None`` for outliers that were not measured."""
        measured = self._errors[i]
        if option in measured:
            return measured[option]
        if option.outlier_fraction:
            return None
        analytic = analytic_error(option, self._columns[i])
        plain = [known for known in measured if not known.outlier_fraction]
        if not plain:
            return analytic * self._numels[i]
        ratios = [(analytic / analytic_error(known, self._columns[i]), known) for known in plain]
        ratio, known = min(ratios, key=lambda pair: abs(math.log(pair[0])))
        return measured[known] * ratio

    def expected_cost(self, i: int, option: Option) -> float | None:
        """Return the expected cost of matrix i on any text, in the unit of :meth:`cost`. Plans are chosen by it."""
        energy = self.error(i, option)
        if energy is None:
            return None
        energies = sum(reference.error for reference in self._references[i])
        return sum(reference.cost for reference in self._references[i]) / energies * energy if energies > 0 else 0.0

    def cost(self, i: int, option: Option) -> float | None:
        """Return the cost of matrix i on the calibration text, in nats^(1/p); ``None`` without its error energy."""
        energy = self.error(i, option)
        if energy is None:
            return None
        known = [r for r in self._references[i] if r.error > 0 and r.cost > 0]
        if not known or energy <= 0:
            return 0.0
        first, last = known[0], known[-1]
        if energy <= first.error:
            return first.cost * energy / first.error
        if energy >= last.error:
            return last.cost * energy / last.error
        at = np.interp(math.log(energy), [math.log(r.error) for r in known], [math.log(r.cost) for r in known])
        return math.exp(float(at))

    def loss_changes(self, costs: Sequence[float]) -> list[float]:
        """Return each matrix's part of a plan's loss change, in nats per token, from the costs of all matrices."""
        rate = math.fsum(costs) ** (self.power - 1)
        return [cost * rate for cost in costs]


def _power(references: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the power with which loss changes grow with error energies: the median over neighbouring references."""
    growing = sorted(references, key=lambda reference: sum(reference[0]))
    powers = []
    for (small, less), (large, more) in itertools.pairwise(growing):
        known = [k for k in range(len(small)) if small[k] > 0]
        if sum(less[k] for k in known) <= 0 or sum(more) <= 0:
            continue
        growth = sum(less[k] * large[k] / small[k] for k in known) / sum(less[k] for k in known)
        if growth > 1:
            powers.append(math.log(sum(more) / sum(less)) / math.log(growth))
    return max(1.0, float(np.median(powers))) if powers else 1.0
