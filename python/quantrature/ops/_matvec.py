"""Multiply vectors with a quantized matrix, from its packed codes (contract: quantrature/matvec.hpp)."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from .. import _C
from ._arrays import FLOATS, Array, as_input, as_output, core_address, core_view, dtype_name, empty_like_kind, place
from ._codebook import CodebookTensor
from ._grid import QuantizedTensor
from ._outliers import SparseCSR

ACTIVATIONS = ("float32", "int8")
"""Values of the argument ``activations``, in the order of ``qtr_activations``."""

_ANY = range(1, 33)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A quantized matrix prepared for products. Make it with :meth:`of`, and keep it for several products.

    Attributes:
        dense: the quantized matrix, with scales and zero points as floats.
        residuals: float32 sparse matrix: outliers minus the values of ``dense`` at their positions; ``None`` if there
            are no outliers.
    """

    dense: QuantizedTensor | CodebookTensor
    residuals: SparseCSR | None

    @classmethod
    def of(cls, q: QuantizedTensor | CodebookTensor, outliers: SparseCSR | None = None) -> PackedMatrix:
        """Prepare ``q``, with ``outliers`` replacing its values at their positions. Codes are shared, not copied.

        Raises:
            InvalidArgumentError: for a grid with axis 0, a tensor that is not a matrix, or outliers of another shape.
        """
        axis = q.axis if isinstance(q, QuantizedTensor) else 1
        if len(q.shape) != 2 or axis != 1:
            raise _C.InvalidArgumentError(
                f"[matvec] q must be a matrix quantized along axis 1: got shape={q.shape}, axis={axis}"
            )
        if outliers is not None and outliers.shape != q.shape:
            raise _C.InvalidArgumentError(
                f"[matvec] outliers must have the shape of q: got shape={outliers.shape}, expected={q.shape}"
            )
        dense = _with_plain_numbers(q)
        if outliers is None or outliers.nnz == 0:
            return cls(dense, None)
        values = empty_like_kind(outliers.values, (outliers.nnz,), "float32")
        where = place("residuals", q=dense.codes, scale=dense.scale, **_beside_scales(dense), outliers=values)
        _C.residuals(*_arguments(dense), *_parts(outliers), core_view(values), where)
        return cls(dense, dataclasses.replace(outliers, values=values))

    def matvec(self, x: Array, out: Array | None = None, activations: str = "float32") -> Array:
        """Multiply; see :func:`matvec`."""
        return self._product(x, out, activations, "float32")

    def matmul(self, x: Array, out: Array | None = None, activations: str = "float32") -> Array:
        """Compute ``x @ W.T`` for any number of vectors, like ``torch.nn.functional.linear``.

        Each code is unpacked once per 16 vectors; the matrix is never dequantized as a whole. The result for a vector
        does not depend on the other vectors.

        Args:
            x: float32, float16 or bfloat16 (..., cols), contiguous.
            out: array for the result, float32 or of the dtype of ``x``; by default a new array of the library and dtype
                of ``x``.
            activations: as in :func:`matvec`.

        Returns:
            Array (..., rows). Sums are computed in float32 and rounded to the dtype of the result once.

        Raises:
            InvalidArgumentError: as for :func:`matvec`.
        """
        return self._product(x, out, activations, dtype_name(x))

    @functools.cached_property
    def core(self) -> _C.Product:
        """The product in the core, which has checked the arrays of the matrix and keeps them.

        Its ``multiply`` takes addresses and checks no array: :meth:`matmul` and :meth:`matvec` do.
        """
        sparse = (None, None, None) if self.residuals is None else _parts(self.residuals)
        return _C.Product(*_arguments(self.dense), *sparse)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have: the matrix without :attr:`core`, which each makes of its own arrays."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _product(self, x: Array, out: Array | None, activations: str, dtype: str) -> Array:
        if activations not in ACTIVATIONS:
            raise _C.InvalidArgumentError(
                f"[matvec] activations must be {' or '.join(ACTIVATIONS)}: got activations={activations!r}"
            )
        source = as_input(x, "matvec", "x", ndim=_ANY, empty=True, on_cuda=True)
        rows, cols = self.dense.shape
        if source.shape[-1] != cols:
            raise _C.InvalidArgumentError(
                f"[matvec] x must have as many numbers as q has columns: got shape={tuple(source.shape)}, cols={cols}"
            )
        shape = (*source.shape[:-1], rows)
        if out is None:
            out = empty_like_kind(x, shape, dtype)
        dtypes = ("float32",) if dtype == "float32" else ("float32", dtype)
        target = as_output(out, "matvec", "out", dtypes=dtypes, ndim=_ANY, empty=True, on_cuda=True)
        if tuple(target.shape) != shape:
            raise _C.InvalidArgumentError(
                f"[matvec] out must have a number for each row of q and vector: got shape={tuple(target.shape)}, "
                f"expected={shape}"
            )
        if 0 in shape:
            return out
        where = place("matvec", q=self.dense.codes, x=source, out=target)
        self.core.multiply(
            core_address(x, "matvec", "x"),
            FLOATS.index(dtype_name(x)),
            core_address(out, "matvec", "out"),
            FLOATS.index(dtype_name(out)),
            math.prod(shape[:-1]),
            ACTIVATIONS.index(activations),
            where,
        )
        return out


