"""Choose test cases that cover every pair of values of several parameters, without the full product."""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return cases so that any two values of two different parameters occur together in at least one case.

    The cases are the same on every run. Each case starts with the first pair that has not occurred yet. Every other
    parameter then gets the value that adds the most new pairs; between equal values the one that was used least, so
    that each value occurs about equally often.

    Args:
        parameters: the values of each parameter; at least two parameters.
    """
    values = [list(parameter) for parameter in parameters]
    missing = {
        frozenset({(a, i), (b, j)}): ((a, i), (b, j))
        for a, b in combinations(range(len(values)), 2)
        for i, j in product(range(len(values[a])), range(len(values[b])))
    }
    used: Counter[tuple[int, int]] = Counter()
    cases = []
    while missing:
        chosen = list(next(iter(missing.values())))
        for a in sorted(set(range(len(values))) - {a for a, _ in chosen}):
            news = {
                (a, i): sum(frozenset({(a, i), other}) in missing for other in chosen) for i in range(len(values[a]))
            }
            chosen.append(max(news, key=lambda value: (news[value], -used[value])))
        for pair in combinations(chosen, 2):
            missing.pop(frozenset(pair), None)
        used.update(chosen)
        cases.append(tuple(values[a][i] for a, i in sorted(chosen)))
    return cases
