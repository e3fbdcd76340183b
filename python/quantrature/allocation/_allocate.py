"""A setting for every matrix, within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .._C import InvalidArgumentError
from ..plan import KEEP_BITS, Plan, PlanEntry
from ..plan.fusion import fusion_groups
from ..plan.option import Option
from .boosts import Rule, boost_matrices, nominal
from .budget import Budget
from .candidates import PAPERS, grid_of, options_of
from .choice import Choice
from .constraints import Constraints
from .facts import Facts
from .knapsack import least
from .sources import Source
from .uniform import uniform

if TYPE_CHECKING:
    import os

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
    skipped = constraints.skipped([m.name for m in origin.matrices])
    matrices = [m for m in origin.matrices if m.name not in skipped]
    if not matrices:
        raise InvalidArgumentError("[allocate] a plan needs a matrix that is not skipped: got none")
    budget = Budget.of(matrices, avg_bits, target_bytes)
    quantizer, grid = grid_of(origin, strategy, method, sym, meta_bits)
    options = options_of(origin, strategy, bits, group_sizes, outlier_fractions, grid)
    if strategy in ("sensiboost", "kurtboost"):
        if pin or minimum or maximum or groups == "fused":
            raise InvalidArgumentError(f"[allocate] {strategy} takes no constraints but skip, and no groups: got some")
        facts = Facts.of(origin, matrices, [], grid, progress)
        choice = boost_matrices(options, facts, budget, Rule(strategy, stops, top_m, "allocate"), sensitivity)
        facts.weigh(choice.options)
    else:
        allowed = constraints.allowed([m.name for m in matrices], options)
        measured = [] if strategy == "uniform" else sorted({o for found in allowed.values() for o in found})
        facts = Facts.of(origin, matrices, measured, grid, progress)
        fused = groups == "fused" or (groups is None and strategy == "pqi")
        choice = _best(strategy, options, allowed, facts, budget, fused)
    plan = _plan(choice, facts, origin, skipped)
    about = {
        "strategy": strategy,
        "method": quantizer,
        **budget.report(sum(facts.size(i, option) for i, option in enumerate(choice.options))),
        **choice.about,
        **origin.about,
    }
    if strategy in PAPERS:
        bits_of_all = sum(
            m.numel * nominal(o, grid).nominal_bits for m, o in zip(matrices, choice.options, strict=True)
        )
        about["nominal_bits_per_weight"] = bits_of_all / budget.weights
    if facts.model is not None:
        about["predicted_loss_change"] = plan.predicted_loss_change
        about["error_energies"] = "measured" if facts.model.measured else "analytic"
        about["power"] = facts.model.power
        about["floored"] = dict(facts.model.floored)
    return replace(plan, allocation=about)


def _best(
    strategy: str,
    options: Sequence[Option],
    allowed: Mapping[str, Sequence[Option]],
    facts: Facts,
    budget: Budget,
    fused: bool,
) -> Choice:
    """What ``uniform``, ``mxq`` or ``pqi`` chooses of what is allowed to each matrix."""
    if strategy == "uniform":
        return uniform(options, allowed, facts, budget)
    names = [m.name for m in facts.matrices]
    together = fusion_groups(names) if fused else [[i] for i in range(len(names))]
    if strategy == "mxq":
        return least(together, allowed, facts, budget, facts.norm, lambda total: 1.0, "norm")
    facts.demand_predictions()
    return least(together, allowed, facts, budget, facts.expected_cost, facts.nats, "nats")


def _plan(choice: Choice, facts: Facts, origin: Source, skipped: Iterable[str]) -> Plan:
    """The plan of a choice, with what each entry is predicted to cost where that is known."""
    entries = {name: PlanEntry(KEEP_BITS, reason="skipped as asked", predicted_loss_change=0.0) for name in skipped}
    losses: Sequence[float | None] = [None] * len(facts.matrices)
    if facts.model is not None:
        losses = facts.model.loss_changes([facts.cost(i, option) for i, option in enumerate(choice.options)])
    for matrix, option, reason, predicted in zip(facts.matrices, choice.options, choice.reasons, losses, strict=True):
        entries[matrix.name] = replace(facts.grid.entry(option), reason=reason, predicted_loss_change=predicted)
    return Plan({m.name: entries[m.name] for m in origin.matrices})
