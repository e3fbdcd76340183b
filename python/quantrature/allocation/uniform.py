"""The strategy ``uniform``: the same setting for every matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..plan.option import Option
from .budget import Budget
from .choice import Choice
from .facts import Facts

NEARLY = 1.02
"""How much smaller a stored matrix can be than its size computed from the shape."""


def uniform(
    options: Sequence[Option],
    allowed: Mapping[str, Sequence[Option]],
    facts: Facts,
    budget: Budget,
) -> Choice:
    """Choose the largest setting that fits; for a matrix whose constraints forbid it, the nearest allowed one."""

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
            for m in facts.matrices
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
