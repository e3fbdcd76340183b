"""Orthogonal transforms with random signs (contract: quantrature/hadamard.hpp)."""

from __future__ import annotations

import numpy as np

from .. import _C
from ._arrays import Array, as_input, as_output, core_view, empty_like_kind, is_torch, place


def hadamard_order(n: int) -> int:
    """Return the order of the dense factor in the transform of ``n`` numbers: 1 for powers of two.

    A transform takes ``n * (log2(n / order) + order)`` additions.

    Raises:
        InvalidArgumentError: for n below 1.
    """
    return _C.hadamard_order(n)


def random_signs(count: int, seed: int) -> np.ndarray:
    """Return random signs as bits, lowest bit of each byte first; a set bit is a minus.

    They are the words of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), so that other programs can reproduce them.

    Args:
        count: number of signs, at least 1.
        seed: random seed, 0 to 2**64 - 1.

    Returns:
        uint8 array (ceil(count / 8),).

    Raises:
        InvalidArgumentError: for a count below 1, or a seed out of range.
    """
    if not 0 <= seed < 1 << 64:
        raise _C.InvalidArgumentError(f"[random_signs] seed must be 0 to 2**64 - 1: got seed={seed}")
    if count < 1:
        raise _C.InvalidArgumentError(f"[random_signs] count must be at least 1: got count={count}")
    signs = np.empty((count + 7) // 8, np.uint8)
    _C.random_signs(seed, count, signs)
    return signs


def hadamard(x: Array, signs: Array | None = None, *, inverse: bool = False, out: Array | None = None) -> Array:
    """Multiply each row with an orthogonal matrix that spreads each value over the whole row.

    For ``n = 2**k`` columns, the matrix is the Walsh-Hadamard transform divided by ``sqrt(n)``. For other ``n`` it is
    the Kronecker product of a Walsh-Hadamard transform and a second matrix: a Hadamard matrix from Paley's
    constructions, or if there is none, the discrete cosine transform of the odd factor of ``n``. With random signs,
    this is the incoherence processing of QuIP# (arXiv 2402.04396, section 3) and QTIP.

    Args:
        x: float32, float16 or bfloat16, one or two dimensions, contiguous; a vector is one row.
        signs: :func:`random_signs` of the columns. They are applied before the transform (after the inverse one).
        inverse: whether to apply the inverse transform.
        out: array for the result, of the shape of ``x``; it may be ``x``. By default a new array of the same dtype.

    Returns:
        The transformed rows. The result is bit-identical on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, ``signs`` or ``out`` of the wrong
            size, or columns with a :func:`hadamard_order` above 2048.
    """
    op = "hadamard"
    source = as_input(x, op, "x", on_cuda=True)
    bits = None
    if signs is not None:
        bits = as_input(signs, op, "signs", dtypes=("uint8",), ndim=(1,), on_cuda=True)
        if len(bits) != (source.shape[-1] + 7) // 8:
            raise _C.InvalidArgumentError(
                f"[{op}] signs must have a bit for each column: got {len(bits)} bytes for cols={source.shape[-1]}"
            )
    if out is None:
        dtype = str(x.dtype).removeprefix("torch.") if is_torch(x) else x.dtype.name
        out = empty_like_kind(x, tuple(x.shape), dtype)
    target = as_output(out, op, "out", on_cuda=True)
    if tuple(target.shape) != tuple(source.shape):
        raise _C.InvalidArgumentError(
            f"[{op}] out must have the shape of x: got shape={tuple(target.shape)}, expected={tuple(source.shape)}"
        )
    where = place(op, x=source, signs=bits, out=target)
    _C.hadamard(core_view(source), None if bits is None else core_view(bits), inverse, core_view(target), where)
    return out
