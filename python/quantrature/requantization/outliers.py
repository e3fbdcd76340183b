"""Distribute the outliers of a model over its matrices (self-adaptive outlier selection).

In the paper (arXiv 2503.01901, Algorithm 1), a temperature determines the fraction of outliers of each matrix. Here,
the fraction is proportional to (mean PQI)^(1 / temperature), up to a largest fraction. An infinite temperature gives
all matrices the same fraction. A low temperature gives the outliers to the matrices with the largest mean PQI. ReQuant
tries several temperatures, and takes the one with the lowest calibration loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .._C import InvalidArgumentError

TEMPERATURES = (math.inf, 2.0, 1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Temperatures to try: mean PQI to the power 0, 1/2, 1, 2, 4, 8 and 16. With the high powers, the matrices with the
largest mean PQI are filled up to their largest fraction first."""

SELECTIONS = ("temperature", "greedy")

SHARES = (0.0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.05)
"""Fractions of outliers at which the greedy selection measures the error of each matrix."""


def split(
    budget: int, sizes: Sequence[int], mean_pqi: Sequence[float], temperature: float, largest_share: float
) -> list[int]:
    """Distribute outliers over matrices: fractions proportional to (mean PQI)^(1 / temperature), up to a largest one.

    If a matrix would get more than ``largest_share`` allows, the other matrices get the rest.

    Args:
        budget: number of outliers of all matrices together.
        sizes: number of weights of each matrix.
        mean_pqi: mean PQI of each matrix, at least 0.
        temperature: above 0; infinite for the same fraction in each matrix.
        largest_share: largest fraction of outliers in a matrix, 0 to 1.

    Returns:
        The number of outliers of each matrix; the sum is exactly ``budget``.

    Raises:
        InvalidArgumentError: if ``budget`` is more than ``largest_share`` allows in all matrices together.
    """
    caps = [math.floor(largest_share * size) for size in sizes]
    if budget > sum(caps):
        raise InvalidArgumentError(
            f"[requant] the number of outliers must be at most {sum(caps)}, because max_outlier_fraction limits each "
            f"matrix: got {budget}; lower outlier_fraction or raise max_outlier_fraction"
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
    # Round by the largest remainder. Every quota is below its cap, so one more always fits.
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
    """Distribute outliers over matrices so that they reduce the predicted PQI most.

    The predicted PQI of a matrix with n outliers is pqi * error(n) / error(0). For each matrix, the lower convex hull
    of the points (n, predicted PQI) is computed. The segments of all hulls are taken in the order of their slopes,
    steepest decrease first, until the budget is used up. Outliers that reduce the PQI of no matrix are distributed in
    proportion to the room that the matrices have left.

    Args:
        budget: number of outliers of all matrices together.
        sizes: number of weights of each matrix.
        pqi: sum of PQI over the weights of each matrix, without outliers.
        errors: for each matrix, number of outliers to the sum of abs(w~ - w) after quantizing the rest; it must contain
            0 outliers.
        largest_share: largest fraction of outliers in a matrix, 0 to 1.

    Returns:
        The number of outliers of each matrix; the sum is exactly ``budget``.

    Raises:
        InvalidArgumentError: if ``budget`` is more than ``largest_share`` allows in all matrices together.
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
    rest = split(left, room, [1.0] * len(sizes), math.inf, 1.0)
    return [a + b for a, b in zip(found, rest, strict=True)]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
