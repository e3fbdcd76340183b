"""A matrix on a uniform grid with nothing packed: what all targets write codes, scales and zero points from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..ops import QuantizedTensor
from ..ops._arrays import dtype_name

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Grid:
    """A matrix on a uniform grid: the value of a weight is ``(code - zero) * scale``, in float32.

    Attributes:
        codes: (rows, columns).
        scale: (rows, groups).
        zero: (rows, groups); ``None`` if the grid is symmetric.
        bits: bits of a code.
        group_size: columns of a group; the last group of a row may have fewer.
        scale_dtype: narrowest dtype that has all scales and zero points: "float16", "bfloat16" or "float32".
    """

    codes: Codes
    scale: Floats
    zero: Floats | None
    bits: int
    group_size: int
    scale_dtype: str

    @classmethod
    def of(cls, q: QuantizedTensor) -> Grid:
        """Return the grid of a stored matrix. Scales and zero points that are quantized themselves are dequantized."""
        rows, cols = q.shape
        scale, zero = (_floats(part, rows) for part in (q.scale, q.zero))
        assert scale is not None
        group_size = cols if q.group_size == -1 else q.group_size
        return cls(q.unpack().cpu().numpy(), scale, zero, q.bits, group_size, scale_dtype(q))

    def rows(self, which: npt.NDArray[np.int64]) -> Grid:
        """Return some of the rows, in the given order."""
        zero = None if self.zero is None else self.zero[which]
        return replace(self, codes=self.codes[which], scale=self.scale[which], zero=zero)

    @property
    def zeros(self) -> Floats:
        """Zero points, (rows, groups), those of a symmetric grid included."""
        return np.full_like(self.scale, symmetric_zero(self.bits)) if self.zero is None else self.zero

    def values(self) -> Floats:
        """Return the dequantized weights, with the same roundings as :func:`quantrature.ops.dequantize`."""
        found: Floats = (self.codes.astype(np.float32) - self.spread(self.zeros)) * self.spread(self.scale)
        return found

    def spread(self, parameters: Floats) -> Floats:
        """Repeat parameters of groups, (rows, groups), for the columns of the group."""
        found: Floats = np.repeat(parameters, self.group_size, axis=1)[:, : self.codes.shape[1]]
        return found

    def in_groups_of(self, size: int) -> Grid:
        """Return the same values in smaller groups. ``size`` must divide the columns and the group size."""
        if size == self.group_size:
            return self
        first = np.arange(0, self.codes.shape[1], size) // self.group_size
        zero = None if self.zero is None else self.zero[:, first]
        return replace(self, scale=self.scale[:, first], zero=zero, group_size=size)

    def in_bits(self, bits: int) -> Grid:
        """Return the same values in codes of more bits. A symmetric grid stays one, so its codes are shifted."""
        if self.zero is not None or bits == self.bits:
            return replace(self, bits=bits)
        shift = symmetric_zero(bits) - symmetric_zero(self.bits)
        return replace(self, codes=(self.codes + np.uint8(shift)).astype(np.uint8), bits=bits)

    def asymmetric(self) -> Grid:
        """Return the same values with stored zero points."""
        return replace(self, zero=self.zeros)

    def refit(self, weight: Floats) -> Grid:
        """Quantize ``weight`` again, on the nearest grid whose zero points are codes.

        A range that does not contain 0 is extended to 0. If it contains 0, the scale stays as it is.
        """
        top = np.float32((1 << self.bits) - 1)
        zeros = self.zeros.astype(np.float64)
        low, high = np.minimum(-zeros * self.scale, 0), np.maximum((top - zeros) * self.scale, 0)
        inside = (zeros >= 0) & (zeros <= top)
        scale = np.where(inside, self.scale, (high - low) / top).astype(np.float32)
        scale = torch.from_numpy(scale).to(getattr(torch, self.scale_dtype)).float().numpy()
        divisor = np.where(scale == 0, np.float32(1), scale)
        zero = np.clip(np.rint(np.where(inside, zeros, -low / divisor)), 0, top).astype(np.float32)
        codes = np.clip(np.rint(weight / self.spread(divisor) + self.spread(zero)), 0, top).astype(np.uint8)
        return replace(self, codes=codes, scale=scale, zero=zero)


def symmetric_zero(bits: int) -> float:
    """Zero point of a symmetric grid."""
    return 0.5 if bits == 1 else float(1 << (bits - 1))


def scale_dtype(q: QuantizedTensor) -> str:
    """Return the narrowest dtype that has all scales and zero points of a stored matrix."""
    return "float32" if isinstance(q.scale, QuantizedTensor) else dtype_name(q.scale)


def has_integer_zeros(q: QuantizedTensor) -> bool:
    """Whether every zero point of a stored matrix is a code."""
    if q.zero is None:
        return q.bits > 1
    zeros = _floats(q.zero, q.shape[0])
    assert zeros is not None
    return bool(((zeros == np.rint(zeros)) & (zeros >= 0) & (zeros < 1 << q.bits)).all())


def _floats(part: Any, rows: int) -> Floats | None:
    if part is None:
        return None
    values = part.dequantize("float32") if isinstance(part, QuantizedTensor) else part
    found: Floats = values.float().cpu().numpy().reshape(rows, -1)
    return found