def matvec(
    q: QuantizedTensor | CodebookTensor | PackedMatrix,
    x: Array,
    outliers: SparseCSR | None = None,
    out: Array | None = None,
    activations: str = "float32",
) -> Array:
    """Multiply a quantized matrix with one or more vectors, from the packed codes.

    Args:
        q: matrix (rows, cols), quantized along axis 1 or to a codebook. If it has outliers or quantized scales, a
            :class:`PackedMatrix` saves the preparation for each call.
        x: float32, float16 or bfloat16, contiguous, (cols,) for one vector or (..., cols) for many.
        outliers: values that replace those of ``q`` at their positions; not with a :class:`PackedMatrix`, which
            contains them.
        out: float32 array for the result; by default a new array of the library of ``x``.
        activations: ``"float32"``, or ``"int8"``: round each 64 numbers of ``x`` to multiples of m / 127, where
            ``m`` is their largest magnitude. On a grid this is faster and adds at most
            ``m / 254 * abs(code - zero) * abs(scale)`` per weight to the error. With a codebook it is not faster and
            adds at most ``m / 254 * abs(value)``. Outliers are multiplied with unrounded ``x``.

    Returns:
        float32 (rows,) or (..., rows). The products are summed in float32. On a grid, the error is at most
        ``2**-23 * (cols / 8 + 32)`` times the sum of ``(code + abs(zero)) * abs(scale * x)`` and of
        ``abs(residual * x)``, plus ``2**-22`` times the sum of ``code * abs(scale) * m``. With a codebook, it is at
        most ``2**-23 * (cols / 8 + 32)`` times the sums of ``abs(value * x)`` and ``abs(residual * x)``. The result is
        the same for every number of threads, but not on every CPU. If ``x`` has infinities or NaN, it is not finite.

    Raises:
        InvalidArgumentError: for a grid with axis 0, a tensor that is not a matrix, outliers of another shape or
            together with a :class:`PackedMatrix`, an ``x`` of another dtype or length, an ``out`` of another shape or
            dtype, or an unknown value of ``activations``.
    """
    if isinstance(q, PackedMatrix):
        if outliers is not None:
            raise _C.InvalidArgumentError(
                "[matvec] outliers must be None if q is a PackedMatrix, which contains them: got both"
            )
        return q.matvec(x, out, activations)
    if not isinstance(q, QuantizedTensor | CodebookTensor):
        raise _C.InvalidArgumentError(
            "[matvec] q must be a QuantizedTensor, a CodebookTensor or a PackedMatrix: got "
            f"{type(q).__module__}.{type(q).__qualname__}"
        )
    return PackedMatrix.of(q, outliers).matvec(x, out, activations)


def _plain(values: Any) -> Any:
    """Dequantize scales or zero points, if they are quantized."""
    return values.dequantize("float32") if isinstance(values, QuantizedTensor) else values


def _with_plain_numbers(q: QuantizedTensor | CodebookTensor) -> QuantizedTensor | CodebookTensor:
    if isinstance(q, CodebookTensor):
        return dataclasses.replace(q, scale=_plain(q.scale))
    return dataclasses.replace(q, scale=_plain(q.scale), zero=_plain(q.zero))


def _beside_scales(dense: QuantizedTensor | CodebookTensor) -> dict[str, Array | None]:
    return {"table": dense.table} if isinstance(dense, CodebookTensor) else {"zero": dense.zero}


def _arguments(
    dense: QuantizedTensor | CodebookTensor,
) -> tuple[Array, int, int, int, Array | None, Array | None, Array | None]:
    beside = _beside_scales(dense)
    scale, zero = (None if part is None else _one_row(part) for part in (dense.scale, beside.get("zero")))
    table = None if "table" not in beside else core_view(beside["table"])
    return core_view(dense.codes), dense.shape[1], dense.bits, dense.group_size or 0, scale, zero, table


def _parts(sparse: SparseCSR) -> tuple[Array, Array, Array]:
    return core_view(sparse.values), core_view(sparse.columns), core_view(sparse.core_row_offsets())


def _one_row(values: Array) -> Array:
    return core_view(values.reshape(-1))
