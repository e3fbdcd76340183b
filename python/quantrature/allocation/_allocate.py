"""A setting for every matrix, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import ops
from .._C import InvalidArgumentError
from ..methods import solver_of
from ..plan import KEEP_BITS, Plan, PlanEntry
from ..plan.fusion import fusion_groups
from ..plan.option import Option
from .constraints import Constraints
from .loss import LossModel
from .published import conspicuous
from .sources import Grid, Matrix, Source, size_of
from .table import Configuration

if TYPE_CHECKING:
    import os

    import numpy as np
    import torch

    from ..analysis.sensitivity import Sensitivity

STRATEGIES = {
    "uniform": "the same setting for every matrix, the largest that fits",
    "mxq": "the least sum of the Frobenius norms of the errors; needs the weights",
    "sensiboost": "more for layers whose outputs are conspicuously sensitive; needs the model and calibration text",
    "kurtboost": "more for layers whose weights are conspicuously heavy-tailed; needs the weights",
    "pqi": "the least predicted loss change, from the signed PQI of each matrix; needs an analysis",
}
"""Names that ``strategy`` takes, and a line about each."""

NEARLY = 1.02
"""How much less than its shape tells a matrix may take as stored."""

PAPERS = ("mxq", "sensiboost", "kurtboost")


@dataclass(frozen=True)
class Choice:
    """What a strategy chose for each matrix, why, and what is to be said of the whole."""

    options: list[Option]
    reasons: list[str]
    about: dict[str, Any]


def allocate(
    source: Sensitivity | torch.nn.Module | Source | str | os.PathLike[str],
    *,
    strategy: str = "pqi",
    avg_bits: float | None = None,
    target_bytes: int | None = None,
    bits: Iterable[int] | None = None,
    group_sizes: Iterable[int] | None = None,
    outlier_fractions: Iterable[float] = (0.0,),
    method: str | None = None,
    sym: bool | None = None,
    meta_bits: int | str | None = "default",
    groups: str | None = None,
    pin: Mapping[str, int | str] | None = None,
    minimum: Mapping[str, int] | None = None,
    maximum: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
    stops: int = 2,
    top_m: int = 0,
    weights: torch.nn.Module | str | os.PathLike[str] | None = None,
    sensitivity: Mapping[str, float] | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> Plan:
    """Choose how each matrix of a model is stored, within a budget.

    Sizes are counted as stored: codes, scales, zeros and outliers with their positions. ``plan.allocation`` says how
    much of the budget is left, and what loss change is predicted.

    - ``uniform``: the largest setting that fits, for all matrices.
    - ``pqi``: the least loss change to be expected from what :class:`LossModel` says each matrix costs, by an integer
      program; ``plan.allocation["gap"]`` says how far from the least it can be.
    - ``mxq`` (Zhang et al., ICAART 2025): the least sum of the Frobenius norms of w~ - w, by the same program.
    - ``sensiboost``, ``kurtboost`` (arXiv 2503.06518): the largest published setting whose label is within avg_bits,
      and one some stops larger for conspicuous layers; see :func:`boost`. What is boosted comes on top of the budget,
      as published; every other strategy never exceeds it.

    Args:
        source: the result of :func:`quantrature.analyze`, a model, or the folder of either. Of a model's folder the
            weights are read one matrix at a time. For several plans, a :class:`Source` of these remembers what it
            measured.
        strategy: name out of ``STRATEGIES``.
        avg_bits: bits of storage for each weight, everything included, on average over the matrices of the plan.
        target_bytes: the same budget in bytes, of all matrices of the plan together; give one of the two.
        bits, group_sizes, outlier_fractions: what may be chosen. Unless given, for the published strategies their
            twelve settings; else 2 to 8 bits and groups of 32, 64, 128 and what was analyzed. Outliers need the
            weights.
        method: how codes are found, as in :func:`quantrature.quantize`. Unless given, the method of the analysis;
            without an analysis ``hqq`` for the published strategies and ``rtn`` for ``uniform``.
        sym: grids symmetric around zero; as analyzed unless given.
        meta_bits: of quantized scales and zeros, as in :class:`quantrature.plan.PlanEntry`; unless given, 8 for the
            published methods and ``None`` otherwise.
        groups: ``fused`` stores alike what serving engines fuse (q, k and v; gate and up), ``none`` does not; the
            former for ``pqi`` unless given. Boosts know no groups.
        pin, minimum, maximum, skip: see :class:`Constraints`; not for boosts, but for skip.
        stops, top_m: of a boost, as in :func:`boost`.
        weights: the model that was analyzed, or its folder, to measure what the analysis did not.
        sensitivity: for ``sensiboost``, matrix name to the score of :func:`activation_sensitivity`.
        trust_remote_code: run code that comes with a model's folder.
        progress: show a bar; ``None`` for when stderr is a terminal.

    Raises:
        InvalidArgumentError: naming the argument, the constraint or the matrix; for a budget below the smallest
            possible plan, naming the least value that would do.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"[allocate] strategy must be one of {', '.join(STRATEGIES)}: got {strategy!r}")
    if method in STRATEGIES:
        raise InvalidArgumentError(
            f"[allocate] method says how codes are found; {method!r} is a strategy: give it as strategy"
        )
    if groups not in (None, "fused", "none"):
        raise InvalidArgumentError(f"[allocate] groups must be fused or none: got {groups!r}")
    origin = Source.of(source, weights, trust_remote_code)
    constraints = Constraints(pin or {}, minimum or {}, maximum or {}, skip)
    everything = [m.name for m in origin.matrices]
    skipped = constraints.skipped(everything)
    matrices = [m for m in origin.matrices if m.name not in skipped]
    if not matrices:
        raise InvalidArgumentError("[allocate] a plan needs a matrix that is not skipped: got none")
    budget = Budget.of(matrices, avg_bits, target_bytes)
    quantizer, grid = grid_of(origin, strategy, method, sym, meta_bits)
    options = options_of(origin, strategy, bits, group_sizes, outlier_fractions, grid)

    if strategy in ("sensiboost", "kurtboost"):
        if pin or minimum or maximum or groups == "fused":
            raise InvalidArgumentError(f"[allocate] {strategy} takes no constraints but skip, and no groups: got some")
        scores = _boost_scores(origin, matrices, strategy, sensitivity)
        facts = Facts.of(origin, matrices, [], grid, progress)
        choice = _boost(matrices, options, grid, budget, strategy, scores, stops, top_m)
        facts.weigh(choice.options)
    else:
        allowed = constraints.allowed([m.name for m in matrices], options)
        measured = [] if strategy == "uniform" else sorted({o for found in allowed.values() for o in found})
        facts = Facts.of(origin, matrices, measured, grid, progress)
        together = [[i] for i in range(len(matrices))]
        if groups == "fused" or (groups is None and strategy == "pqi"):
            together = fusion_groups([m.name for m in matrices])
        if strategy == "uniform":
            choice = _uniform(matrices, options, allowed, facts, budget)
        elif strategy == "mxq":
            choice = _least(matrices, together, allowed, facts, budget, facts.norm, lambda total: 1.0, "norm")
        else:
            facts.demand_predictions()
            choice = _least(matrices, together, allowed, facts, budget, facts.expected_cost, facts.nats, "nats")

    entries = {name: PlanEntry(KEEP_BITS, reason="skipped as asked", predicted_loss_change=0.0) for name in skipped}
    losses: Sequence[float | None] = [None] * len(matrices)
    if facts.model is not None:
        losses = facts.model.loss_changes([facts.cost(i, option) for i, option in enumerate(choice.options)])
    for matrix, option, reason, predicted in zip(matrices, choice.options, choice.reasons, losses, strict=True):
        entries[matrix.name] = replace(grid.entry(option), reason=reason, predicted_loss_change=predicted)
    plan = Plan({name: entries[name] for name in everything})
    about = {
        "strategy": strategy,
        "method": quantizer,
        **budget.report(sum(facts.size(i, option) for i, option in enumerate(choice.options))),
        **choice.about,
        **origin.about,
    }
    if strategy in PAPERS:
        nominal = sum(m.numel * _nominal(o, grid).nominal_bits for m, o in zip(matrices, choice.options, strict=True))
        about["nominal_bits_per_weight"] = nominal / budget.weights
    if facts.model is not None:
        about["predicted_loss_change"] = plan.predicted_loss_change
        about["error_energies"] = "measured" if facts.model.measured else "analytic"
        about["power"] = facts.model.power
        about["floored"] = dict(facts.model.floored)
    return replace(plan, allocation=about)


