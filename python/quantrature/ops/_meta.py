"""Quantize the scales and zero points themselves (``meta_bits``), to store them in fewer bits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ._arrays import Array, is_torch

Positions = tuple[Array | None, Array | None]
"""Row offsets and columns of the weights that are stored elsewhere, or two ``None``."""

_UNNOTICED = 1.01
"""Ratio of errors up to which the codes are kept as they are."""

_NEGLIGIBLE = 1e-6
"""Error, as a share of the norm of the weights, that rounding to float32 leaves anyway."""

_CHUNK = 1 << 20


def allowed_ratio(meta_bits: int, group: int) -> float:
    """By how much quantized scales may multiply the error of a matrix: 1.06 at 8 bits for groups of 64 weights.

    The squared error of a rounded scale grows by a factor of 4 with each bit less. A fitted grid has a few weights of
    each group, the ends of its range, without any error, which a rounded one has not: groups of 16 lose 19 %, groups of
    128 lose 5 %. Groups of fewer than 8 weights, where that is most of them, have no limit.
    """
    return float(((1 + 0.06 * 4 ** (8 - meta_bits)) * group / (group - 4)) ** 0.5)


def with_quantized_scales(
    w: Array,
    plain: Any,
    quantized: Callable[[Array], Any],
    again: Callable[[Array, Array | None], Any] | None,
    meta_bits: int,
    meta_group: int,
    group: int,
    exclude: Positions,
) -> Any:
    """The quantized matrix with scales and zero points that are quantized in turn.

    Rounding the scales of a matrix can cost a lot: a group of weights in a narrow range far from zero has a zero point
    of thousands of codes, and a group of zeros has the scale 1. Each widens the grid on which the scales or zero points
    of all its neighbors are rounded. Of these forms, the first is taken whose error is at most ``allowed_ratio`` times
    that of ``plain``, or a millionth of the norm of the weights:

    1. the codes as they are, with rounded scales and zero points;
    2. codes found again on grids whose ranges contain zero, which keeps zero points between 0 and ``2**bits - 1``,
       with scales that are rounded up;
    3. ``plain``, whose scales are not quantized.

    Args:
        w: the weights.
        plain: their quantized form, with float32 ``scale`` and perhaps ``zero``.
        quantized: quantizes a vector of scales or of zero points.
        again: quantizes ``w`` on the grid of quantized scales and zero points; ``None`` where form 2 does not exist.
        meta_bits, meta_group: bits of a code of a scale, and how many scales share a grid (-1 for all).
        group: weights of a group.
        exclude: weights whose error does not count.
    """
    values = _Weights(w, exclude)
    before = values.squared_error(plain)

    def accepted(error: float, ratio: float) -> bool:
        return error <= ratio**2 * before or error <= _NEGLIGIBLE**2 * values.squared_norm

    zero = getattr(plain, "zero", None)
    best = replace(plain, scale=quantized(plain.scale.reshape(-1)))
    if zero is not None:
        best = replace(best, zero=quantized(zero.reshape(-1)))
    least = values.squared_error(best)
    if accepted(least, _UNNOTICED):
        return best
    if again is not None:
        covering = again(*_covering(plain, quantized, meta_bits, meta_group))
        error = values.squared_error(covering)
        if error < least:
            best, least = covering, error
    return best if group < 8 or accepted(least, allowed_ratio(meta_bits, group)) else plain


class _Weights:
    """Weights to compare quantized forms with, in float64."""

    def __init__(self, w: Array, exclude: Positions) -> None:
        self._flat = w.reshape(-1)
        self._excluded = _flat_positions(w, exclude)

    @functools.cached_property
    def squared_norm(self) -> float:
        return self._sum(lambda part: _double(self._flat[part]))

    def squared_error(self, q: Any) -> float:
        values = q.dequantize("float32").reshape(-1)
        return self._sum(lambda part: _double(values[part]) - _double(self._flat[part]))

    def _sum(self, difference: Callable[[Any], Array]) -> float:
        size = len(self._flat)
        parts: list[Any] = [slice(begin, begin + _CHUNK) for begin in range(0, size, _CHUNK)]
        total = sum(float((difference(part) ** 2).sum()) for part in parts)
        if self._excluded is not None:
            total -= float((difference(self._excluded) ** 2).sum())
        return max(total, 0.0)


def _flat_positions(w: Array, exclude: Positions) -> Array | None:
    """Where the excluded weights are in the flattened matrix."""
    offsets, columns = exclude
    if offsets is None or columns is None or len(columns) == 0:
        return None
    counts = np.diff(_numpy(offsets))
    at = np.repeat(np.arange(len(counts)), counts) * int(w.shape[-1]) + _numpy(columns)
    return sys.modules["torch"].from_numpy(at).to(w.device) if is_torch(w) else at


def _covering(plain: Any, quantized: Callable[[Array], Any], meta_bits: int, meta_group: int) -> tuple[Any, Any]:
    """Quantized scales and zero points of grids that contain the range of each group, and zero."""
    top = 2**plain.bits - 1
    scale = _numpy(_double(plain.scale.reshape(-1)))
    if plain.zero is None:
        needed = np.where(scale == 1, 0, scale)  # a group of zeros has the scale 1
        return quantized(_like(plain.scale, _rounded_up(needed, meta_bits, meta_group))), None
    zero = _numpy(_double(plain.zero.reshape(-1)))
    low, high = -zero * scale, (top - zero) * scale
    constant, zeros = zero == -1, (zero == 0) & (scale == 1)
    low, high = np.where(constant, scale, low), np.where(constant, scale, np.where(zeros, 0, high))
    low, high = np.minimum(0, np.minimum(low, high)), np.maximum(0, np.maximum(low, high))
    wide = (high - low) > 0
    zero = np.divide(-low * top, high - low, out=np.zeros_like(low), where=wide)
    stored_zero = quantized(_like(plain.scale, zero))
    zero = _numpy(_double(stored_zero.dequantize("float32")))
    # Where zero is off by its rounding, a larger step keeps the ends within half a step of the outermost codes.
    up = np.divide(high, top - zero + 0.5, out=np.zeros_like(high), where=wide)
    down = np.divide(-low, zero + 0.5, out=np.zeros_like(low), where=wide)
    needed = np.maximum((high - low) / top, np.maximum(up, down))
    return quantized(_like(plain.scale, _rounded_up(needed, meta_bits, meta_group))), stored_zero


def _rounded_up(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The numbers plus half a step of the grid that each group of them will have, so that rounding shrinks none."""
    size = len(x) if group == -1 else group
    first = np.arange(0, len(x), size)
    step = (np.maximum.reduceat(x, first) - np.minimum.reduceat(x, first)) / (2**bits - 1)
    raised: np.ndarray = x + np.repeat(step / 2, size)[: len(x)]
    return raised


def _double(x: Array) -> Array:
    return x.double() if is_torch(x) else x.astype(np.float64)


def _numpy(x: Array) -> Any:
    return x.cpu().numpy() if is_torch(x) else x


def _like(x: Array, values: np.ndarray) -> Array:
    """Float32 numbers in the library of x, and on its device."""
    narrow = values.astype(np.float32)
    return sys.modules["torch"].from_numpy(narrow).to(x.device) if is_torch(x) else narrow
