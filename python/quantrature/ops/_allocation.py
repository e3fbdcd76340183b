"""The multiple-choice knapsack problem (contract: quantrature/allocation.hpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import _C


@dataclass(frozen=True)
class KnapsackChoice:
    """The result of :func:`multiple_choice_knapsack`.

    Attributes:
        chosen: index of the chosen option of each item.
        cost: total cost.
        size: total size, at most the budget.
        bound: lower bound on the cost of every choice within the budget.
    """

    chosen: tuple[int, ...]
    cost: float
    size: int
    bound: float

    @property
    def gap(self) -> float:
        """Upper bound on the relative difference between this cost and the optimum."""
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
    """Choose one option per item, so that the total cost is minimal and the total size is within the budget.

    The algorithm is a dynamic program over undominated partial choices, with bounds from the linear relaxation
    (Pisinger 1995). The result is the same on every machine.

    Args:
        costs: for each item the costs of its options, finite.
        sizes: for each item the sizes of its options, integers of at least 0.
        budget: largest total size.
        relative_gap: stop when the choice is proved to be within this fraction of the optimum; 0 for the optimum.
        max_states: largest number of partial choices kept after each item; 0 for 65,536. If this cuts off choices, the
            result may not be optimal; ``bound`` shows by how much.

    Raises:
        InvalidArgumentError: for no items, an item without options or with different numbers of costs and sizes, a
            cost that is not finite, a size that is negative or not an integer, and a budget below the smallest choice.
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