@dataclass(frozen=True)
class Budget:
    """How much may be stored.

    Attributes:
        limit: bytes.
        weights: of all matrices that count.
        asked: the argument and its value, for messages.
    """

    limit: int
    weights: int
    asked: tuple[str, float]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], avg_bits: float | None, target_bytes: int | None) -> Budget:
        """The budget that was asked for in one of two ways."""
        weights = sum(matrix.numel for matrix in matrices)
        if (avg_bits is None) == (target_bytes is None):
            both = f"got avg_bits={avg_bits}, target_bytes={target_bytes}"
            raise InvalidArgumentError(f"[allocate] a budget is given as either avg_bits or target_bytes: {both}")
        name, value = ("avg_bits", avg_bits) if avg_bits is not None else ("target_bytes", target_bytes)
        assert value is not None
        if not math.isfinite(value) or value <= 0:
            raise InvalidArgumentError(f"[allocate] {name} must be above 0: got {name}={value}")
        limit = value * weights / 8 if name == "avg_bits" else value
        return cls(math.floor(limit + 1e-6), weights, (name, value))

    @property
    def bits(self) -> float:
        """For each weight."""
        return self.asked[1] if self.asked[0] == "avg_bits" else 8 * self.limit / self.weights

    def demand(self, least: int) -> None:
        """Refuse when even the smallest plan is larger.

        Raises:
            InvalidArgumentError: naming the smallest value that would do.
        """
        if least > self.limit:
            name, value = self.asked
            enough = f"{math.ceil(8e4 * least / self.weights) / 1e4:.4f}" if name == "avg_bits" else str(least)
            raise InvalidArgumentError(
                f"[allocate] {name} must be at least {enough} for these matrices and settings: got {name}={value}"
            )

    def report(self, used: int) -> dict[str, Any]:
        """What plan.json says of it."""
        return {
            "budget": {self.asked[0]: self.asked[1]},
            "budget_bytes": self.limit,
            "bytes": used,
            "slack_bytes": self.limit - used,
            "weights": self.weights,
            "bits_per_weight": 8 * used / self.weights,
        }


