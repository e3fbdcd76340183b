"""The knapsack of plans as an integer program for SciPy's HiGHS: the oracle of tests, and a peer in benches."""

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
    """A choice and how good it is.

    Attributes:
        chosen: index of the option of each item.
        cost: of the choice.
        size: of the choice, at most the budget.
        bound: no choice within the budget costs less than this.
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
    """Choose one option for each item so that costs add up to the least and sizes to at most the budget.

    minimise sum_i costs[i][c_i] subject to sum_i sizes[i][c_i] <= budget, through ``scipy.optimize.milp`` (HiGHS).
    Variables are decoded by their largest value, and the choice is checked against the budget.

    Args:
        costs, sizes: for each item those of its options, finite; whole sizes are added up exactly.
        budget: at least the size of the smallest choice.
        relative_gap: where to stop, relative to the cost.
        time_limit: seconds, after which the best choice so far is returned with its gap.

    Raises:
        QuantratureError: when the budget cannot be met, or nothing was found in time.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(map(min, sizes))
    if least > budget:
        raise QuantratureError(f"[allocate] the smallest choice must be within the budget: got {least} of {budget}")
    keep = [_undominated(c, s) for c, s in zip(costs, sizes, strict=True)]
    item = np.repeat(np.arange(len(keep)), [len(k) for k in keep])
    cost = np.concatenate([np.asarray(c, float)[k] for c, k in zip(costs, keep, strict=True)])
    # What is above the smallest option of an item, so that the numbers of the program stay small.
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
        room -= size - budget  # the program holds the budget only within its tolerance
    chosen = tuple(int(k[0]) for k in keep)
    total = float(sum(c[i] for c, i in zip(costs, chosen, strict=True)))
    return Selection(chosen, total, least, total)


def _undominated(costs: Sequence[float], sizes: Sequence[float]) -> NDArray[np.intp]:
    """Options that are not beaten in both cost and size; of equals the first stays."""
    order = sorted(range(len(costs)), key=lambda i: (sizes[i], costs[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return np.array(kept)
