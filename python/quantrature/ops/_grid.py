"""Quantization to uniform grids: a scale and a zero point per group (contract: quantrature/grid.hpp)."""

from __future__ import annotations

import functools
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
"""Values of the argument ``solver`` of :func:`quantize`."""

_GIVEN = 4

_SMALLEST_HALF = 2.0**-14
_LARGEST_HALF = 65504.0
_LARGEST_HALF_ZERO = 1024.0


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix or vector quantized to a grid: the value of a code is ``(code - zero) * scale`` in float32.

    Attributes:
        codes: uint8 (rows, row_bytes), packed (see :func:`quantrature.ops.pack`). For axis 1, rows are the rows of the
            matrix; for axis 0, the rows of its view with ``group_size`` rows.
        scale: float16, bfloat16 or float32, (rows, groups) for axis 1 and (groups,) for axis 0; or a
            :class:`QuantizedTensor` with the same number of values in one row.
        zero: zero point in units of codes, stored like ``scale``; ``None`` if ``sym``: it is then ``2**(bits - 1)``, or
            0.5 at 1 bit.
        bits, group_size, axis, sym: as given to :func:`quantize`.
        shape: shape of the original tensor.
        dtype: dtype of the original tensor: "float32", "float16" or "bfloat16".
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
        """Return the codes as uint8, in the shape of the original tensor."""
        cols = self.numel // self.codes.shape[0]
        return unpack(self.codes, self.bits, cols).reshape(self.shape)

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> Array:
        """Dequantize all rows, or a slice of them; see :func:`dequantize`.

        Args:
            dtype: "float32", "float16" or "bfloat16"; by default the dtype of the original tensor.
            rows: slice of consecutive rows, only for a matrix with axis 1; by default all.

        Raises:
            InvalidArgumentError: as for ``dequantize``, and for an invalid slice.
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
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of codes, scales and zero points."""
        return int(self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with scales and zero points."""
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
    zero: str = "float",
    exclude: Any = None,
    codebook: str | Array | None = None,
) -> QuantizedTensor | CodebookTensor:
    """Quantize ``w`` to codes with a scale and a zero point per group, or to the entries of a codebook.

    Args:
        w: float32, float16 or bfloat16, one or two dimensions, contiguous, finite; a vector is one row.
        bits: bits per code, 1 to 8.
        group_size: number of consecutive weights that share one scale; the last group of a row may be shorter. -1 for
            one group per row (axis 1) or column (axis 0). With a codebook, ``None`` stores no scales: the table then
            holds unscaled values.
        sym: quantize symmetrically around 0, without stored zero points (the convention of GPTQ, arXiv 2210.17323).
        axis: 1 for groups along each row. 0 for groups as in the hqq package: the columns of ``w`` reshaped to
            ``group_size`` rows; ``group_size`` must divide the size of ``w``.
        solver: how the range of a group is chosen. "minmax": from the smallest to the largest weight. "mse": the
            minmax range times 1, 0.99, ..., 0.21, whichever has the least squared error. "hqq": the half-quadratic
            solver for the zero point (Badri & Shaji 2023; p 0.7, at most 20 iterations), not with ``sym``.
            "hqq-scale-free": hqq without its two absolute limits (inverse scales of at most 20000, and shrinkage of
            errors above 1/8). It gives the same codes for ``c * w`` as for ``w``, and the codes of hqq for weights of
            the usual size.
        round_zero: round zero points to integers (hqq: at the start). Default: only for hqq at 4 bits.
        meta_bits: quantize scales and zero points, too, to this many bits, by minmax. If this increases the error of
            ``w`` by more than 1 %, codes are computed again on grids that contain zero. If the error is still 6 %
            larger, scales and zero points are not quantized. (6 % is for 8 bits and groups of 64; with fewer bits or
            smaller groups, more is accepted.)
        meta_group: group size for quantizing scales and zero points; -1 for one group.
        scale_dtype: dtype of the stored scales and zero points (with ``meta_bits``, of the second-level ones).
            "float32", "float16" or "bfloat16": scales and zero points are rounded to it before codes are computed.
            "e8m0": scales are powers of two, as in microscaling formats, stored as bfloat16; needs ``sym`` or
            ``zero="integer"``. "auto": float16 if all scales are normal numbers of float16 and all zero points at
            most 1024, else float32; codes are computed before this rounding.
        zero: "float", or "integer": zero points are integers from 0 to ``2**bits - 1``, as most inference engines need
            them. The range of each group then contains 0. Not with ``sym`` and ``meta_bits``.
        exclude: positions of outliers, which are stored elsewhere: an object with ``row_offsets`` and ``columns`` such
            as a SparseCSR. They do not affect scales and zero points. They get the nearest code in the range of the
            rest of their group, or with a codebook the code of the nearest entry.
        codebook: instead of a grid: "nf4" or "fp4" (the 4-bit tables of QLoRA, arXiv 2305.14314, and bitsandbytes); or
            an array of the library of ``w``, float16 or float32, (2**bits,), or (rows, 2**bits) with one table per
            row. Each weight, divided by the largest magnitude in its group, gets the nearest entry; if two are equally
            near, the lower one. Not with ``sym``, ``axis``, ``solver`` and ``round_zero``.

    Returns:
        :class:`QuantizedTensor`, or with a codebook :class:`CodebookTensor`, with arrays of the library of ``w``. The
        result is bit-identical on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for an invalid argument, dtype, an empty or non-contiguous array, a NaN or infinity (the
            message names its position), and scales out of the range of float16 with ``scale_dtype="float16"``.
    """
    if codebook is not None and (sym or axis != 1 or solver != "minmax" or round_zero is not None or zero != "float"):
        raise _C.InvalidArgumentError(
            "[quantize] a codebook cannot be combined with sym, axis, solver, round_zero or zero: remove them"
        )
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
    number_format = NumberFormat(zero, scale_dtype)
    number_format.check("quantize", sym, meta_bits, codebook is not None)

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
    grid = _Grid(w, source, int(bits), int(group), int(axis), bool(sym), number_format, excluded)
    rounds = solver == "hqq" and bits == 4 if round_zero is None else bool(round_zero)
    if meta_bits is None:
        return grid.fitted(solver, rounds)
    plain = replace(grid, format=NumberFormat()).fitted(solver, rounds, "float32")
    q: QuantizedTensor = with_quantized_scales(
        w, plain, quantized, grid.given, meta_bits, meta_group, grid.length, excluded
    )
    if isinstance(q.scale, QuantizedTensor):
        return q
    scales, zeros = narrow(q.scale, q.zero, scale_dtype)
    return replace(q, scale=scales, zero=zeros)


SCALE_DTYPES = ("auto", "float32", "float16", "bfloat16", "e8m0")
ZEROS = ("float", "integer")


@dataclass(frozen=True)
class NumberFormat:
    """Which numbers zero points and scales can be.

    Attributes:
        zero, scale_dtype: as of :func:`quantize`.
    """

    zero: str = "float"
    scale_dtype: str = "auto"

    def complaint(self, sym: bool, meta_bits: int | None, codebook: bool = False) -> str | None:
        """What is wrong with the values, alone or together with other settings; ``None`` if nothing is."""
        for name, value, known in (("zero", self.zero, ZEROS), ("scale_dtype", self.scale_dtype, SCALE_DTYPES)):
            if value not in known:
                return f"{name} must be one of {', '.join(known)}: got {name}={value!r}"
        new = self.zero == "integer" or self.scale_dtype in ("bfloat16", "e8m0")
        if self.zero == "integer" and sym:
            return "zero must be float with sym, which stores no zero points"
        if meta_bits is not None and new:
            return f"meta_bits must be None with zero integer and with scale_dtype bfloat16 or e8m0: got {meta_bits=}"
        if self.scale_dtype == "e8m0" and not (sym or self.zero == "integer"):
            return "scale_dtype e8m0 needs sym or zero integer"
        if codebook and new:
            return f"scale_dtype must be auto, float16 or float32 with a codebook: got {self.scale_dtype}"
        return None

    def check(self, op: str, sym: bool, meta_bits: int | None, codebook: bool = False) -> None:
        """Raise an InvalidArgumentError if :meth:`complaint` has something to say."""
        wrong = self.complaint(sym, meta_bits, codebook)
        if wrong is not None:
            raise _C.InvalidArgumentError(f"[{op}] {wrong}")

    @property
    def of_core(self) -> tuple[bool, int]:
        """The same for the core: whether zero points are integers, and the number of a ``qtr_scale_format``."""
        return self.zero == "integer", max(0, SCALE_DTYPES.index(self.scale_dtype) - 1)


@dataclass(frozen=True)
class _Grid:
    """A matrix to be quantized, and the settings of its grid.

    Attributes:
        w: the matrix.
        source: what the core reads of it.
        bits, group_size, axis, sym: as of :func:`quantize`.
        format: which numbers zero points and scales can be.
        excluded: row offsets and columns of weights that are not fitted.
    """

    w: Array
    source: Array
    bits: int
    group_size: int
    axis: int
    sym: bool
    format: NumberFormat
    excluded: tuple[Array | None, Array | None]

    def fitted(self, solver: str, round_zero: bool, stored: str | None = None) -> QuantizedTensor:
        """The matrix on the grid that a solver fits to it; ``stored``: dtype of its scales, if not of the format."""
        shape = self._layout[2]
        scale = empty_like_kind(self.w, shape, "float32")
        zero = None if self.sym else empty_like_kind(self.w, shape, "float32")
        codes = self._codes(scale, zero, SOLVERS[solver], round_zero)
        return self._tensor(codes, *narrow(scale, zero, stored or self.format.scale_dtype))

    def given(self, scale: QuantizedTensor, zero: QuantizedTensor | None) -> QuantizedTensor:
        """The matrix on the grid of quantized scales and zeros."""
        shape = self._layout[2]
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

    @functools.cached_property
    def _layout(self) -> tuple[int, int, tuple[int, ...]]:
        return layout(tuple(self.w.shape), self.group_size, self.axis, "quantize")

    def _codes(self, scale: Array, zero: Array | None, solver: int, round_zero: bool) -> Array:
        """Packed codes; scale and zero are written, or read where the grid is given."""
        rows, cols, _ = self._layout
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
            *(self.format.of_core if solver != _GIVEN else NumberFormat().of_core),
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
    """Dequantize: compute the values of the codes in float32 and round them to ``dtype``.

    On a grid, the value is ``(code - zero) * scale``; with a codebook, ``table[code] * scale``.

    Args:
        q: result of :func:`quantize`.
        dtype: "float32", "float16" or "bfloat16" (NumPy: needs ml_dtypes); by default the dtype of ``out``, else of the
            original tensor.
        out: array to write to, contiguous and of the shape of ``q``; by default a new array.

    Returns:
        ``out``, or a new array of the library of ``q``.

    Raises:
        InvalidArgumentError: for another dtype, an ``out`` of another shape, or inconsistent parts of ``q``.
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
    codes = as_input(q.codes, "dequantize", "codes", dtypes=("uint8",), ndim=(2,), on_cuda=True)
    scale = as_input(scale, "dequantize", "scale", on_cuda=True)
    zero = None if zero is None else as_input(zero, "dequantize", "zero", on_cuda=True)
    if (zero is None) != q.sym:
        raise _C.InvalidArgumentError(f"[dequantize] zero must be None if and only if q is sym: got sym={q.sym}")
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
    """Return rows and columns of the packed matrix, and the shape of scales and zero points."""
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
    """Return row offsets and columns of the excluded positions of ``w``, in the form that the core reads."""
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
    """Convert scales and zero points to the stored dtype."""
    if dtype == "float32":
        return scale, zero
    if dtype in ("bfloat16", "e8m0"):
        return _brain(scale), None if zero is None else _brain(zero)
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


def _brain(x: Array) -> Array:
    """x, whose numbers are bfloat16 already, in that dtype."""
    if device_of(x) is not None:
        return x.bfloat16()
    found = empty_like_kind(x, tuple(x.shape), "bfloat16")
    core_view(found)[...] = core_view(x).view(np.uint32) >> 16
    return found


def _half(x: Array) -> tuple[Array, float, float]:
    """x in float16, and the least magnitude that is not 0 and the largest in x."""
    if device_of(x) is not None:
        magnitudes = x.abs()
        smallest = magnitudes.masked_fill(magnitudes == 0, math.inf).min()
        return x.half(), float(smallest), float(magnitudes.max())
    half = empty_like_kind(x, tuple(x.shape), "float16")
    return half, *_C.round_to_half(core_view(x), core_view(half))
