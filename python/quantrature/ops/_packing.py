"""Pack codes of 1 to 8 bits without gaps (layout: quantrature/packing.hpp; checkpoints use it, so it never changes)."""

from __future__ import annotations

from .. import _C
from ._arrays import Array, as_input, as_output, core_view, empty_like_kind, place


def groups_in_row(cols: int, group_size: int) -> int:
    """Number of groups in a row of ``cols`` weights, a shorter last one included; 1 for a group_size of -1."""
    return 1 if group_size == -1 else -(-cols // group_size)


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of a packed row: ``bits * ceil(cols / 8)``.

    Raises:
        InvalidArgumentError: for bits outside 1 to 8 or cols below 1.
    """
    return _C.row_bytes(cols, bits)


def pack(codes: Array, bits: int, out: Array | None = None) -> Array:
    """Pack codes; each row is packed separately.

    Args:
        codes: uint8, one or two dimensions, contiguous, each below ``2**bits``; a vector is one row.
        bits: bits per code, 1 to 8.
        out: array for the result, contiguous, of the returned shape; by default a new array.

    Returns:
        ``out``, or a new array of the library of ``codes``: uint8 ``(rows, row_bytes(cols, bits))``. The result is
        bit-identical on every CPU.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, ``bits`` outside 1 to 8, an ``out``
            of another shape, or a code that is too large (the message names the first). ``out`` is then invalid.
    """
    codes = as_input(codes, "pack", "codes", dtypes=("uint8",), on_cuda=True)
    rows, cols = (1, codes.shape[0]) if codes.ndim == 1 else codes.shape
    out, target = _target(codes, (rows, _width(cols, bits, "pack")), out, "pack")
    where = place("pack", codes=codes, out=target)
    _C.pack(core_view(codes.reshape(rows, cols)), bits, core_view(target), where)
    return out


def unpack(packed: Array, bits: int, cols: int, out: Array | None = None) -> Array:
    """Unpack codes; the reverse of :func:`pack`.

    Args:
        packed: uint8 ``(rows, row_bytes(cols, bits))``, contiguous; a vector is one row.
        bits: bits per code, 1 to 8.
        cols: number of codes per row.
        out: array for the result, contiguous, of the returned shape; by default a new array.

    Returns:
        ``out``, or a new array of the library of ``packed``: uint8 ``(rows, cols)``.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, ``bits`` outside 1 to 8, rows that
            are not ``row_bytes(cols, bits)`` long, or an ``out`` of another shape.
    """
    packed = as_input(packed, "unpack", "packed", dtypes=("uint8",), on_cuda=True)
    packed = packed.reshape(1, -1) if packed.ndim == 1 else packed
    if packed.shape[1] != _width(cols, bits, "unpack"):
        raise _C.InvalidArgumentError(
            f"[unpack] packed must have {row_bytes(cols, bits)} bytes per row for cols={cols} and bits={bits}: "
            f"got {packed.shape[1]}"
        )
    out, target = _target(packed, (packed.shape[0], cols), out, "unpack")
    _C.unpack(core_view(packed), bits, core_view(target), place("unpack", packed=packed, out=target))
    return out


def _target(source: Array, shape: tuple[int, ...], out: Array | None, op: str) -> tuple[Array, Array]:
    """What is returned, and what the core writes."""
    if out is None:
        out = empty_like_kind(source, shape, "uint8")
    target = as_output(out, op, "out", dtypes=("uint8",), ndim=(2,), on_cuda=True)
    if tuple(out.shape) != shape:
        raise _C.InvalidArgumentError(f"[{op}] out must have shape={shape}: got {tuple(out.shape)}")
    return out, target


def _width(cols: int, bits: int, op: str) -> int:
    if not 1 <= bits <= 8:
        raise _C.InvalidArgumentError(f"[{op}] bits must be 1 to 8: got bits={bits}")
    if cols < 1:
        raise _C.InvalidArgumentError(f"[{op}] cols must be at least 1: got cols={cols}")
    return _C.row_bytes(cols, bits)
