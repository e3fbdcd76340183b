"""Quantization grids (contract: quantrature/grid.hpp)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from .. import _C
from ._arrays import (
    FLOATS,
    Array,
    as_input,
    as_output,
    consecutive_rows,
    core_view,
    device_of,
    dtype_name,
    empty_like_kind,
    place,
)
from ._codebook import CodebookTensor, decode, encode
from ._meta import with_quantized_scales
from ._packing import groups_in_row, unpack

SOLVERS = {"minmax": 0, "mse": 1, "hqq": 2, "hqq-scale-free": 3}
"""Names of the solvers that :func:`quantize` knows."""

_GIVEN = 4

_SMALLEST_HALF = 2.0**-14
_LARGEST_HALF = 65504.0
_LARGEST_HALF_ZERO = 1024.0


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix or vector as packed codes, scales and zeros: a value is ``(code - zero) * scale`` in float32.

    Attributes:
        codes: uint8 of shape (rows, row_bytes), packed (see :func:`quantrature.ops.pack`); the rows are those of the
            matrix for axis 1, and of its view of group_size rows for axis 0.
        scale: float16 or float32 of shape (rows, groups) for axis 1 and (groups,) for axis 0, or a
            :class:`QuantizedTensor` of that many numbers in one row.
        zero: the same in units of a code; ``None`` if sym, where it is ``2**(bits - 1)``, or 0.5 at 1 bit.
        bits, group_size, axis, sym: as given to :func:`quantize`.
        shape: of what was quantized.
        dtype: of what was quantized: "float32", "float16" or "bfloat16".
    """

    codes: Array
    scale: Any
    zero: Any
    bits: int
    group_size: int
    axis: int
    sym: bool
    shape: tuple[int, ...]
    dtype: str

    def unpack(self) -> Array:
        """The codes, one uint8 each, in the shape of what was quantized."""
        cols = self.numel // self.codes.shape[0]
        return unpack(self.codes, self.bits, cols).reshape(self.shape)

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> Array:
        """The numbers that the codes stand for; see :func:`dequantize`.

        Args:
            dtype: as there.
            rows: only these, following each other; a matrix with groups along its rows (axis 1) alone.

        Raises:
            InvalidArgumentError: as there, and for other rows.
        """
        return dequantize(self if rows is None else self._of_rows(rows), dtype)

    def _of_rows(self, rows: slice) -> QuantizedTensor:
        if self.axis != 1 or len(self.shape) != 2:
            raise _C.InvalidArgumentError(
                f"[dequantize] rows need a matrix with groups along axis 1: got axis={self.axis}, shape={self.shape}"
            )
        rows = consecutive_rows(rows, self.shape[0], "dequantize")

        def part(values: Any) -> Any:
            if isinstance(values, QuantizedTensor):
                values = values.dequantize("float32")
            return None if values is None else values.reshape(self.shape[0], -1)[rows]

        return replace(
            self,
            codes=self.codes[rows],
            scale=part(self.scale),
            zero=part(self.zero),
            shape=(rows.stop - rows.start, self.shape[1]),
        )

    @property
    def numel(self) -> int:
        """How many numbers were quantized."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""
        return int(self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes))

    @property
    def bits_per_weight(self) -> float:
        """Bits as stored, scales and zeros included, divided by the numbers they stand for."""
        return 8 * self.nbytes / self.numel


@overload
def quantize(
    w: Array,
    bits: int,
    group_size: int = ...,
    *,
    sym: bool = ...,
    axis: int = ...,
    solver: str = ...,
    round_zero: bool | None = ...,
    meta_bits: int | None = ...,
    meta_group: int = ...,
    scale_dtype: str = ...,
    exclude: Any = ...,
    codebook: None = ...,
) -> QuantizedTensor: ...


@overload
def quantize(
    w: Array,
    bits: int,
    group_size: int | None = ...,
    *,
    meta_bits: int | None = ...,
    meta_group: int = ...,
    scale_dtype: str = ...,
    exclude: Any = ...,
    codebook: str | Array,
) -> CodebookTensor: ...


def quantize(
    w: Array,
    bits: int,
    group_size: int | None = 64,
    *,
    sym: bool = False,
    axis: int = 1,
    solver: str = "minmax",
    round_zero: bool | None = None,
    meta_bits: int | None = None,
    meta_group: int = 128,
    scale_dtype: str = "auto",
    exclude: Any = None,
    codebook: str | Array | None = None,
) -> QuantizedTensor | CodebookTensor:
    """Quantize ``w`` to codes with a scale and a zero for each group, or to entries of a codebook.

    Args:
        w: float32, float16 or bfloat16, one or two dimensions, contiguous, finite; a vector is one row.
        bits: of a code, 1 to 8.
        group_size: weights of a group, the last one of a row possibly shorter; -1 for one group a row (axis 1) or a
            column (axis 0). With a codebook, ``None`` does without scales: the table has the unit of the weights.
        sym: a grid around 0, without stored zeros (the convention of GPTQ, arXiv 2210.17323).
        axis: 1 for groups along each row. 0 for the columns of ``w`` read as a matrix of group_size rows, as the hqq
            package means it; there group_size must divide the size of ``w``.
        solver: "minmax", from the smallest to the largest weight of a group; "mse", that range times 1, 0.99, ...,
            0.21, with the least squared error; "hqq", the half-quadratic solver for the zero (Badri & Shaji 2023; p
            0.7, at most 20 iterations), not with sym; "hqq-scale-free", hqq without its two absolute limits (inverse
            scales of at most 20000, and shrinkage of errors above 1/8), which gives the same codes for ``c * w`` as for
            ``w``, and those of hqq for weights of the usual size.
        round_zero: make the zero an integer (hqq: at the start). By default only for hqq at 4 bits.
        meta_bits: quantize scales and zeros in turn, each to codes of this many bits by minmax. Where that would
            increase the error of ``w`` noticeably (by more than 1 %), codes are found again on grids that contain
            zero; where the error would still be 6 % larger (at 8 bits and groups of 64; more is accepted at fewer bits
            and in smaller groups), scales and zeros are not quantized.
        meta_group: scales, or zeros, of a group of those; -1 for all of them.
        scale_dtype: of the stored scales and zeros (with meta_bits, of their scales and zeros): "float16", "float32",
            or "auto" for float16 where all scales are normal numbers of float16 and all zeros at most 1024. Codes are
            found before this rounding.
        exclude: positions that are stored otherwise, an object with ``row_offsets`` and ``columns`` such as a
            SparseCSR. They do not take part in the fit, and get the code of the nearest number in the range of the rest
            of their group. With a codebook they get the code of the nearest entry.
        codebook: in place of a grid, "nf4" or "fp4" (the tables of QLoRA, arXiv 2305.14314, and of the package
            bitsandbytes; 4 bits), or an array of the library of ``w``, float16 or float32, of shape (2**bits,), or
            (rows, 2**bits) for a table for each row. Each weight, in units of the largest of its group, gets the
            nearest entry, of two equally near ones the lower. Goes without sym, axis, solver and round_zero.

    Returns:
        :class:`QuantizedTensor`, or with a codebook :class:`CodebookTensor`, with arrays of the same library as ``w``.
        The same bits on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for an argument outside of the above, another dtype, an empty or non-contiguous array, a
            NaN or infinity, naming its position, and scales that float16 was asked to hold and cannot.
    """
    if codebook is not None and (sym or axis != 1 or solver != "minmax" or round_zero is not None):
        raise _C.InvalidArgumentError("[quantize] a codebook goes without sym, axis, solver and round_zero")
    if group_size is None and codebook is None:
        raise _C.InvalidArgumentError("[quantize] group_size must be an integer: got group_size=None")
    group = 0 if group_size is None else group_size
    for name, value in (("bits", bits), ("group_size", group), ("axis", axis), ("meta_group", meta_group)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise _C.InvalidArgumentError(f"[quantize] {name} must be an integer: got {name}={value!r}")
    source = as_input(w, "quantize", "w", on_cuda=True)
    check_grid("quantize", bits, -1 if group_size is None else group, axis)
    if solver not in SOLVERS:
        raise _C.InvalidArgumentError(f"[quantize] solver must be one of {', '.join(SOLVERS)}: got solver={solver!r}")
    if meta_bits is not None and (isinstance(meta_bits, bool) or meta_bits not in range(1, 9)):
        raise _C.InvalidArgumentError(f"[quantize] meta_bits must be None or 1 to 8: got meta_bits={meta_bits!r}")
    if meta_group != -1 and meta_group < 1:
        raise _C.InvalidArgumentError(f"[quantize] meta_group must be -1 or at least 1: got meta_group={meta_group}")
    if scale_dtype not in ("auto", "float16", "float32"):
        raise _C.InvalidArgumentError(
            f"[quantize] scale_dtype must be auto, float16 or float32: got scale_dtype={scale_dtype!r}"
        )

    excluded = positions("quantize", exclude, w)

    def quantized(part: Array) -> QuantizedTensor:
        assert meta_bits is not None
        return quantize(part, meta_bits, meta_group, scale_dtype=scale_dtype)

    if codebook is not None:
        coded = encode(w, int(bits), None if group_size is None else int(group), codebook, excluded)
        if coded.scale is not None and meta_bits is not None:
            coded = with_quantized_scales(
                w, coded, quantized, None, meta_bits, meta_group, group if group > 0 else int(w.shape[-1]), excluded
            )
        if coded.scale is None or isinstance(coded.scale, QuantizedTensor):
            return coded
        return replace(coded, scale=narrow(coded.scale, None, scale_dtype)[0])
    grid = _Grid(w, source, int(bits), int(group), int(axis), bool(sym), excluded)
    q = grid.fitted(solver, solver == "hqq" and bits == 4 if round_zero is None else bool(round_zero))
    if meta_bits is not None:
        q = with_quantized_scales(w, q, quantized, grid.given, meta_bits, meta_group, grid.length, excluded)
    if isinstance(q.scale, QuantizedTensor):
        return q
    scale, zero = narrow(q.scale, q.zero, scale_dtype)
    return replace(q, scale=scale, zero=zero)


@dataclass(frozen=True)
class _Grid:
    """A matrix to be quantized, and the settings of its grid.

    Attributes:
        w: the matrix.
        source: what the core reads of it.
        bits, group_size, axis, sym: as of :func:`quantize`.
        excluded: row offsets and columns of weights that are not fitted.
    """

    w: Array
    source: Array
    bits: int
    group_size: int
    axis: int
    sym: bool
    excluded: tuple[Array | None, Array | None]

    def fitted(self, solver: str, round_zero: bool) -> QuantizedTensor:
        """The matrix on the grid that a solver fits to it, with float32 scales and zeros."""
        shape = self._layout()[2]
        scale = empty_like_kind(self.w, shape, "float32")
        zero = None if self.sym else empty_like_kind(self.w, shape, "float32")
        return self._tensor(self._codes(scale, zero, SOLVERS[solver], round_zero), scale, zero)

    def given(self, scale: QuantizedTensor, zero: QuantizedTensor | None) -> QuantizedTensor:
        """The matrix on the grid of quantized scales and zeros."""
        shape = self._layout()[2]
        plain = [None if part is None else part.dequantize("float32").reshape(shape) for part in (scale, zero)]
        return self._tensor(self._codes(plain[0], plain[1], _GIVEN, False), scale, zero)

    @property
    def length(self) -> int:
        """Weights of a group, the last one of a row apart."""
        shape = tuple(self.w.shape)
        along = shape[-1] if self.axis == 1 or len(shape) == 1 else shape[0]
        return (
            int(along)
            if self.group_size == -1
            else min(self.group_size, int(along))
            if self.axis == 1
            else self.group_size
        )

    def _layout(self) -> tuple[int, int, tuple[int, ...]]:
        return layout(tuple(self.w.shape), self.group_size, self.axis, "quantize")

    def _codes(self, scale: Array, zero: Array | None, solver: int, round_zero: bool) -> Array:
        """Packed codes; scale and zero are written, or read where the grid is given."""
        rows, cols, _ = self._layout()
        codes = empty_like_kind(self.w, (rows, _C.row_bytes(cols, self.bits)), "uint8")
        offsets, columns = self.excluded
        _C.quantize(
            core_view(self.source),
            self.bits,
            self.group_size,
            self.axis,
            self.sym,
            solver,
            round_zero,
            None if offsets is None else core_view(offsets),
            None if columns is None else core_view(columns),
            core_view(codes),
            core_view(scale),
            None if zero is None else core_view(zero),
            place("quantize", w=self.source),
        )
        return codes

    def _tensor(self, codes: Array, scale: Any, zero: Any) -> QuantizedTensor:
        shape = tuple(int(n) for n in self.w.shape)
        return QuantizedTensor(
            codes, scale, zero, self.bits, self.group_size, self.axis, self.sym, shape, dtype_name(self.w)
        )


def dequantize(q: QuantizedTensor | CodebookTensor, dtype: str | None = None, out: Array | None = None) -> Array:
    """The numbers that the codes of ``q`` stand for, made in float32 and rounded to dtype.

    On a grid ``(code - zero) * scale``, of a codebook ``table[code] * scale``.

    Args:
        q: what :func:`quantize` made.
        dtype: "float32", "float16" or "bfloat16" (NumPy: needs ml_dtypes); by default that of ``out``, else of what was
            quantized.
        out: where to write, contiguous and of the shape of ``q``.

    Returns:
        ``out``, or a new array of the library of ``q``.

    Raises:
        InvalidArgumentError: for another dtype, an ``out`` that does not fit, or parts of ``q`` that do not go
            together.
    """
    name = dtype if dtype is not None else (dtype_name(out) if out is not None else q.dtype)
    if name not in FLOATS:
        raise _C.InvalidArgumentError(f"[dequantize] dtype must be {' or '.join(FLOATS)}: got dtype={name}")
    if out is None:
        out = empty_like_kind(q.codes, q.shape, name)
    target = as_output(out, "dequantize", "out", dtypes=(name,), on_cuda=True)
    if tuple(out.shape) != tuple(q.shape):
        raise _C.InvalidArgumentError(
            f"[dequantize] out must have the shape of q: got shape={tuple(out.shape)}, expected {tuple(q.shape)}"
        )
    if isinstance(q, CodebookTensor):
        return decode(q, out)
    check_grid("dequantize", q.bits, q.group_size, q.axis)
    scale, zero = (
        x if x is None else dequantize(x, "float32") if isinstance(x, QuantizedTensor) else x for x in (q.scale, q.zero)
    )
    halves = ("float32", "float16")
    codes = as_input(q.codes, "dequantize", "codes", dtypes=("uint8",), ndim=(2,), on_cuda=True)
    scale = as_input(scale, "dequantize", "scale", dtypes=halves, on_cuda=True)
    zero = None if zero is None else as_input(zero, "dequantize", "zero", dtypes=halves, on_cuda=True)
    if (zero is None) != q.sym:
        raise _C.InvalidArgumentError(f"[dequantize] zero must be there if and only if q is not sym: got sym={q.sym}")
    _C.dequantize(
        core_view(codes),
        q.bits,
        q.group_size,
        q.axis,
        core_view(scale),
        None if zero is None else core_view(zero),
        core_view(target),
        place("dequantize", codes=codes, scale=scale, zero=zero, out=target),
    )
    return out


def check_grid(op: str, bits: int, group_size: int, axis: int) -> None:
    if not 1 <= bits <= 8:
        raise _C.InvalidArgumentError(f"[{op}] bits must be 1 to 8: got bits={bits}")
    if group_size != -1 and group_size < 1:
        raise _C.InvalidArgumentError(f"[{op}] group_size must be -1 or at least 1: got group_size={group_size}")
    if axis not in (0, 1):
        raise _C.InvalidArgumentError(f"[{op}] axis must be 0 or 1: got axis={axis}")


def layout(shape: tuple[int, ...], group_size: int, axis: int, op: str) -> tuple[int, int, tuple[int, ...]]:
    """Rows and columns of the packed matrix, and the shape of scales and zeros."""
    rows, cols = shape if len(shape) == 2 else (1, shape[0])
    if axis == 1:
        return rows, cols, (rows, groups_in_row(cols, group_size))
    group = rows if group_size == -1 else group_size
    if rows * cols % group:
        raise _C.InvalidArgumentError(
            f"[{op}] group_size must divide the size on axis 0: got group_size={group}, rows={rows}, cols={cols}"
        )
    return group, rows * cols // group, (rows * cols // group,)


def positions(op: str, exclude: Any, w: Array) -> tuple[Array | None, Array | None]:
    """Row offsets and columns of positions of ``w`` to exclude, as the core reads them."""
    if exclude is None:
        return None, None
    if not (hasattr(exclude, "row_offsets") and hasattr(exclude, "columns")):
        kind = f"{type(exclude).__module__}.{type(exclude).__qualname__}"
        raise _C.InvalidArgumentError(f"[{op}] exclude must have row_offsets and columns: got {kind}")
    if device_of(w) is not None:
        torch = sys.modules["torch"]
        offsets = torch.as_tensor(exclude.row_offsets).to(w.device, torch.int64).contiguous()
        columns = torch.as_tensor(exclude.columns).to(w.device, torch.int32).contiguous()
        if offsets.ndim != 1 or columns.ndim != 1 or len(offsets) == 0 or int(offsets[-1]) != len(columns):
            raise _C.InvalidArgumentError(f"[{op}] exclude must have as many columns as its last row_offset says")
        return offsets, columns
    return (
        np.ascontiguousarray(np.asarray(exclude.row_offsets), dtype=np.int64),
        np.ascontiguousarray(np.asarray(exclude.columns), dtype=np.int32),
    )


def narrow(scale: Array, zero: Array | None, dtype: str) -> tuple[Array, Array | None]:
    """Scales and zeros as they are stored."""
    if dtype == "float32":
        return scale, zero
    half_scale, smallest, largest = _half(scale)
    half_zero, largest_zero = None, 0.0
    if zero is not None:
        half_zero, _, largest_zero = _half(zero)
    if dtype == "auto":
        normal = smallest >= _SMALLEST_HALF and largest <= _LARGEST_HALF
        return (half_scale, half_zero) if normal and largest_zero <= _LARGEST_HALF_ZERO else (scale, zero)
    if not max(largest, largest_zero) <= _LARGEST_HALF:
        raise _C.InvalidArgumentError(
            f"[quantize] scale_dtype float16 must hold every scale and zero: got largest={max(largest, largest_zero):g}"
        )
    return half_scale, half_zero


def _half(x: Array) -> tuple[Array, float, float]:
    """x in float16, and the least magnitude that is not 0 and the largest in x."""
    if device_of(x) is not None:
        magnitudes = x.abs()
        smallest = magnitudes.masked_fill(magnitudes == 0, math.inf).min()
        return x.half(), float(smallest), float(magnitudes.max())
    half = empty_like_kind(x, tuple(x.shape), "float16")
    return half, *_C.round_to_half(core_view(x), core_view(half))
