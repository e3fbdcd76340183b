"""Options under a budget (contract: quantrature/allocation.hpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import _C


@dataclass(frozen=True)
class KnapsackChoice:
    """What :func:`multiple_choice_knapsack` chose.

    Attributes:
        chosen: for each item the number of its option.
        cost: of the choice.
        size: of the choice, at most the budget.
        bound: no choice within the budget costs less.
    """

    chosen: tuple[int, ...]
    cost: float
    size: int
    bound: float

    @property
    def gap(self) -> float:
        """How far from the least cost this one can be, relative to it."""
        apart = max(0.0, self.cost - self.bound)
        return apart / abs(self.cost) if self.cost else apart


def multiple_choice_knapsack(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    budget: int,
    *,
    relative_gap: float = 0.0,
    max_states: int = 0,
) -> KnapsackChoice:
    """One option for each item, so that costs add up to the least and sizes to at most the budget.

    A dynamic program over undominated partial choices with bounds by the linear relaxation (Pisinger 1995). The choice
    is the same everywhere.

    Args:
        costs: for each item those of its options, finite.
        sizes: for each item those of its options, whole and at least 0.
        budget: of the sizes.
        relative_gap: stop where the choice is proved to be within this share of the least cost; 0 for the optimum.
        max_states: how many partial choices are kept after an item; 0 for 65,536. ``bound`` says what that may cost.

    Raises:
        InvalidArgumentError: for no items, an item without options or with more costs than sizes, a cost that is not
            finite, a size that is negative or not whole, and a budget below the smallest choice.
    """
    op = "allocate"
    lengths = [len(options) for options in costs]
    for i, (expected, given) in enumerate(zip(lengths, [len(options) for options in sizes], strict=True)):
        if expected != given:
            raise _C.InvalidArgumentError(
                f"[{op}] an item must have as many sizes as costs: got item={i}, sizes={given}, costs={expected}"
            )
    whole = [int(size) for options in sizes for size in options]
    if any(int(size) != size for options in sizes for size in options):
        raise _C.InvalidArgumentError(f"[{op}] sizes must be whole numbers")
    if any(abs(size) >= 1 << 62 for size in whole) or not 0 <= budget < 1 << 63:
        raise _C.InvalidArgumentError(f"[{op}] sizes and budget must be at least 0 and below 2^62: got budget={budget}")
    chosen = np.empty(len(lengths), np.int64)
    cost, size, bound = _C.allocate(
        np.array([cost for options in costs for cost in options], np.float64),
        np.array(whole, np.int64),
        np.cumsum([0, *lengths], dtype=np.int64),
        int(budget),
        relative_gap,
        max_states,
        chosen,
    )
    return KnapsackChoice(tuple(chosen.tolist()), cost, size, bound)
