"""The strategies ``mxq`` and ``pqi``: minimize the sum of costs within a budget, by an integer program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .. import ops
from .._C import InvalidArgumentError
from ..plan.option import Option
from .budget import Budget
from .choice import Choice
from .facts import Facts


def least(
    together: Sequence[Sequence[int]],
    allowed: Mapping[str, Sequence[Option]],
    facts: Facts,
    budget: Budget,
    cost: Callable[[int, Option], float],
    worth: Callable[[float], float],
    unit: str,
) -> Choice:
    """Choose the options with the smallest sum of costs. ``worth`` converts the sum to the loss change per cost."""
    matrices = facts.matrices
    settings: list[list[Option]] = []
    costs: list[list[float]] = []
    sizes: list[list[int]] = []
    for members in together:
        names = [matrices[i].name for i in members]
        common = [o for o in allowed[names[0]] if all(o in allowed[name] for name in names)]
        if not common:
            raise InvalidArgumentError(
                f"[allocate] the constraints must leave a common setting for {', '.join(names)}, which must have the "
                "same; set groups=none to allow different settings"
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
            reasons[i] = reason if len(members) == 1 else f"{reason} (same setting for {len(members)} matrices)"
    about = {
        "objective": best.cost,
        "gap": best.gap,
        "groups": "none" if len(together) == len(matrices) else "fused",
        "settings": [o.key for o in sorted({o for options in settings for o in options})],
    }
    return Choice(chosen, reasons, about)


def _reason(options: Sequence[Option], costs: Sequence[float], sizes: Sequence[int], taken: int, unit: str) -> str:
    """Describe how the best smaller and the best larger setting would change cost and size."""
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
