"""Compute the quantization error and the stored size of a matrix at several settings."""

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
    """Quantization error and size of one matrix at one setting.

    Attributes:
        error: sum of (w~ - w)^2 over the weights.
        nbytes: stored size in bytes.
    """

    error: float
    nbytes: int


def candidates(group_size: int) -> list[Option]:
    """Return the settings that an analysis records: 1 to 8 bits, with half, the same and twice the group size."""
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
    """Quantize a matrix at several settings, and return the error and size of each.

    Args:
        name: name of the matrix, for messages.
        weight: (out_features, in_features), contiguous, on a device that
            :func:`quantrature.methods.quantize_matrix` supports.
        options: the settings.
        entry: function that returns the plan entry of a setting.
        advance: function that is called with 1 after each setting, for progress.
        statistics: calibration statistics, for methods that need them.

    Returns:
        Key of the setting, such as ``b3g64``, to its outcome.
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
    found = torch.stack(errors).tolist() if errors else []  # one transfer, so that a GPU is waited for once
    return dict(zip(keys, map(Outcome, found, sizes), strict=True))
