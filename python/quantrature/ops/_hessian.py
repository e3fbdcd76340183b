"""Sums over tokens of x x^T (contract: quantrature/hessian.hpp)."""

from __future__ import annotations

from .. import _C
from ._arrays import Array, as_input, as_output


def hessian_accumulate(total: Array, x: Array) -> Array:
    """Add ``x.T @ x`` to ``total``: the Hessian, up to a factor, of a linear layer's squared output error.

    GPTQ (arXiv 2210.17323) and QTIP (2406.11235) divide it by the number of tokens, or not at all.

    Args:
        total: float32 (in_features, in_features), contiguous; its lower triangle is added to, the upper one follows.
        x: float32, float16 or bfloat16 (tokens, in_features), contiguous.

    Returns:
        ``total``. Products are added in float32, from zero anew after every 256 tokens; symmetric to the bit, and the
        same for every number of threads.

    Raises:
        InvalidArgumentError: for another dtype or shape, and an array that is empty or not contiguous.
    """
    source = as_input(x, "hessian_accumulate", "x", ndim=(2,))
    target = as_output(total, "hessian_accumulate", "total", dtypes=("float32",), ndim=(2,))
    _C.hessian_accumulate(target, source)
    return total
