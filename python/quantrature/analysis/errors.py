"""Compute the quantization error and the stored size of a matrix at several settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..methods import METHODS, Method, Statistics, quantize_matrix
from ..plan import PlanEntry
from ..plan.option import Option

BITS = range(1, 9)
BITS_WHEN_CALIBRATED = (2, 3, 4)
"""For calibrated methods, which take much longer; errors at other bits are estimated from those."""


@dataclass(frozen=True)
class Outcome:
    """Quantization error and size of one matrix at one setting.

    Attributes:
        error: sum of (w~ - w)^2 over the weights; with a calibrated method, the error that the method minimizes, for
            gptq tr((w~ - w) H (w~ - w)^T). Loss changes are interpolated by it.
        nbytes: stored size in bytes.
    """

    error: float
    nbytes: int


def candidates(entry: PlanEntry) -> list[Option]:
    """Return the settings that an analysis records: with half, the same and twice the group size of an entry."""
    method, size = METHODS[entry.method], entry.group_size
    sizes = [size] if size < 16 or method.group_size is not None else [size // 2, size, 2 * size]
    bits = method.bits or (BITS_WHEN_CALIBRATED if method.needs else BITS)
    return [Option(each, size) for each in bits for size in sizes]


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
    given = statistics or Statistics()
    keys, sizes, errors = [], [], []
    for option in options:
        chosen = entry(option)
        stored = quantize_matrix(name, weight, chosen, statistics=statistics)
        apart = stored.dequantize("float32").sub_(exact)
        errors.append(_error(METHODS[chosen.method], apart, given))
        keys.append(option.key)
        sizes.append(stored.nbytes)
        advance(1)
    found = torch.stack(errors).tolist() if errors else []  # one transfer, so that a GPU is waited for once
    return dict(zip(keys, map(Outcome, found, sizes), strict=True))


def _error(method: Method, apart: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    calibrated = bool(method.needs) and all(getattr(statistics, need) is not None for need in method.needs)
    if method.objective is not None and calibrated:
        error = method.objective(apart, statistics.to(apart.device))
        return torch.tensor(error, dtype=torch.float64, device=apart.device)
    return apart.square_().sum(dtype=torch.float64)
