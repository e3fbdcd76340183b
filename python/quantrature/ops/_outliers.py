"""Split a matrix into a sparse matrix of outliers and a dense remainder (contract: quantrature/outliers.hpp)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from .. import _C
from ._arrays import (
    FLOATS,
    Array,
    as_input,
    as_output,
    consecutive_rows,
    converted,
    core_view,
    device_of,
    dtype_name,
    empty_like_kind,
    is_torch,
    place,
)

PER = ("tensor", "row")


def _column_dtype(cols: int) -> str:
    return "uint16" if cols <= 65536 else "int32"


def offset_dtype(nnz: int) -> str:
    """Return the smallest dtype that can hold ``nnz`` as a row offset."""
    return "uint16" if nnz < 2**16 else "int32" if nnz < 2**31 else "int64"


def _core_offset_dtype(nnz: int) -> str:
    return "int32" if nnz < 2**31 else "int64"


@dataclass(frozen=True, eq=False)
class SparseCSR:
    """A sparse matrix: row i has ``values[a:b]`` in ``columns[a:b]``, where ``a, b = row_offsets[i : i + 2]``.

    Attributes:
        values: float32, float16 or bfloat16, shape (nnz,); NumPy or torch, as the other two.
        columns: uint16 for up to 65,536 columns, else int32; shape (nnz,); ascending within a row.
        row_offsets: uint16 below 2**16 values, int32 below 2**31, else int64; shape (rows + 1,).
        shape: (rows, columns).

    Raises:
        InvalidArgumentError: on construction, for a field that is not as above; the message names it.
    """

    values: Array
    columns: Array
    row_offsets: Array
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, cols = self.shape
        nnz = len(self.values)
        for name, dtypes, length in (
            ("values", FLOATS, nnz),
            ("columns", (_column_dtype(cols),), nnz),
            ("row_offsets", (offset_dtype(nnz),), rows + 1),
        ):
            array = getattr(self, name)
            if not (is_torch(array) or isinstance(array, np.ndarray)) or is_torch(array) != is_torch(self.values):
                raise _C.InvalidArgumentError(
                    f"[csr] {name} must be a NumPy array or a torch tensor, as values: got {type(array).__module__}"
                )
            if dtype_name(array) not in dtypes:
                raise _C.InvalidArgumentError(
                    f"[csr] {name} must be {' or '.join(dtypes)}: got dtype={dtype_name(array)}"
                )
            if tuple(array.shape) != (length,):
                raise _C.InvalidArgumentError(
                    f"[csr] {name} must have one dimension of length {length}: got shape={tuple(array.shape)}"
                )
            if not (array.is_contiguous() if is_torch(array) else array.flags.c_contiguous):
                raise _C.InvalidArgumentError(f"[csr] {name} must be contiguous")
        values, columns, offsets = self.values, self.columns, self.core_row_offsets()
        if place("csr", values=values, columns=columns, row_offsets=self.row_offsets) is not None:
            values, columns, offsets = values.cpu(), columns.cpu(), offsets.cpu()
        _C.check_csr(core_view(values), core_view(columns), core_view(offsets), rows, cols)

    def core_row_offsets(self) -> Array:
        """The row offsets as the core takes them: int32, or int64 from 2**31 values on."""
        dtype = _core_offset_dtype(self.nnz)
        if device_of(self.values) is not None:
            return converted(self.row_offsets, dtype)
        return np.asarray(core_view(self.row_offsets), dtype=dtype)

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Size of the three arrays in bytes."""
        return int(self.values.nbytes + self.columns.nbytes + self.row_offsets.nbytes)

    def rows(self, rows: slice) -> SparseCSR:
        """Return a slice of consecutive rows as a matrix.

        Raises:
            InvalidArgumentError: for a slice without rows, or with a step other than 1.
        """
        rows = consecutive_rows(rows, self.shape[0], "csr")
        taken = self.core_row_offsets()[rows.start : rows.stop + 1]
        first, last = int(taken[0]), int(taken[-1])
        if device_of(self.values) is not None:
            offsets = converted(taken - first, offset_dtype(last - first))
        else:
            offsets = empty_like_kind(self.values, taken.shape, offset_dtype(last - first))
            core_view(offsets)[...] = taken - first
        return SparseCSR(
            self.values[first:last], self.columns[first:last], offsets, (rows.stop - rows.start, self.shape[1])
        )

    def positions(self) -> Array:
        """Return the indices of the values in the flattened matrix: int64 (nnz,), ascending."""
        rows, cols = self.shape
        if device_of(self.values) is not None:
            torch = sys.modules["torch"]
            starts = torch.arange(0, rows * cols, cols, device=self.values.device)
            return starts.repeat_interleave(self.core_row_offsets().diff(), output_size=self.nnz) + self.columns.long()
        flat = np.repeat(np.arange(0, rows * cols, cols, dtype=np.int64), np.diff(np.asarray(self.row_offsets)))
        flat += np.asarray(self.columns)
        return sys.modules["torch"].from_numpy(flat) if is_torch(self.values) else flat

    def add_to(self, dense: Array) -> Array:
        """Write the values to their positions in ``dense``, in place. (They replace the values there.)

        Args:
            dense: float32, float16 or bfloat16, of the shape and library of this matrix, contiguous, writable. Values
                are rounded to its dtype.

        Returns:
            ``dense``.

        Raises:
            InvalidArgumentError: for another shape, dtype or library, or an array that is read-only.
        """
        as_output(dense, "add_to", "dense", on_cuda=True)
        if is_torch(dense) != is_torch(self.values):
            raise _C.InvalidArgumentError(
                f"[add_to] dense must be of the library of the sparse matrix: got {type(dense).__module__}"
            )
        if tuple(dense.shape) != self.shape and (1, *dense.shape) != self.shape:
            raise _C.InvalidArgumentError(
                f"[add_to] dense must have the shape of the sparse matrix: got shape={tuple(dense.shape)}, "
                f"expected={self.shape}"
            )
        place("add_to", dense=dense, values=self.values)
        if is_torch(dense):
            dense.detach().view(-1)[self.positions()] = self.values.detach().to(dense.dtype)
        else:
            with np.errstate(over="ignore"):
                dense.reshape(-1)[self.positions()] = self.values.astype(dense.dtype)
        return dense

    def to_dense(self) -> Array:
        """Return a dense matrix of the same library and dtype, with zeros elsewhere."""
        dense = empty_like_kind(self.values, self.shape, dtype_name(self.values))
        dense[...] = 0
        return self.add_to(dense)