@dataclass(frozen=True)
class Facts:
    """What is known of each matrix (by its index) in each setting.

    Attributes:
        matrices: that the plan is about.
        grid: of the plan.
        errors, sizes: for each matrix, setting to error energy and to bytes, as far as they were seen.
        model: predicts loss changes; ``None`` without references.
        origin: has the weights, perhaps.
    """

    matrices: Sequence[Matrix]
    grid: Grid
    errors: Sequence[Mapping[str, float]]
    sizes: Sequence[dict[str, int]]
    model: LossModel | None
    origin: Source

    @classmethod
    def of(
        cls, origin: Source, matrices: Sequence[Matrix], options: Sequence[Option], grid: Grid, progress: bool | None
    ) -> Facts:
        """From the analysis; what it does not have of the options is measured where there are weights."""
        same = grid == origin.grid
        errors = [dict(m.error) for m in matrices] if same else [{} for _ in matrices]
        sizes = [dict(m.nbytes) for m in matrices] if same else [{} for _ in matrices]
        missing = [o for o in options if any(o.key not in known for known in errors)]
        outcomes = origin.outcomes(matrices, missing, grid, progress) if missing else None
        for i, found in enumerate(outcomes or []):
            errors[i] |= {key: outcome.error for key, outcome in found.items()}
            sizes[i] |= {key: outcome.nbytes for key, outcome in found.items()}
        model = None
        if all(m.loss_change for m in matrices):
            model = LossModel(
                [m.name for m in matrices],
                [m.columns for m in matrices],
                [m.numel for m in matrices],
                [m.loss_change for m in matrices],
                [m.error for m in matrices],
                errors if all(errors) else None,
            )
        return cls(matrices, grid, errors, sizes, model, origin)

    def size(self, i: int, option: Option) -> int:
        """Bytes."""
        return size_of(self.matrices[i], option, self.grid, self.sizes[i])

    def weigh(self, options: Sequence[Option]) -> int:
        """Bytes of one option for each matrix; seen, not computed, where there are weights."""
        total = 0
        for i, (matrix, option) in enumerate(zip(self.matrices, options, strict=True)):
            if option.key not in self.sizes[i]:
                seen = self.origin.outcomes([matrix], [option], self.grid, False)
                if seen is not None:
                    self.sizes[i][option.key] = seen[0][option.key].nbytes
            total += self.size(i, option)
        return total

    def norm(self, i: int, option: Option) -> float:
        """Frobenius norm of the error.

        Raises:
            InvalidArgumentError: when it was not measured.
        """
        if option.key not in self.errors[i]:
            raise InvalidArgumentError(
                f"[allocate] strategy mxq needs the weights, or an analysis that measured them: got nothing for "
                f"{self.matrices[i].name} at {option.key}"
            )
        return math.sqrt(self.errors[i][option.key])

    def cost(self, i: int, option: Option) -> float:
        """What a matrix costs in loss, see :meth:`LossModel.cost`.

        Raises:
            InvalidArgumentError: when it cannot be predicted.
        """
        assert self.model is not None
        return self._known(i, option, self.model.cost(i, option))

    def expected_cost(self, i: int, option: Option) -> float:
        """The same to choose by, see :meth:`LossModel.expected_cost`."""
        assert self.model is not None
        return self._known(i, option, self.model.expected_cost(i, option))

    def _known(self, i: int, option: Option, cost: float | None) -> float:
        if cost is None:
            raise InvalidArgumentError(
                f"[allocate] the effect of outliers cannot be predicted without the weights: got {option.key}, "
                f"not measured for {self.matrices[i].name}"
            )
        return cost

    def nats(self, total: float) -> float:
        """Nats per token for one more unit of cost in a plan of so many."""
        assert self.model is not None
        power = self.model.power
        return float(power * total ** (power - 1)) if total > 0 else 1.0

    def demand_predictions(self) -> None:
        """Refuse matrices without references.

        Raises:
            InvalidArgumentError: naming the first.
        """
        for matrix in self.matrices:
            if not matrix.loss_change:
                raise InvalidArgumentError(
                    f"[allocate] strategy pqi needs an analysis with the metric pqi: got none for {matrix.name}"
                )


