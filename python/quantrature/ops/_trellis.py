"""Trellis codes (contracts: quantrature/trellis.hpp, quantrature/viterbi.hpp; checkpoints hold the streams)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .. import _C
from ._arrays import Array, as_input, as_output, core_view, empty_like_kind, place

Code = Literal["1mad", "3inst", "hyb"]

TILE = 16
"""Rows and columns of a tile. The 256 weights of a tile are one sequence."""


@dataclass(frozen=True)
class Trellis:
    """A bitshift trellis and the code of its states: QTIP (arXiv 2406.11235, section 3).

    Attributes:
        bits: bits per weight, 1 to 4.
        state_bits: number of bits that each weight depends on (L in the paper), at most 16. More bits give a smaller
            error; the time to quantize is proportional to ``2**state_bits``.
        code: how a state determines weights: ``"1mad"`` and ``"3inst"`` compute them, ``"hyb"`` reads two at a time
            from a table of 512 pairs.

    Raises:
        InvalidArgumentError: for an unknown ``code``, or ``bits`` or ``state_bits`` out of range.
    """

    bits: int
    state_bits: int = 16
    code: Code = "3inst"

    def __post_init__(self) -> None:
        if self.code not in get_args(Code):
            raise _C.InvalidArgumentError(f"[trellis] code must be 1mad, 3inst or hyb: got code={self.code!r}")
        if not 1 <= self.bits <= 4:
            raise _C.InvalidArgumentError(f"[trellis] bits must be 1 to 4: got bits={self.bits}")
        least = max(2, self.bits * self.step_weights)
        if not least <= self.state_bits <= 16:
            raise _C.InvalidArgumentError(
                f"[trellis] state_bits must be {least} to 16: got state_bits={self.state_bits}"
            )

    @property
    def step_weights(self) -> int:
        """Number of weights per state."""
        return _C.trellis_step_weights(self._code)

    def stream_bytes(self, weights: int) -> int:
        """Return the bytes of a sequence of weights.

        Raises:
            InvalidArgumentError: if ``weights`` is not a multiple of ``step_weights``, or has fewer bits than a state.
        """
        if weights % self.step_weights or weights * self.bits < self.state_bits:
            raise _C.InvalidArgumentError(
                f"[trellis] a sequence must have a multiple of {self.step_weights} weights and at least "
                f"{self.state_bits} bits: got {weights} weights of {self.bits} bits"
            )
        return (weights * self.bits + 7) // 8

    def values(self) -> np.ndarray:
        """Return the unscaled weights of every state: float32 (2**state_bits, step_weights)."""
        out = np.empty((1 << self.state_bits, self.step_weights), np.float32)
        _C.trellis_values(self._code, self.state_bits, out)
        return out

    @property
    def _code(self) -> int:
        return get_args(Code).index(self.code)

    @property
    def _arguments(self) -> tuple[int, int, int]:
        return self._code, self.bits, self.state_bits


def trellis_quantize(x: Array, trellis: Trellis, scale: float = 1.0) -> Array:
    """Quantize sequences to trellis codes with a small squared error.

    The Viterbi algorithm runs twice, so that each sequence ends in the state in which it begins (tail-biting; QTIP,
    algorithm 4).

    Args:
        x: float32, float16 or bfloat16, one or two dimensions, contiguous, finite; each row is a sequence.
        trellis: the trellis code.
        scale: root mean square of the code's values over all states.

    Returns:
        uint8 ``(rows, trellis.stream_bytes(cols))``, of the library and on the device of ``x``. The result is the same
        on every CPU and device and for every number of threads.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, a NaN or infinity, a scale that is
            not positive, or a number of columns for which :meth:`Trellis.stream_bytes` raises.
    """
    op = "trellis_quantize"
    source = as_input(x, op, "x", on_cuda=True)
    rows = source.shape[0] if source.ndim == 2 else 1
    codes = empty_like_kind(x, (rows, trellis.stream_bytes(source.shape[-1])), "uint8")
    _C.trellis_quantize(
        core_view(source), *trellis._arguments, scale, core_view(codes), place(op, x=source, codes=codes)
    )
    return codes


def trellis_dequantize(
    codes: Array, cols: int, trellis: Trellis, scale: float = 1.0, *, dtype: str = "float32", out: Array | None = None
) -> Array:
    """Dequantize trellis codes; the reverse of :func:`trellis_quantize`.

    Args:
        codes: uint8 ``(rows, trellis.stream_bytes(cols))``.
        cols: number of weights per sequence.
        trellis: the trellis code.
        scale: as in :func:`trellis_quantize`.
        dtype: dtype of the result, if ``out`` is not given.
        out: array for the result, ``(rows, cols)``; by default a new array.

    Returns:
        Array ``(rows, cols)`` of the library of ``codes``. The result is the same on every CPU.

    Raises:
        InvalidArgumentError: for codes or a result of another dtype or shape, or a scale that is not finite.
    """
    op = "trellis_dequantize"
    source = _streams(codes, trellis.stream_bytes(cols), op)
    if out is None:
        out = empty_like_kind(codes, (source.shape[0], cols), dtype)
    target = as_output(out, op, "out", ndim=(2,), on_cuda=True)
    if tuple(target.shape) != (source.shape[0], cols):
        raise _C.InvalidArgumentError(
            f"[{op}] out must have a row for each stream: got shape={tuple(target.shape)}, "
            f"expected={(source.shape[0], cols)}"
        )
    where = place(op, codes=source, out=target)
    _C.trellis_dequantize(core_view(source), *trellis._arguments, scale, core_view(target), where)
    return out


def trellis_matvec(
    codes: Array, shape: tuple[int, int], x: Array, trellis: Trellis, scale: float = 1.0, out: Array | None = None
) -> Array:
    """Multiply a matrix of trellis codes with one or a few vectors; weights are decoded during the product.

    Args:
        codes: uint8 ``(tiles, trellis.stream_bytes(256))``: the matrix in tiles of 16 x 16, in row-major order of
            tiles. Each tile is one sequence, in row-major order.
        shape: (rows, cols) of the matrix, multiples of 16.
        x: float32, float16 or bfloat16, contiguous, (cols,), or (n, cols) for n vectors.
        trellis: the trellis code.
        scale: as in :func:`trellis_quantize`.
        out: float32 array for the result; by default a new array.

    Returns:
        float32 (rows,) or (n, rows), of the library of ``x``. The error is at most ``2**-23 * (cols / 4 + 32)`` times
        the sum of ``abs(weight * x)``. The result is the same for every number of threads, but not on every CPU.

    Raises:
        InvalidArgumentError: for codes, vectors or results of another dtype or shape.
    """
    op = "trellis_matvec"
    streams = _streams(codes, trellis.stream_bytes(TILE * TILE), op)
    source = as_input(x, op, "x", on_cuda=True)
    rows, cols = shape
    expected = (*source.shape[:-1], rows)
    if out is None:
        out = empty_like_kind(x, expected, "float32")
    target = as_output(out, op, "out", dtypes=("float32",), on_cuda=True)
    if tuple(target.shape) != expected:
        raise _C.InvalidArgumentError(
            f"[{op}] out must have a number for each row and vector: got shape={tuple(target.shape)}, "
            f"expected={expected}"
        )
    arrays = core_view(source), core_view(target), place(op, codes=streams, x=source, out=target)
    _C.trellis_matvec(core_view(streams), rows, cols, *trellis._arguments, scale, *arrays)
    return out


def _streams(codes: Array, width: int, op: str) -> Array:
    source = as_input(codes, op, "codes", dtypes=("uint8",), ndim=(2,), on_cuda=True)
    if source.shape[1] != width:
        raise _C.InvalidArgumentError(f"[{op}] codes must have {width} bytes per sequence: got {source.shape[1]}")
    return source