def _count(count: int | None, fraction: float | None, per: str, shape: tuple[int, int]) -> int:
    length, unit = (shape[1], "a row") if per == "row" else (shape[0] * shape[1], "w")
    if fraction is not None:
        if not (math.isfinite(fraction) and 0 <= fraction <= 1):
            raise _C.InvalidArgumentError(f"[extract_outliers] fraction must be from 0 to 1: got fraction={fraction}")
        return round(fraction * length)
    assert count is not None
    if not 0 <= count <= length:
        raise _C.InvalidArgumentError(
            f"[extract_outliers] count must be from 0 to the number of elements of {unit}: got count={count}, "
            f"elements={length}"
        )
    return count


def extract_outliers(
    w: Array,
    *,
    count: int | None = None,
    fraction: float | None = None,
    indices: Array | None = None,
    per: str = "tensor",
    out: Array | None = None,
) -> tuple[Array, SparseCSR]:
    """Split ``w`` into a dense remainder and a sparse matrix of its outliers.

    Give exactly one of ``count``, ``fraction`` and ``indices``. With ``count`` or ``fraction``, the outliers are the
    largest elements by absolute value; of equal ones, those with the lower index.

    Args:
        w: float32, float16 or bfloat16, contiguous, two dimensions; one dimension counts as one row.
        count: number of outliers.
        fraction: fraction of the elements, 0 to 1; the number of outliers is rounded to the nearest integer.
        indices: int64 indices into the flattened ``w``, ascending, without duplicates.
        per: ``"tensor"``, or ``"row"`` to apply ``count`` or ``fraction`` to each row.
        out: array for the remainder, of the shape and dtype of ``w``; it may be ``w``. By default a new array.

    Returns:
        ``(remainder, sparse)``: ``w`` with 0 in place of the outliers, and the outliers as :class:`SparseCSR`, in the
        dtype and library of ``w``. ``sparse.add_to(remainder)`` restores ``w`` bit for bit. The result is the same on
        every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, none or several of the three
            arguments, a count above the number of elements, invalid indices, or (without ``indices``) a NaN.
    """
    op = "extract_outliers"
    source = as_input(w, op, "w", on_cuda=True)
    if sum(given is not None for given in (count, fraction, indices)) != 1:
        raise _C.InvalidArgumentError(f"[{op}] give exactly one of count, fraction and indices")
    if per not in PER or (per == "row" and indices is not None):
        raise _C.InvalidArgumentError(f"[{op}] per must be tensor, or row with count or fraction: got per={per!r}")
    rows, cols = shape = (1, *source.shape) if source.ndim == 1 else tuple(source.shape)
    chosen = None
    if indices is None:
        taken = _count(count, fraction, per, shape)
    else:
        taken = len(indices)
        chosen = as_input(indices, op, "indices", dtypes=("int64",), ndim=(1,), on_cuda=True) if taken else None
    nnz = rows * taken if per == "row" else taken

    remainder = empty_like_kind(w, tuple(source.shape), dtype_name(w)) if out is None else out
    target = as_output(remainder, op, "out", dtypes=(dtype_name(w),), on_cuda=True)
    if tuple(target.shape) != tuple(source.shape):
        raise _C.InvalidArgumentError(
            f"[{op}] out must have the shape of w: got shape={tuple(target.shape)}, expected={tuple(source.shape)}"
        )
    values = empty_like_kind(w, (nnz,), dtype_name(w))
    columns = empty_like_kind(w, (nnz,), _column_dtype(cols))
    offsets = empty_like_kind(w, (rows + 1,), _core_offset_dtype(nnz))
    made = core_view(target), core_view(values), core_view(columns), core_view(offsets)
    where = place(op, w=source, out=target, indices=chosen)
    places = None if chosen is None else core_view(chosen)
    _C.extract_outliers(core_view(source), taken, per == "row", places, *made, where)
    return remainder, SparseCSR(values, columns, converted(offsets, offset_dtype(nnz)), shape)