def grid_of(
    origin: Source, strategy: str, method: str | None, sym: bool | None, meta_bits: int | str | None
) -> tuple[str, Grid]:
    """The method that finds the codes, and the form of its grids."""
    name = method or origin.method or ("hqq" if strategy in PAPERS else "rtn")
    symmetric = sym if sym is not None else origin.grid is not None and origin.grid.sym
    if meta_bits == "default":
        meta_bits = 8 if strategy in PAPERS else None
    if isinstance(meta_bits, str):
        raise InvalidArgumentError(f"[allocate] meta_bits must be None or 1 to 8: got {meta_bits!r}")
    return name, Grid(solver_of(name), symmetric, meta_bits)


def options_of(
    origin: Source,
    strategy: str,
    bits: Iterable[int] | None,
    group_sizes: Iterable[int] | None,
    outlier_fractions: Iterable[float],
    grid: Grid,
) -> list[Option]:
    """All combinations, each one that can be stored."""
    if bits is None:
        bits = (2, 3, 4, 8) if strategy in PAPERS else (2, 3, 4, 5, 6, 7, 8)
    if group_sizes is None:
        analyzed = origin.group_size
        also = set() if strategy in PAPERS else {analyzed}
        group_sizes = [-1] if analyzed == -1 else sorted({32, 64, 128} | also)
    shares, sizes = list(outlier_fractions), list(group_sizes)
    options = [Option(b, g, o) for b in bits for g in sizes for o in shares]
    if not options:
        raise InvalidArgumentError("[allocate] bits, group_sizes and outlier_fractions must leave a choice: got none")
    for option in options:
        if option.bits > 8:
            raise InvalidArgumentError(f"[allocate] bits must be 1 to 8: got {option.bits}")
        try:
            grid.entry(option)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"[allocate] {error}") from None
    return options


