"""SensiBoost and KurtBoost (arXiv 2503.06518): more bits for layers whose scores are outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import ops
from .._C import InvalidArgumentError
from ..plan.option import Option
from .budget import Budget
from .choice import Choice
from .facts import Facts
from .sources import Grid
from .table import Configuration, Floats

TRIM = 0.05
THRESHOLD = 3.0


@dataclass(frozen=True)
class Rule:
    """Parameters of a boost.

    Attributes:
        strategy: ``sensiboost``, which compares layers by ratio, or ``kurtboost``, by difference.
        stops: by how many steps the setting of a boosted layer is larger, at least 0; limited by the largest setting.
        top_m: largest number of layers to boost for each role (such as ``self_attn.q_proj``); 0 for all that stand out.
        caller: public function that error messages begin with.
    """

    strategy: str
    stops: int
    top_m: int
    caller: str

    def __post_init__(self) -> None:
        """Check that the numbers are at least 0."""
        if self.stops < 0 or self.top_m < 0:
            raise InvalidArgumentError(
                f"[{self.caller}] stops and top_m must be at least 0: got stops={self.stops}, top_m={self.top_m}"
            )

    def steps(self, labels: Sequence[float], bits: float) -> tuple[int, int]:
        """Return the indices of the base setting and of the boosted setting, among ascending labels.

        Raises:
            InvalidArgumentError: if the budget is below the smallest label; the message names that.
        """
        within = [k for k, label in enumerate(labels) if label <= bits + 1e-9]
        if not within:
            raise InvalidArgumentError(
                f"[{self.caller}] {self.strategy} needs a budget of at least {labels[0]:.2f} bits per weight: "
                f"got {bits:.4f}"
            )
        return within[-1], min(within[-1] + self.stops, len(labels) - 1)

    def flagged(self, scores: Sequence[float]) -> list[int]:
        """Return the positions to boost among the scores of consecutive layers, strongest first."""
        found = conspicuous(np.array(scores), ratio=self.strategy == "sensiboost")
        return found[: self.top_m or None]


def conspicuous(scores: Floats, ratio: bool) -> list[int]:
    """Return the positions whose score differs unusually from the layer before, strongest first.

    Let d_i be the ratio or the difference of neighbouring scores. A layer stands out if abs(d - mu) / sigma > 3, where
    mu and sigma are the mean and the standard deviation (ddof 1) without the int(0.05 n) smallest and largest d. The
    first layer never does. The formulas are those of the authors' code, which produced their results; the paper's
    equation 15 has the square root elsewhere.
    """
    if len(scores) < 4:  # three differences at least, or there is no spread to speak of
        return []
    with np.errstate(all="ignore"):
        d = scores[1:] / scores[:-1] if ratio else scores[1:] - scores[:-1]
        cut = int(TRIM * len(d))
        kept = np.sort(d)[cut : len(d) - cut]
        z = np.abs(d - kept.mean()) / kept.std(ddof=1)
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    return [i + 1 for i in order if z[i] > THRESHOLD]


def boost_matrices(
    options: Sequence[Option], facts: Facts, budget: Budget, rule: Rule, sensitivity: Mapping[str, float] | None
) -> Choice:
    """Choose the largest setting whose label is within the budget, and a larger one for layers that stand out."""
    matrices, grid = facts.matrices, facts.grid
    scores = _scores(facts, rule.strategy, sensitivity)
    ladder = sorted(options, key=lambda o: (nominal(o, grid).nominal_bits, o))
    base, boosted = (ladder[k] for k in rule.steps([nominal(o, grid).label for o in ladder], budget.bits))
    chosen, reasons = [base] * len(matrices), [f"{rule.strategy}: base"] * len(matrices)
    flagged: dict[str, list[int]] = {}
    roles: dict[str, list[int]] = {}
    for i, matrix in enumerate(matrices):
        roles.setdefault(matrix.role, []).append(i)
    for role, members in roles.items():
        members.sort(key=lambda i: matrices[i].block)
        for place, position in enumerate(rule.flagged([scores[i] for i in members])):
            i = members[position]
            chosen[i] = boosted
            reasons[i] = f"{rule.strategy}: its score stands out, rank {place + 1} among {role}"
            flagged.setdefault(role, []).append(matrices[i].block)
    return Choice(chosen, reasons, {"setting": base.key, "boosted": boosted.key, "flagged": flagged})


def nominal(option: Option, grid: Grid) -> Configuration:
    """Return the published configuration of an option; float16 scales and zero points count as 16 bits."""
    return Configuration(option.bits, option.group_size, grid.meta_bits or 16, 128 if grid.meta_bits else 0)


def _scores(facts: Facts, strategy: str, sensitivity: Mapping[str, float] | None) -> list[float]:
    """Return the score of each matrix: its sensitivity or its kurtosis."""
    matrices, origin = facts.matrices, facts.origin
    if strategy == "sensiboost":
        for m in matrices:
            if sensitivity is None or m.name not in sensitivity:
                raise InvalidArgumentError(
                    f"[allocate] sensiboost needs the activation sensitivity of every matrix: got none for {m.name}"
                )
            if not sensitivity[m.name] > 0:
                raise InvalidArgumentError(
                    "[allocate] every sensitivity must be above 0, because ratios are computed: got "
                    f"{sensitivity[m.name]} for {m.name}"
                )
        assert sensitivity is not None
        return [sensitivity[m.name] for m in matrices]
    if all(m.kurtosis is not None for m in matrices):
        return [float(m.kurtosis or 0) for m in matrices]
    if origin.weight is None:
        raise InvalidArgumentError("[allocate] kurtboost needs the weights, or an analysis with the metric kurtosis")
    return [float(ops.kurtosis(origin.weight(m.name), fisher=False)) for m in matrices]
