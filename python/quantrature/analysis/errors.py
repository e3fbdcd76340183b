"""How far from its original each setting leaves a matrix, and how many bytes it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..methods import Statistics, quantize_matrix
from ..plan import PlanEntry
from ..plan.option import Option

BITS = range(1, 9)


@dataclass(frozen=True)
class Outcome:
    """What one setting makes of one matrix.

    Attributes:
        error: sum of (w~ - w)^2.
        nbytes: as stored.
    """

    error: float
    nbytes: int


def candidates(group_size: int) -> list[Option]:
    """The settings whose outcomes an analysis notes: all bits, in groups of half, once and twice the size."""
    sizes = [group_size] if group_size < 16 else [group_size // 2, group_size, 2 * group_size]
    return [Option(bits, size) for bits in BITS for size in sizes]


def outcomes(
    name: str,
    weight: torch.Tensor,
    options: Iterable[Option],
    entry: Callable[[Option], PlanEntry],
    advance: Callable[[int], object] = lambda count: None,
    statistics: Statistics | None = None,
) -> dict[str, Outcome]:
    """Quantize a matrix in several ways.

    Args:
        name: for messages.
        weight: (out_features, in_features), contiguous; where :func:`quantrature.methods.quantize_matrix` takes it.
        options: what to try.
        entry: makes the plan entry of an option.
        advance: called with 1 after each.
        statistics: for methods that need them.

    Returns:
        Key of the option to its outcome.
    """
    exact = weight.float()
    keys, sizes, errors = [], [], []
    for option in options:
        stored = quantize_matrix(name, weight, entry(option), statistics=statistics)
        apart = stored.dequantize("float32").sub_(exact)
        errors.append(apart.square_().sum(dtype=torch.float64))
        keys.append(option.key)
        sizes.append(stored.nbytes)
        advance(1)
    found = torch.stack(errors).tolist() if errors else []  # a device is waited for once
    return dict(zip(keys, map(Outcome, found, sizes), strict=True))