def _uniform(
    matrices: Sequence[Matrix],
    options: Sequence[Option],
    allowed: Mapping[str, Sequence[Option]],
    facts: Facts,
    budget: Budget,
) -> Choice:
    """The largest setting that fits; where constraints forbid it to a matrix, the nearest that they allow."""

    def distance(a: Option, b: Option) -> tuple[float, ...]:
        return (
            abs(a.bits - b.bits),
            abs(math.log2(abs(a.group_size) / abs(b.group_size))),
            abs(a.outlier_fraction - b.outlier_fraction),
        )

    ladder = []
    for option in options:
        choice = [
            option if option in allowed[m.name] else min(allowed[m.name], key=lambda o: distance(o, option))
            for m in matrices
        ]
        size = sum(facts.size(i, taken) for i, taken in enumerate(choice))
        ladder.append((size, option, choice))
    ladder.sort(key=lambda step: step[:2], reverse=True)
    # A shape tells the size of quantized scales only nearly; what comes near the budget is weighed.
    for _, option, choice in (step for step in ladder if step[0] <= NEARLY * budget.limit):  # noqa: B007 (used below)
        if facts.weigh(choice) <= budget.limit:
            break
    else:
        option, choice = ladder[-1][1:]
        budget.demand(facts.weigh(choice))
    reasons = [f"uniform {option.key}" if taken == option else "constraint" for taken in choice]
    return Choice(choice, reasons, {"setting": option.key})


def _least(
    matrices: Sequence[Matrix],
    together: Sequence[Sequence[int]],
    allowed: Mapping[str, Sequence[Option]],
    facts: Facts,
    budget: Budget,
    cost: Callable[[int, Option], float],
    worth: Callable[[float], float],
    unit: str,
) -> Choice:
    """The options of the least sum of costs, why, and how good they are; worth is that of a cost, given their sum."""
    settings: list[list[Option]] = []
    costs: list[list[float]] = []
    sizes: list[list[int]] = []
    for members in together:
        names = [matrices[i].name for i in members]
        common = [o for o in allowed[names[0]] if all(o in allowed[name] for name in names)]
        if not common:
            raise InvalidArgumentError(
                f"[allocate] the constraints must leave a setting in common to {', '.join(names)}, which are stored "
                "alike; groups=none lifts that"
            )
        settings.append(common)
        costs.append([sum(cost(i, option) for i in members) for option in common])
        sizes.append([sum(facts.size(i, option) for i in members) for option in common])
    budget.demand(sum(min(options) for options in sizes))
    best = ops.multiple_choice_knapsack(costs, sizes, budget.limit, relative_gap=1e-6)
    rate = worth(best.cost)

    chosen: list[Option] = [settings[0][0]] * len(matrices)
    reasons = [""] * len(matrices)
    for k, members in enumerate(together):
        taken = best.chosen[k]
        reason = _reason(settings[k], [rate * each for each in costs[k]], sizes[k], taken, unit)
        for i in members:
            chosen[i] = settings[k][taken]
            reasons[i] = reason if len(members) == 1 else f"{reason} ({len(members)} stored alike)"
    about = {
        "objective": best.cost,
        "gap": best.gap,
        "groups": "none" if len(together) == len(matrices) else "fused",
        "settings": [o.key for o in sorted({o for options in settings for o in options})],
    }
    return Choice(chosen, reasons, about)


