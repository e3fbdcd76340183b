"""Moments and kurtosis of weights (contract: quantrature/moments.hpp)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import _C
from ._arrays import Array, as_input, core_view, place

_OVER = {None: 0, 1: 1, 0: 2}


@dataclass(frozen=True)
class Moments:
    """Partial statistics of one or many sets of numbers, which :meth:`merge` joins.

    ``table`` is float64 of shape ``(*shape, 7)``; its last axis holds count, mean, the sums of the second, third and
    fourth power of the distance to the mean, minimum and maximum, which the properties name.
    """

    table: np.ndarray

    @property
    def count(self) -> np.ndarray:
        """How many numbers each set has."""
        return self.table[..., 0]

    @property
    def mean(self) -> np.ndarray:
        """Arithmetic mean of each set."""
        return self.table[..., 1]

    @property
    def variance(self) -> np.ndarray:
        """Population variance of each set."""
        return np.asarray(self.table[..., 2] / self.table[..., 0])

    @property
    def minimum(self) -> np.ndarray:
        """Smallest number of each set."""
        return self.table[..., 5]

    @property
    def maximum(self) -> np.ndarray:
        """Largest number of each set."""
        return self.table[..., 6]

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of each set with the set of ``other`` at the same place (Pébay 2008, eq. 2.1)."""
        if self.table.shape != other.table.shape:
            raise _C.InvalidArgumentError(
                f"[moments] merge needs equal shapes: got {self.table.shape[:-1]} and {other.table.shape[:-1]}"
            )
        out = np.empty_like(self.table)
        _C.merge_moments(self.table.reshape(-1, 7), other.table.reshape(-1, 7), out.reshape(-1, 7))
        return Moments(out)

    def kurtosis(self, fisher: bool = True, bias: bool = True) -> np.ndarray | float:
        """Kurtosis of each set; see :func:`kurtosis`."""
        out = np.empty(self.table.size // 7)
        _C.kurtosis(self.table.reshape(-1, 7), fisher, bias, out)
        return out.reshape(self.table.shape[:-1]) if self.table.ndim > 1 else float(out[0])


def moments(x: Array, axis: int | None = None, group_size: int | None = None) -> Moments:
    """Moments of ``x``, read once, accumulated in float64.

    Args:
        x: float32, float16 or bfloat16, one or two dimensions, contiguous.
        axis: ``None`` for all numbers of ``x`` together, ``1`` for each row, ``0`` for each column.
        group_size: with an axis, cut each row or column into groups of this many numbers, the last one possibly
            shorter.

    Returns:
        :class:`Moments` of shape ``()``; ``(rows,)`` or ``(cols,)``; with groups ``(rows, groups)`` or
        ``(groups, cols)``. The same bits on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, an axis other than these, a
            group_size below 1 or without an axis.
    """
    x = as_input(x, "moments", "x", on_cuda=True)
    if axis not in _OVER or (axis == 1 and x.ndim == 1):
        raise _C.InvalidArgumentError(
            f"[moments] axis must be None, 0 or 1 and exist in x: got axis={axis}, ndim={x.ndim}"
        )
    if group_size is not None and (axis is None or group_size < 1):
        raise _C.InvalidArgumentError(
            f"[moments] group_size must be at least 1 and goes with an axis: got group_size={group_size}, axis={axis}"
        )
    over = 1 if x.ndim == 1 and axis == 0 else _OVER[axis]
    rows, cols = (1, x.shape[0]) if x.ndim == 1 else x.shape
    length = rows if over == 2 else cols
    groups = 1 if group_size is None else -(-length // group_size)
    shape: tuple[int, ...]
    if over == 0:
        shape = ()
    elif over == 1:
        shape = (rows, groups)
    else:
        shape = (groups, cols)
    out = np.empty((*shape, 7))
    size = -1 if group_size is None else group_size
    _C.compute_moments(core_view(x), over, size, out.reshape(-1, 7), place("moments", x=x))
    if over and group_size is None:
        out = out.squeeze(1 if over == 1 else 0)
    if x.ndim == 1 and over:
        out = out.reshape(-1, 7) if group_size is not None else out.reshape(7)
    return Moments(out)


def kurtosis(x: Array, axis: int | None = None, fisher: bool = True, bias: bool = True) -> np.ndarray | float:
    """Kurtosis as ``scipy.stats.kurtosis`` defines it, in one pass over ``x`` and in float64.

    Args:
        x: float32, float16 or bfloat16, one or two dimensions, contiguous.
        axis: ``None`` for all of ``x``, ``0`` for each column, ``1`` for each row.
        fisher: subtract 3, so that a normal distribution has 0; otherwise Pearson's definition, which KurtBoost uses
            (arXiv 2503.06518, section 4).
        bias: leave the estimate as it is; otherwise correct it for the sample size.

    Returns:
        A float, or a float64 array with one value for each column or row; NaN where the variance vanishes.

    Raises:
        InvalidArgumentError: as :func:`moments`.
    """
    return moments(x, axis).kurtosis(fisher, bias)
