"""Quantization to tables of values, called codebooks (contract: quantrature/codebook.hpp)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import _C
from ._arrays import (
    FLOATS,
    Array,
    as_input,
    as_output,
    consecutive_rows,
    core_view,
    dtype_name,
    empty_like_kind,
    is_torch,
    place,
)
from ._packing import groups_in_row, unpack

CODEBOOKS = {
    # Means of equally likely parts of a normal distribution, of the negative and the positive half apart
    # (arXiv 2305.14314, appendix E, to float32 as in the package bitsandbytes).
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # A sign, two bits of exponent and one of mantissa, as the package bitsandbytes numbers them.
    "fp4": tuple(sign * twelfth / 12 for sign in (1, -1) for twelfth in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
"""Fixed tables by name. Values are relative to the largest magnitude in a group."""


def table_of(codebook: str) -> np.ndarray:
    """Return a fixed table, float32 (2**bits,).

    Raises:
        InvalidArgumentError: for an unknown name.
    """
    if codebook not in CODEBOOKS:
        raise _C.InvalidArgumentError(
            f"[codebook] codebook must be {', '.join(CODEBOOKS)} or an array: got codebook={codebook!r}"
        )
    return np.array(CODEBOOKS[codebook], np.float32)


@dataclass(frozen=True, eq=False)
class CodebookTensor:
    """A matrix or vector quantized to a table: the value of a code is ``table[code] * scale`` in float32.

    Attributes:
        codes: uint8 (rows, row_bytes), packed (see :func:`quantrature.ops.pack`).
        table: float16 or float32, (2**bits,), or (rows, 2**bits) with one table per row.
        scale: float16 or float32 (rows, groups), or a :class:`QuantizedTensor` with the same number of values in one
            row; ``None`` if the table holds unscaled values.
        bits, group_size: as given to :func:`quantize`; ``group_size`` is ``None`` without scales.
        name: name of a fixed table, which is not stored; ``None`` for other tables.
        shape: shape of the original tensor.
        dtype: dtype of the original tensor: "float32", "float16" or "bfloat16".
    """

    codes: Array
    table: Array
    scale: Any
    bits: int
    group_size: int | None
    name: str | None
    shape: tuple[int, ...]
    dtype: str

    def unpack(self) -> Array:
        """Return the codes as uint8, in the shape of the original tensor."""
        return unpack(self.codes, self.bits, self.shape[-1]).reshape(self.shape)

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> Array:
        """Dequantize all rows, or a slice of them; see :func:`quantrature.ops.dequantize`.

        Args:
            dtype: "float32", "float16" or "bfloat16"; by default the dtype of the original tensor.
            rows: slice of consecutive rows of a matrix; by default all.

        Raises:
            InvalidArgumentError: as for ``dequantize``, and for an invalid slice.
        """
        q, name = self if rows is None else self._of_rows(rows), self.dtype if dtype is None else dtype
        if name not in FLOATS:
            raise _C.InvalidArgumentError(f"[dequantize] dtype must be {' or '.join(FLOATS)}: got dtype={name}")
        return decode(q, empty_like_kind(q.codes, q.shape, name))

    def _of_rows(self, rows: slice) -> CodebookTensor:
        if len(self.shape) != 2:
            raise _C.InvalidArgumentError(f"[dequantize] rows need a matrix: got shape={self.shape}")
        rows = consecutive_rows(rows, self.shape[0], "dequantize")
        scale = self._plain_scale()
        return replace(
            self,
            codes=self.codes[rows],
            table=self.table[rows] if self.table.ndim == 2 else self.table,
            scale=None if scale is None else scale.reshape(self.shape[0], -1)[rows],
            shape=(rows.stop - rows.start, self.shape[1]),
        )

    def _plain_scale(self) -> Array | None:
        scale = self.scale
        plain = scale is None or is_torch(scale) or isinstance(scale, np.ndarray)
        return scale if plain else scale.dequantize("float32")

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of codes, table and scales."""
        parts = (self.codes, self.scale, None if self.name is not None else self.table)
        return int(sum(part.nbytes for part in parts if part is not None))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with table and scales."""
        return 8 * self.nbytes / self.numel


def encode(
    w: Array, bits: int, group_size: int | None, codebook: str | Array, positions: tuple[Any, Any]
) -> CodebookTensor:
    """Quantize to the nearest table entries, with float32 scales.

    Args:
        w, bits, group_size, codebook: as in :func:`quantrature.ops.quantize`.
        positions: row offsets and columns of weights that do not affect the scales, or ``(None, None)``.

    Raises:
        InvalidArgumentError: as for ``quantize``.
    """
    source = as_input(w, "codebook", "w", on_cuda=True)
    shape = tuple(int(n) for n in w.shape)
    rows, cols = shape if len(shape) == 2 else (1, shape[0])
    if isinstance(codebook, str):
        name: str | None = codebook
        table = table_of(codebook)
        table = sys.modules["torch"].from_numpy(table).to(w.device) if is_torch(w) else table
    else:
        name, table = None, codebook
        as_input(table, "codebook", "codebook", dtypes=("float32", "float16"), on_cuda=True)
        if is_torch(table) != is_torch(w):
            raise _C.InvalidArgumentError(
                f"[codebook] codebook must be of the same library as w: got {type(table).__module__}"
            )
    if table.shape[-1] != 1 << bits:
        raise _C.InvalidArgumentError(
            f"[codebook] bits must be those of the codebook, of {table.shape[-1]} entries: got bits={bits}"
        )
    if table.ndim == 2 and table.shape[0] != rows:
        raise _C.InvalidArgumentError(
            f"[codebook] codebook must have one row, or one for each row of w: got rows={table.shape[0]}, "
            f"expected={rows}"
        )
    codes = empty_like_kind(w, (rows, _C.row_bytes(cols, bits)), "uint8")
    groups = None if group_size is None else groups_in_row(cols, group_size)
    scale = None if groups is None else empty_like_kind(w, (rows, groups), "float32")
    offsets, columns = (None if part is None else core_view(part) for part in positions)
    made = core_view(codes), None if scale is None else core_view(scale), place("codebook", w=source, codebook=table)
    _C.codebook_quantize(core_view(source), bits, group_size or 0, core_view(table), offsets, columns, *made)
    return CodebookTensor(codes, table, scale, bits, group_size, name, shape, dtype_name(w))


def decode(q: CodebookTensor, out: Array) -> Array:
    """Write the dequantized values to ``out``, and return it.

    Raises:
        InvalidArgumentError: for inconsistent parts of ``q``, or an ``out`` of another shape or dtype.
    """
    halves = ("float32", "float16")
    codes = as_input(q.codes, "dequantize", "codes", dtypes=("uint8",), ndim=(2,), on_cuda=True)
    table = as_input(q.table, "dequantize", "table", dtypes=halves, on_cuda=True)
    scale = q._plain_scale()
    scale = None if scale is None else as_input(scale, "dequantize", "scale", dtypes=halves, on_cuda=True)
    target = as_output(out, "dequantize", "out", on_cuda=True)
    _C.codebook_dequantize(
        core_view(codes),
        q.bits,
        q.group_size or 0,
        core_view(table),
        None if scale is None else core_view(scale),
        core_view(target),
        place("dequantize", codes=codes, table=table, scale=scale, out=target),
    )
    return out
