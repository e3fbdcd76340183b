"""Accumulate Hessians: sums of x x^T over tokens (contract: quantrature/hessian.hpp)."""

from __future__ import annotations

import sys

from .. import _C
from ._arrays import Array, as_input, as_output, core_view, place

_CHUNK = 256
"""Number of tokens per partial sum (hessian.hpp)."""


def hessian_accumulate(total: Array, x: Array) -> Array:
    """Add ``x.T @ x`` to ``total``: the Hessian, up to a factor, of a linear layer's squared output error.

    GPTQ (arXiv 2210.17323) and QTIP (2406.11235) divide it by the number of tokens, or not at all.

    Args:
        total: float32 (in_features, in_features), contiguous; changed in place. The lower triangle is computed, and
            copied to the upper one.
        x: float32, float16 or bfloat16 (tokens, in_features), contiguous; on the device of ``total``.

    Returns:
        ``total``. Products are summed in float32, with a new partial sum every 256 tokens. The result is exactly
        symmetric and the same for every number of threads. On a CUDA device torch multiplies in full float32; the
        error bound is the same, but the bits differ.

    Raises:
        InvalidArgumentError: for another dtype or shape, and an array that is empty or not contiguous.
    """
    source = as_input(x, "hessian_accumulate", "x", ndim=(2,), on_cuda=True)
    target = as_output(total, "hessian_accumulate", "total", dtypes=("float32",), ndim=(2,), on_cuda=True)
    if place("hessian_accumulate", total=target, x=source) is None:
        _C.hessian_accumulate(core_view(target), core_view(source))
        return total
    columns = int(source.shape[1])
    if tuple(target.shape) != (columns, columns):
        raise _C.InvalidArgumentError(
            f"[hessian_accumulate] total must have a row and a column for each column of x: "
            f"got shape={tuple(target.shape)}, expected {(columns, columns)}"
        )
    _add_on_device(target, source)
    return total


def _add_on_device(total: Array, x: Array) -> None:
    torch = sys.modules["torch"]
    products = torch.backends.cuda.matmul
    # Where there is the newer of the two names, the older one cannot be read once the newer one has been set.
    name, exact = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, exact)
    try:
        with torch.no_grad():
            for chunk in x.split(_CHUNK):
                chunk = chunk.float()
                total.addmm_(chunk.T, chunk)
            total.tril_()
            total.add_(total.tril(-1).T)
    finally:
        setattr(products, name, before)
