"""Self-adaptive outlier selection: how many of a model's outliers each matrix may keep.

The paper (arXiv 2503.01901, Algorithm 1) gives each matrix a ratio of its own, found with a temperature. Here the
ratios are proportional to mean PQI to the power of one over the temperature: an infinite one spreads the outliers
evenly, a low one gives them to the matrices that suffer most. The best temperature is the one with the lowest loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .._C import InvalidArgumentError

TEMPERATURES = (math.inf, 2.0, 1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""What is tried: powers 0, 1/2, 1, 2, 4, 8 and 16 of mean PQI; the last fill one matrix after the other."""

SELECTIONS = ("temperature", "greedy")

SHARES = (0.0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.05)
"""Shares of a matrix at which the greedy selection looks at its error."""


def split(
    budget: int, sizes: Sequence[int], mean_pqi: Sequence[float], temperature: float, largest_share: float
) -> list[int]:
    """Outliers for each matrix, together exactly the budget.

    Args:
        budget: outliers of all matrices.
        sizes: weights of each matrix.
        mean_pqi: of each matrix, not negative.
        temperature: above 0; infinite for the same ratio everywhere.
        largest_share: of a matrix, 0 to 1; what would go beyond is spread over the others.

    Raises:
        InvalidArgumentError: for a budget beyond the largest share of all matrices.
    """
    caps = [math.floor(largest_share * size) for size in sizes]
    if budget > sum(caps):
        raise InvalidArgumentError(
            f"[requant] outliers must be at most what the largest share of all matrices allows: "
            f"got {budget}, allowed={sum(caps)}"
        )
    most = max(mean_pqi)
    claims = [
        size * (pqi / most if most else 1.0) ** (1 / temperature) for size, pqi in zip(sizes, mean_pqi, strict=True)
    ]
    found = [0] * len(sizes)
    waiting = list(range(len(sizes)))
    left = budget
    while True:
        if not sum(claims[i] for i in waiting):
            for i in waiting:
                claims[i] = sizes[i]
        total = sum(claims[i] for i in waiting)
        full = [i for i in waiting if left * claims[i] >= caps[i] * total]
        if not full:
            break
        for i in full:
            found[i] = caps[i]
        waiting = [i for i in waiting if i not in full]
        left = budget - sum(found)
    # Largest remainder; every quota is below its cap, so that one more always fits.
    quotas = {i: left * claims[i] / total for i in waiting}
    for i, quota in quotas.items():
        found[i] = math.floor(quota)
    missing = budget - sum(found)
    for i in sorted(quotas, key=lambda i: math.floor(quotas[i]) - quotas[i])[:missing]:
        found[i] += 1
    return found


def greedy_split(
    budget: int, sizes: Sequence[int], pqi: Sequence[float], errors: Sequence[Mapping[int, float]], largest_share: float
) -> list[int]:
    """Outliers for each matrix by the drop of predicted PQI that they bring, together exactly the budget.

    The PQI that n outliers leave a matrix is taken to be its PQI without any times the error with them over the error
    without. Matrices get their next helping in the order of the drop for each outlier, along the lower hull of that.

    Args:
        budget: outliers of all matrices.
        sizes: weights of each matrix.
        pqi: sum over each matrix.
        errors: for each matrix, number of outliers (0 among them) to the sum of abs(w~ - w) after quantizing the rest.
        largest_share: of a matrix, 0 to 1.

    Raises:
        InvalidArgumentError: for a budget beyond the largest share of all matrices.
    """
    helpings = []
    for i, (total, by_count) in enumerate(zip(pqi, errors, strict=True)):
        without = by_count[0] or 1.0
        hull: list[tuple[int, float]] = []
        for point in sorted((count, total * error / without) for count, error in by_count.items()):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
                hull.pop()
            hull.append(point)
        helpings += [(_slope(a, b), i, b[0] - a[0]) for a, b in pairwise(hull)]
    found = [0] * len(sizes)
    left = budget
    for slope, i, count in sorted(helpings):
        taken = min(left, count, math.floor(largest_share * sizes[i]) - found[i])
        if slope < 0:
            found[i] += taken
            left -= taken
    room = [math.floor(largest_share * size) - taken for size, taken in zip(sizes, found, strict=True)]
    rest = split(left, room, [1.0] * len(sizes), math.inf, 1.0)  # nothing gains by them; spread them
    return [a + b for a, b in zip(found, rest, strict=True)]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
