"""The function ``allocate``: choose a setting for every matrix, within a budget."""

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
    "uniform": "the largest setting that fits, the same for every matrix",
    "mxq": "minimizes the sum of the Frobenius norms of the weight errors; needs the weights",
    "sensiboost": "more bits for layers with unusually sensitive outputs; needs the model and calibration text",
    "kurtboost": "more bits for layers with unusually heavy-tailed weights; needs the weights",
    "pqi": "minimizes the predicted loss change, from the signed PQI of each matrix; needs an analysis",
}
"""Values of the argument ``strategy``, each with a one-line description."""


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
    zero: str | None = None,
    scale_dtype: str | None = None,
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
    """Choose bits, group size and fraction of outliers for each matrix of a model, within a size budget.

    Sizes are sizes as stored: codes, scales, zero points, and outliers with their positions. ``plan.allocation`` holds
    the used part of the budget and the predicted loss change.

    - ``uniform``: the largest setting that fits, for all matrices.
    - ``pqi``: minimizes the expected loss change, with the cost of each matrix from :class:`LossModel`, by an integer
      program. ``plan.allocation["gap"]`` bounds the distance from the optimum.
    - ``mxq`` (Zhang et al., ICAART 2025): minimizes the sum of the Frobenius norms of w~ - w, by the same program.
    - ``sensiboost``, ``kurtboost`` (arXiv 2503.06518): the largest published setting whose label is within
      ``avg_bits``; outlier layers get a setting that is ``stops`` larger, see :func:`boost`. As published, the boost
      exceeds the budget. No other strategy does.

    Args:
        source: the result of :func:`quantrature.analyze`, a model, or the folder of either. From a model's folder,
            weights are read one matrix at a time. To make several plans, give a :class:`Source`, which keeps its
            measurements.
        strategy: one of ``STRATEGIES``.
        avg_bits: budget in bits per weight, on average over the matrices of the plan, with scales, zero points and
            outliers.
        target_bytes: budget in bytes for all matrices of the plan. Give either ``avg_bits`` or ``target_bytes``.
        bits, group_sizes, outlier_fractions: values to choose from. Default for the published strategies (``mxq``,
            ``sensiboost``, ``kurtboost``): their twelve settings; for others: 2 to 8 bits, and group sizes 32, 64, 128
            and that of the analysis. Outliers (fractions above 0) need the weights.
        method: quantization method, as in :func:`quantrature.quantize`. Default: the method of the analysis; without
            an analysis ``hqq`` for the published strategies and ``rtn`` for ``uniform``.
        sym: whether to quantize symmetrically around zero; by default as in the analysis.
        zero, scale_dtype: as in :func:`quantrature.quantize`; by default as in the analysis.
        meta_bits: bits of quantized scales and zero points, as in :class:`quantrature.plan.PlanEntry`. Default: 8 for
            the published strategies, else ``None``.
        groups: ``fused`` gives the same setting to matrices that serving engines fuse (q, k and v; gate and up);
            ``none`` does not. Default: ``fused`` for ``pqi``, else ``none``. Not for ``sensiboost`` and ``kurtboost``.
        pin, minimum, maximum, skip: see :class:`Constraints`. ``sensiboost`` and ``kurtboost`` support only ``skip``.
        stops, top_m: for ``sensiboost`` and ``kurtboost``, see :func:`boost`.
        weights: the model that was analyzed, or its folder, to measure settings that the analysis does not contain.
        sensitivity: for ``sensiboost``, matrix name to the score of :func:`activation_sensitivity`.
        trust_remote_code: whether to run Python code from the model's folder.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Raises:
        InvalidArgumentError: for an invalid argument, constraint or matrix, which the message names; for a budget
            below the smallest possible plan, with the smallest possible budget.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"[allocate] strategy must be one of {', '.join(STRATEGIES)}: got {strategy!r}")
    if method in STRATEGIES:
        raise InvalidArgumentError(
            f"[allocate] method must be a quantization method: got {method!r}, which is a strategy; "
            f"use strategy={method!r}"
        )
    if groups not in (None, "fused", "none"):
        raise InvalidArgumentError(f"[allocate] groups must be fused or none: got {groups!r}")
    origin = Source.of(source, weights, trust_remote_code)
    constraints = Constraints(pin or {}, minimum or {}, maximum or {}, skip)
    skipped = constraints.skipped([m.name for m in origin.matrices])
    matrices = [m for m in origin.matrices if m.name not in skipped]
    if not matrices:
        raise InvalidArgumentError("[allocate] skip must leave at least one matrix: got a skip that matches all")
    budget = Budget.of(matrices, avg_bits, target_bytes)
    quantizer, grid = grid_of(origin, strategy, method, sym, meta_bits, zero, scale_dtype)
    options = options_of(origin, strategy, bits, group_sizes, outlier_fractions, grid)
    if strategy in ("sensiboost", "kurtboost"):
        if pin or minimum or maximum or groups == "fused":
            raise InvalidArgumentError(
                f"[allocate] {strategy} supports no groups and no constraint except skip; remove the others"
            )
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
    """Choose among the allowed options of each matrix by ``uniform``, ``mxq`` or ``pqi``."""
    if strategy == "uniform":
        return uniform(options, allowed, facts, budget)
    names = [m.name for m in facts.matrices]
    together = fusion_groups(names) if fused else [[i] for i in range(len(names))]
    if strategy == "mxq":
        return least(together, allowed, facts, budget, facts.norm, lambda total: 1.0, "norm")
    facts.demand_predictions()
    return least(together, allowed, facts, budget, facts.expected_cost, facts.nats, "nats")


def _plan(choice: Choice, facts: Facts, origin: Source, skipped: Iterable[str]) -> Plan:
    """Make the plan of a choice, with the predicted loss change of each entry if it is known."""
    entries = {name: PlanEntry(KEEP_BITS, reason="skipped as asked", predicted_loss_change=0.0) for name in skipped}
    losses: Sequence[float | None] = [None] * len(facts.matrices)
    if facts.model is not None:
        losses = facts.model.loss_changes([facts.cost(i, option) for i, option in enumerate(choice.options)])
    for matrix, option, reason, predicted in zip(facts.matrices, choice.options, choice.reasons, losses, strict=True):
        entries[matrix.name] = replace(facts.grid.entry(option), reason=reason, predicted_loss_change=predicted)
    return Plan({m.name: entries[m.name] for m in origin.matrices})
