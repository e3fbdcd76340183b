"""Block types of GGUF, the file format of llama.cpp (contract: quantrature/gguf.hpp)."""

from __future__ import annotations

from typing import NamedTuple

from .. import _C
from ._arrays import Array, as_input, core_view, empty_like_kind, is_torch


class GgufType(NamedTuple):
    """A block type.

    Attributes:
        name: name of the type, such as "Q4_K".
        number: number of the type in files.
        block_size: number of weights in a block; rows consist of whole blocks.
        block_bytes: bytes of a block.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` weights, a multiple of the block size."""
        return cols // self.block_size * self.block_bytes


GGUF_TYPES = {name: GgufType(name, *rest) for name, *rest in _C.gguf_types()}
"""The block types that the ops know, by name."""


def gguf_quantize(w: Array, type: str | int, weights: Array | None = None) -> Array:
    """Quantize a matrix to blocks of a GGUF type, with a small weighted squared error.

    The scales are found by a search with weighted least squares. Without weights, the search makes the plain squared
    error small.

    Args:
        w: float32, float16 or bfloat16 (rows, cols), contiguous, finite, at most 65504 in magnitude. ``cols`` is a
            multiple of the block size of the type.
        type: name of the type, such as "Q4_K", or its number; see :data:`GGUF_TYPES`.
        weights: float32 (cols,), one weight per column, such as the diagonal of the Hessian or an importance matrix; or
            (rows, cols), one weight per element. Weights are finite and at least 0, and one of them is above 0. Where
            the weights of all elements that share a scale are 0, these have equal weights.

    Returns:
        uint8 (rows, bytes of a row), of the library of ``w``: blocks as GGUF files store them. They are the same on
        every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for an unknown type, a ``w`` or ``weights`` that breaks a rule above, or arrays that are
            not on the CPU.
    """
    op = "gguf"
    source = as_input(w, op, "w", ndim=(2,))
    number = _number(type)
    given = None if weights is None else as_input(weights, op, "weights", dtypes=("float32",))
    if given is not None and tuple(given.shape) not in ((source.shape[1],), tuple(source.shape)):
        raise _C.InvalidArgumentError(
            f"[{op}] weights must have one element per column or the shape of w: got shape={tuple(given.shape)}, "
            f"w of shape={tuple(source.shape)}"
        )
    if given is not None and is_torch(given) != is_torch(w):
        raise _C.InvalidArgumentError(f"[{op}] weights must be of the library of w: got {given.__class__.__module__}")
    rows, cols = (int(n) for n in source.shape)
    data = empty_like_kind(w, (rows, _C.gguf_row_bytes(number, cols)), "uint8")
    _C.gguf_quantize(core_view(source), number, None if given is None else core_view(given), core_view(data))
    return data


def gguf_dequantize(data: Array, type: str | int, cols: int) -> Array:
    """Compute the values of blocks of a GGUF type.

    Args:
        data: uint8 (rows, bytes of a row), contiguous.
        type: name of the type, such as "Q4_K", or its number; see :data:`GGUF_TYPES`.
        cols: number of columns, a multiple of the block size of the type.

    Returns:
        float32 (rows, cols), of the library of ``data``: bit for bit the values of the package ``gguf``.

    Raises:
        InvalidArgumentError: for an unknown type, another dtype, or rows with another number of bytes.
    """
    op = "gguf"
    source = as_input(data, op, "data", dtypes=("uint8",), ndim=(2,))
    number = _number(type)
    expected = _C.gguf_row_bytes(number, cols)
    if source.shape[1] != expected:
        raise _C.InvalidArgumentError(
            f"[{op}] data must have the bytes of a row of {cols} columns: got bytes={source.shape[1]}, "
            f"expected={expected}"
        )
    out = empty_like_kind(data, (int(source.shape[0]), cols), "float32")
    _C.gguf_dequantize(core_view(source), number, core_view(out))
    return out


def _number(type: str | int) -> int:
    found = [of.number for of in GGUF_TYPES.values() if type in (of.name, of.number)]
    if not found:
        raise _C.InvalidArgumentError(f"[gguf] type must be one of {', '.join(GGUF_TYPES)}: got type={type!r}")
    return found[0]
