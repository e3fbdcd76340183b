"""Codes of 1 to 8 bits without gaps (layout: quantrature/packing.hpp; checkpoints hold it, it never changes)."""

from __future__ import annotations

from .. import _C
from .._arrays import Array, as_input, empty_like_kind


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of a packed row: ``bits * ceil(cols / 8)``.

    Raises:
        InvalidArgumentError: for bits outside 1 to 8 or cols below 1.
    """
    return _C.row_bytes(cols, bits)


def pack(codes: Array, bits: int) -> Array:
    """Pack codes, each row on its own.

    Args:
        codes: uint8, one or two dimensions, contiguous, each below ``2**bits``; a vector is one row.
        bits: of a code, 1 to 8.

    Returns:
        uint8 of shape ``(rows, row_bytes(cols, bits))``, of the same library as ``codes``. The same bits on every CPU.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, bits outside 1 to 8, or a code that
            does not fit, naming the first one.
    """
    codes = as_input(codes, "pack", "codes", dtypes=("uint8",))
    rows, cols = (1, codes.shape[0]) if codes.ndim == 1 else codes.shape
    out = empty_like_kind(codes, (rows, _width(cols, bits, "pack")), "uint8")
    _C.pack(codes.reshape(rows, cols), bits, out)
    return out


def unpack(packed: Array, bits: int, cols: int) -> Array:
    """The reverse of :func:`pack`.

    Args:
        packed: uint8 of shape ``(rows, row_bytes(cols, bits))``, contiguous; a vector is one row.
        bits: of a code, 1 to 8.
        cols: codes of a row.

    Returns:
        uint8 of shape ``(rows, cols)``, of the same library as ``packed``.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, bits outside 1 to 8, or a width
            that does not go with cols.
    """
    packed = as_input(packed, "unpack", "packed", dtypes=("uint8",))
    packed = packed.reshape(1, -1) if packed.ndim == 1 else packed
    if packed.shape[1] != _width(cols, bits, "unpack"):
        raise _C.InvalidArgumentError(
            f"[unpack] packed must have {row_bytes(cols, bits)} bytes a row for cols={cols} and bits={bits}: "
            f"got {packed.shape[1]}"
        )
    out = empty_like_kind(packed, (packed.shape[0], cols), "uint8")
    _C.unpack(packed, bits, out)
    return out


def _width(cols: int, bits: int, op: str) -> int:
    if not 1 <= bits <= 8:
        raise _C.InvalidArgumentError(f"[{op}] bits must be 1 to 8: got bits={bits}")
    if cols < 1:
        raise _C.InvalidArgumentError(f"[{op}] cols must be at least 1: got cols={cols}")
    return _C.row_bytes(cols, bits)
