"""Products of a packed matrix and vectors (contract: quantrature/matvec.hpp)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _C
from .._arrays import Array, as_input, as_output, core_view, empty_like_kind
from ._grid import QuantizedTensor
from ._outliers import SparseCSR


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A quantized matrix ready to be multiplied; made by :meth:`of`, and worth keeping from one product to the next.

    Attributes:
        grid: the matrix on its grid, whose scales and zeros are floats.
        residuals: float32: what its outliers add to the values of the grid; ``None`` if there are no outliers.
    """

    grid: QuantizedTensor
    residuals: SparseCSR | None

    @classmethod
    def of(cls, q: QuantizedTensor, outliers: SparseCSR | None = None) -> PackedMatrix:
        """Prepare ``q``, at whose places ``outliers`` has the values instead; the codes are shared, not copied.

        Raises:
            InvalidArgumentError: for a grid of axis 0, a tensor that is no matrix, or outliers of another shape.
        """
        if len(q.shape) != 2 or q.axis != 1:
            raise _C.InvalidArgumentError(
                f"[matvec] q must be a matrix quantized along axis 1: got shape={q.shape}, axis={q.axis}"
            )
        if outliers is not None and outliers.shape != q.shape:
            raise _C.InvalidArgumentError(
                f"[matvec] outliers must have the shape of q: got shape={outliers.shape}, expected={q.shape}"
            )
        grid = dataclasses.replace(q, scale=_plain(q.scale), zero=_plain(q.zero))
        if outliers is None or outliers.nnz == 0:
            return cls(grid, None)
        values = empty_like_kind(outliers.values, (outliers.nnz,), "float32")
        _C.residuals(*_arguments(grid), *_parts(outliers), core_view(values))
        return cls(grid, dataclasses.replace(outliers, values=values))

    def matvec(self, x: Array, out: Array | None = None) -> Array:
        """Multiply; see :func:`matvec`."""
        source = as_input(x, "matvec", "x")
        rows, cols = self.grid.shape
        if source.shape[-1] != cols:
            raise _C.InvalidArgumentError(
                f"[matvec] x must have as many numbers as q has columns: got shape={tuple(source.shape)}, cols={cols}"
            )
        shape = (*source.shape[:-1], rows)
        if out is None:
            out = empty_like_kind(x, shape, "float32")
        target = as_output(out, "matvec", "out", dtypes=("float32",))
        if tuple(target.shape) != shape:
            raise _C.InvalidArgumentError(
                f"[matvec] out must have a number for each row of q and vector: got shape={tuple(target.shape)}, "
                f"expected={shape}"
            )
        none = (None, None, None)
        values, columns, offsets = none if self.residuals is None else _parts(self.residuals)
        _C.matvec(*_arguments(self.grid), values, columns, offsets, core_view(source), core_view(target))
        return out


def matvec(
    q: QuantizedTensor | PackedMatrix, x: Array, outliers: SparseCSR | None = None, out: Array | None = None
) -> Array:
    """The product of a quantized matrix and one or a few vectors, from the packed codes.

    Args:
        q: a matrix of shape (rows, cols), quantized along axis 1; a :class:`PackedMatrix` saves the preparation where
            the matrix has outliers or meta-quantized scales.
        x: float32, float16 or bfloat16, contiguous, of shape (cols,), or (n, cols) for n vectors.
        outliers: values that stand in place of those of the grid; not with a :class:`PackedMatrix`, which has them.
        out: where the result goes: float32, of its shape. A new array, of the library of ``x``, if not given.

    Returns:
        float32 of shape (rows,) or (n, rows). The products are summed in float32; against the exact result the error
        is at most ``2**-23 * (cols / 8 + 32)`` times the sum of ``(code + abs(zero)) * abs(scale * x)`` and of
        ``abs(residual * x)``. It is the same for every number of threads, not on every CPU.

    Raises:
        InvalidArgumentError: for a grid of axis 0, a tensor that is no matrix, outliers of another shape or beside a
            :class:`PackedMatrix`, an ``x`` of another dtype or length, or an ``out`` that does not fit.
    """
    if isinstance(q, PackedMatrix):
        if outliers is not None:
            raise _C.InvalidArgumentError("[matvec] outliers must be part of the PackedMatrix: got both")
        return q.matvec(x, out)
    if not isinstance(q, QuantizedTensor):
        raise _C.InvalidArgumentError(
            f"[matvec] q must be a QuantizedTensor or a PackedMatrix: got {type(q).__module__}.{type(q).__qualname__}"
        )
    return PackedMatrix.of(q, outliers).matvec(x, out)


def _plain(values: Any) -> Any:
    """Scales or zeros without a grid of their own."""
    return values.dequantize("float32") if isinstance(values, QuantizedTensor) else values


def _arguments(grid: QuantizedTensor) -> tuple[np.ndarray, int, int, int, np.ndarray, np.ndarray | None]:
    zero = None if grid.zero is None else _one_row(grid.zero)
    return core_view(grid.codes), grid.shape[1], grid.bits, grid.group_size, _one_row(grid.scale), zero


def _parts(sparse: SparseCSR) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return core_view(sparse.values), core_view(sparse.columns), sparse.core_row_offsets()


def _one_row(values: Array) -> np.ndarray:
    view: np.ndarray = core_view(values).reshape(-1)
    return view