def _reason(options: Sequence[Option], costs: Sequence[float], sizes: Sequence[int], taken: int, unit: str) -> str:
    """What the best smaller and the best larger setting would change."""
    smaller = [k for k in range(len(options)) if sizes[k] < sizes[taken]]
    larger = [k for k in range(len(options)) if sizes[k] > sizes[taken] and costs[k] < costs[taken]]
    neighbours = []
    if smaller:
        neighbours.append(min(smaller, key=lambda k: (costs[k] - costs[taken]) / (sizes[taken] - sizes[k])))
    if larger:
        neighbours.append(min(larger, key=lambda k: (costs[k] - costs[taken]) / (sizes[k] - sizes[taken])))
    parts = [
        f"{options[k].key} {costs[k] - costs[taken]:+.2e} {unit} for {sizes[k] - sizes[taken]:+d} bytes"
        for k in neighbours
    ]
    return "; ".join(parts) or "the only setting allowed"


def _nominal(option: Option, grid: Grid) -> Configuration:
    """The published configuration of an option; float16 scales and zeros count as a first level of 16 bits."""
    return Configuration(option.bits, option.group_size, grid.meta_bits or 16, 128 if grid.meta_bits else 0)


def _boost_scores(
    origin: Source, matrices: Sequence[Matrix], strategy: str, sensitivity: Mapping[str, float] | None
) -> list[float]:
    """The score of each matrix that a boost goes by."""
    if strategy == "sensiboost":
        for m in matrices:
            if sensitivity is None or m.name not in sensitivity:
                raise InvalidArgumentError(
                    f"[allocate] sensiboost needs the activation sensitivity of every matrix: got none for {m.name}"
                )
            if not sensitivity[m.name] > 0:
                raise InvalidArgumentError(
                    "[allocate] every sensitivity must be above 0, for ratios are taken: got "
                    f"{sensitivity[m.name]} for {m.name}"
                )
        assert sensitivity is not None
        return [sensitivity[m.name] for m in matrices]
    if all(m.kurtosis is not None for m in matrices):
        return [float(m.kurtosis or 0) for m in matrices]
    if origin.weight is None:
        raise InvalidArgumentError("[allocate] kurtboost needs the weights, or an analysis with the metric kurtosis")
    return [float(ops.kurtosis(origin.weight(m.name), fisher=False)) for m in matrices]


def _boost(
    matrices: Sequence[Matrix],
    options: Sequence[Option],
    grid: Grid,
    budget: Budget,
    strategy: str,
    scores: Sequence[float],
    stops: int,
    top_m: int,
) -> Choice:
    """The rule of :func:`quantrature.allocation.boost` on the matrices of a model."""
    import numpy as np

    if stops < 0 or top_m < 0:
        raise InvalidArgumentError(
            f"[allocate] boost stops and top-m must be at least 0: got stops={stops}, top_m={top_m}"
        )
    steps = sorted(options, key=lambda o: (_nominal(o, grid).nominal_bits, o))
    within = [k for k, o in enumerate(steps) if _nominal(o, grid).label <= budget.bits + 1e-9]
    if not within:
        least = _nominal(steps[0], grid).label
        raise InvalidArgumentError(
            f"[allocate] {strategy} needs a budget of at least {least:.2f} bits a weight: got {budget.bits:.4f}"
        )
    base, boosted = steps[within[-1]], steps[min(within[-1] + stops, len(steps) - 1)]
    chosen, reasons = [base] * len(matrices), [f"{strategy}: base"] * len(matrices)
    flagged: dict[str, list[int]] = {}
    roles: dict[str, list[int]] = {}
    for i, matrix in enumerate(matrices):
        roles.setdefault(matrix.role, []).append(i)
    for role, members in roles.items():
        members.sort(key=lambda i: matrices[i].block)
        of_role: np.ndarray[Any, np.dtype[np.float64]] = np.array([scores[i] for i in members])
        found = conspicuous(of_role, ratio=strategy == "sensiboost")
        for place, position in enumerate(found[: top_m or None]):
            i = members[position]
            chosen[i] = boosted
            reasons[i] = f"{strategy}: conspicuous, place {place + 1} among {role}"
            flagged.setdefault(role, []).append(matrices[i].block)
    return Choice(chosen, reasons, {"setting": base.key, "boosted": boosted.key, "flagged": flagged})
