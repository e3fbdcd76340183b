"""Solve the allocation problem of plans as an integer program with SciPy's HiGHS, for tests and benches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantrature import QuantratureError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Selection:
    """A choice of one option for each item.

    Attributes:
        chosen: index of the chosen option of each item.
        cost: sum of the costs.
        size: sum of the sizes, at most the budget.
        bound: lower bound of the cost of all choices within the budget.
    """

    chosen: tuple[int, ...]
    cost: float
    size: float
    bound: float


def choose(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    budget: float,
    *,
    relative_gap: float = 0.0,
    time_limit: float = 60.0,
) -> Selection:
    """Choose one option for each item, with the smallest sum of costs and a sum of sizes of at most the budget.

    Minimizes sum_i costs[i][c_i] subject to sum_i sizes[i][c_i] <= budget, with ``scipy.optimize.milp`` (HiGHS). For
    each item, the option whose variable is largest is chosen. The size of the choice is then checked.

    Args:
        costs, sizes: costs and sizes of the options of each item, finite. Integer sizes are summed exactly.
        budget: largest sum of sizes; at least the size of the smallest choice.
        relative_gap: stop if the cost is within this fraction of the lower bound.
        time_limit: seconds until the best choice so far is returned.

    Raises:
        QuantratureError: if the budget is too small, or no choice is found in time.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(map(min, sizes))
    if least > budget:
        raise QuantratureError(f"[allocate] the smallest choice must be within the budget: got {least} of {budget}")
    keep = [_undominated(c, s) for c, s in zip(costs, sizes, strict=True)]
    item = np.repeat(np.arange(len(keep)), [len(k) for k in keep])
    cost = np.concatenate([np.asarray(c, float)[k] for c, k in zip(costs, keep, strict=True)])
    # Sizes minus the smallest size of the item, so that the numbers of the program stay small.
    base = np.array([min(s) for s in sizes], float)
    extra = np.concatenate([np.asarray(s, float)[k] for s, k in zip(sizes, keep, strict=True)]) - base[item]
    unit = extra.max() or 1.0
    room = float(budget - least)
    one_each = sparse.csr_array((np.ones(len(item)), (item, np.arange(len(item)))))
    scale = np.abs(cost).max() or 1.0
    starts = np.cumsum([0, *(len(k) for k in keep)])
    while room > 0:
        found = milp(
            cost / scale,
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(extra[None, :] / unit, -np.inf, room / unit),
            ],
            options={"mip_rel_gap": relative_gap, "time_limit": time_limit},
        )
        if found.x is None:
            raise QuantratureError(f"[allocate] the integer program found no choice: {found.message}")
        picks = [int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts)]
        chosen = tuple(int(k[p]) for k, p in zip(keep, picks, strict=True))
        size = sum(s[c] for s, c in zip(sizes, chosen, strict=True))
        if size <= budget:
            total = sum(c[i] for c, i in zip(costs, chosen, strict=True))
            bound = found.mip_dual_bound * scale if found.mip_dual_bound is not None else -np.inf
            return Selection(chosen, float(total), size, min(float(total), float(bound)))
        room -= size - budget  # HiGHS meets the budget only within its tolerance
    chosen = tuple(int(k[0]) for k in keep)
    total = float(sum(c[i] for c, i in zip(costs, chosen, strict=True)))
    return Selection(chosen, total, least, total)


def _undominated(costs: Sequence[float], sizes: Sequence[float]) -> NDArray[np.intp]:
    """Return the indices of options that no other option beats in both cost and size; of equal ones, the first."""
    order = sorted(range(len(costs)), key=lambda i: (sizes[i], costs[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return np.array(kept)
