"""Exact one-dimensional k-means (contract: quantrature/kmeans.hpp)."""

from __future__ import annotations

from .. import _C
from ._arrays import Array, as_input, core_view, empty_like_kind, is_torch, place


def kmeans_1d(x: Array, k: int, weights: Array | None = None) -> tuple[Array, Array]:
    """Find the ``k`` centroids of each row that minimize the weighted sum of squared distances.

    The result is the global minimum, found by a dynamic program (Wang & Song, The R Journal 3/2, 2011). SqueezeLLM
    (arXiv 2306.07629, section 4.1) uses it for each output channel, with the diagonal Fisher information as weights.

    Args:
        x: float32, float16 or bfloat16, one or two dimensions, contiguous, finite; a vector is one row.
        k: number of centroids per row, 1 to 256.
        weights: weights of the values, of the shape of ``x``, at least 0; ``None`` for equal weights. Values of weight
            0 are ignored. If all weights of a row are 0, equal weights are used.

    Returns:
        ``(centroids, assignment)``: float32 of shape ``(rows, k)``, ascending, where a row with fewer distinct numbers
        than ``k`` repeats the largest; and uint8 of the shape of ``x``, the nearest centroid of each number, of two
        equally near ones the first. For a vector ``centroids`` has the shape ``(k,)``. Both are of the library and on
        the device of ``x``, and the same on every CPU and device and for every number of threads.

    Raises:
        InvalidArgumentError: for another dtype, an empty or non-contiguous array, k outside 1 to 256, weights of
            another shape or in another place, a negative weight, and a NaN or infinity.
    """
    op = "kmeans"
    source = as_input(x, op, "x", on_cuda=True)
    if not 1 <= k <= 256:
        raise _C.InvalidArgumentError(f"[{op}] k must be 1 to 256: got k={k}")
    given = None if weights is None else as_input(weights, op, "weights", on_cuda=True)
    if given is not None and tuple(given.shape) != tuple(source.shape):
        raise _C.InvalidArgumentError(
            f"[{op}] weights must have the shape of x: got shape={tuple(given.shape)}, expected={tuple(source.shape)}"
        )
    if given is not None and is_torch(given) != is_torch(x):
        raise _C.InvalidArgumentError(f"[{op}] weights must be of the library of x: got {type(weights).__module__}")
    centroids = empty_like_kind(x, (*source.shape[:-1], k), "float32")
    assignment = empty_like_kind(x, tuple(source.shape), "uint8")
    where = place(op, x=source, weights=given, centroids=centroids, assignment=assignment)
    arrays = core_view(source), None if given is None else core_view(given)
    _C.kmeans(*arrays, k, core_view(centroids), core_view(assignment), where)
    return centroids, assignment
