"""Codes that make up for the errors of those before them (contract: quantrature/gptq.hpp)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .. import _C
from .._arrays import Array, as_input, empty_like_kind
from ._grid import QuantizedTensor, dequantize, positions


@dataclass(frozen=True)
class Feedback:
    """What :func:`gptq` reports beside the codes.

    Attributes:
        damp_percent: that was used; infinite where no damping made the Hessian positive definite, and every weight
            got its nearest code.
        loss: ``tr((w - v) (H + lambda I) (w - v)^T)``, v the values of the codes.
        dead: how many columns have inputs that are always 0.
    """

    damp_percent: float
    loss: float
    dead: int

    @property
    def failed(self) -> bool:
        """Whether there was no factor, and so no feedback."""
        return math.isinf(self.damp_percent)


def gptq(
    w: Array,
    hessian: Array,
    grid: QuantizedTensor,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = True,
    exclude: Any = None,
) -> tuple[QuantizedTensor, Feedback]:
    """Codes of ``w`` on a grid, found column after column, each making up for the errors of those before it.

    GPTQ (arXiv 2210.17323) with static groups, which is LDLQ (arXiv 2307.13304): scales and zeros are those of the
    grid, as stored.

    Args:
        w: float32, float16 or bfloat16 (out_features, in_features), contiguous, finite.
        hessian: float32 (in_features, in_features), contiguous: the sum or mean of x x^T; its lower triangle counts.
        grid: what :func:`quantrature.ops.quantize` made of w, on axis 1, or another grid of its shape; its codes do not
            matter.
        damp_percent: what is added to the diagonal, as a share of its mean (0.01 is one hundredth, as in the field's
            configurations); 2, 5, 10, 20, 50 and 100 times as much where the Hessian is not positive definite.
        desc_act: take columns by falling diagonal of the Hessian, and not as they stand. Groups stay those of the
            matrix, so that nothing more is stored.
        exclude: positions that are stored exactly elsewhere, an object with ``row_offsets`` and ``columns``: columns
            after them make up for no error of theirs.

    Returns:
        The grid with new codes, and a :class:`Feedback`. The same for every number of threads.

    Raises:
        InvalidArgumentError: for an argument outside of the above, a NaN or infinity, naming its position, or a
            negative number on the diagonal.
    """
    source = as_input(w, "gptq", "w", ndim=(2,))
    of_inputs = as_input(hessian, "gptq", "hessian", dtypes=("float32",), ndim=(2,))
    if tuple(of_inputs.shape) != (source.shape[1], source.shape[1]):
        raise _C.InvalidArgumentError(
            f"[gptq] hessian must have a row and a column for each column of w: got shape={tuple(of_inputs.shape)}, "
            f"expected {(int(source.shape[1]), int(source.shape[1]))}"
        )
    if grid.axis != 1 or tuple(grid.shape) != tuple(source.shape):
        raise _C.InvalidArgumentError(
            f"[gptq] grid must be one of the shape of w on axis 1: got shape={tuple(grid.shape)}, axis={grid.axis}"
        )
    scale, zero = (
        x if x is None else dequantize(x, "float32") if isinstance(x, QuantizedTensor) else x
        for x in (grid.scale, grid.zero)
    )
    scale = as_input(scale, "gptq", "scale", dtypes=("float32", "float16"))
    zero = None if zero is None else as_input(zero, "gptq", "zero", dtypes=("float32", "float16"))
    codes = empty_like_kind(w, tuple(grid.codes.shape), "uint8")
    offsets, columns = positions("gptq", exclude, w)
    damp, loss, dead = _C.gptq(
        source,
        of_inputs,
        grid.bits,
        grid.group_size,
        scale,
        zero,
        float(damp_percent),
        bool(desc_act),
        offsets,
        columns,
        codes,
    )
    return replace(grid, codes=codes), Feedback(damp, loss, dead)
