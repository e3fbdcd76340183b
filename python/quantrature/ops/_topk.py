"""Exact selection of the largest numbers (contract: quantrature/topk.hpp)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .. import _C
from ._arrays import Array, as_input, core_view, dtype_name, empty_like_kind, is_torch, place

KEYS = ("abs", "value")


def topk(x: Array | Sequence[Array], k: int, key: str = "abs") -> Any:
    """Select the k largest numbers of ``x`` by absolute value or by value, exactly.

    Args:
        x: float32, float16 or bfloat16, one or two dimensions, contiguous; or a list or tuple of such arrays, of one
            library and dtype, which are searched together without being concatenated.
        k: how many numbers, from 0 to the number of elements.
        key: ``"abs"`` or ``"value"``.

    Returns:
        ``(values, indices)``: the numbers in the dtype of ``x``, and their int64 indices into the flattened ``x``,
        ascending. Of equal numbers (0 and -0 are equal), those with lower indices are selected. For a list, one pair
        per array, with k numbers in total; of equal numbers, those of earlier arrays are selected. The result is the
        same on every CPU and for every number of threads.

    Raises:
        InvalidArgumentError: for a ``k`` below 0 or above the number of elements, another key or dtype, an empty or
            non-contiguous array, or a NaN (the message names its position). With ``k=0`` nothing is read.
    """
    together = isinstance(x, list | tuple)
    arrays = list(x) if together else [x]
    if not arrays:
        raise _C.InvalidArgumentError("[topk] x must hold at least one array: got an empty list")
    if key not in KEYS:
        raise _C.InvalidArgumentError(f"[topk] key must be {' or '.join(KEYS)}: got key={key!r}")
    names = [f"x[{i}]" if together else "x" for i in range(len(arrays))]
    inputs = [as_input(a, "topk", name, on_cuda=True) for a, name in zip(arrays, names, strict=True)]
    for i, a in enumerate(arrays):
        if is_torch(a) != is_torch(arrays[0]) or dtype_name(a) != dtype_name(arrays[0]):
            raise _C.InvalidArgumentError(
                f"[topk] x must hold arrays of one library and dtype: got x[{i}] of {type(a).__module__}, "
                f"{dtype_name(a)}, after {type(arrays[0]).__module__}, {dtype_name(arrays[0])}"
            )
    total = sum(int(np.prod(a.shape)) for a in inputs)
    if not 0 <= k <= total:
        raise _C.InvalidArgumentError(f"[topk] k must be from 0 to the number of elements: got k={k}, elements={total}")
    values = empty_like_kind(arrays[0], (k,), dtype_name(arrays[0]))
    indices = empty_like_kind(arrays[0], (k,), "int64")
    counts = np.empty(len(inputs), np.int64)
    where = place("topk", **dict(zip(names, inputs, strict=True)))
    _C.topk([core_view(a) for a in inputs], k, key == "abs", core_view(values), core_view(indices), counts, where)
    if not together:
        return values, indices
    ends = [0, *np.cumsum(counts).tolist()]
    return [(values[a:b], indices[a:b]) for a, b in pairwise(ends)]
