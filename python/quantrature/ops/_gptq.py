"""Codes that make up for the errors of those before them (contract: quantrature/gptq.hpp)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .. import _C
from ._arrays import Array, as_input, core_view, dtype_name, empty_like_kind, is_torch, place
from ._grid import SOLVERS, QuantizedTensor, check_grid, dequantize, layout, narrow, positions


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
    grid: QuantizedTensor | None = None,
    *,
    bits: int | None = None,
    group_size: int = 128,
    sym: bool = False,
    solver: str = "minmax",
    damp_percent: float = 0.01,
    desc_act: bool = True,
    exclude: Any = None,
) -> tuple[QuantizedTensor, Feedback]:
    """Codes of ``w`` on a grid, found column after column, each making up for the errors of those before it.

    GPTQ (arXiv 2210.17323), which is LDLQ (arXiv 2307.13304). With a grid, static groups: scales and zeros are those of
    the grid, as stored. With bits, those of each group are found when its first column is reached, from the weights
    and what they have to make up for by then.

    Args:
        w: float32, float16 or bfloat16 (out_features, in_features), contiguous, finite; on the CPU or a CUDA device.
        hessian: float32 (in_features, in_features), contiguous: the sum or mean of x x^T; its lower triangle counts.
            Its Cholesky factor is found on the CPU, wherever ``w`` is: a Hessian on a device is copied.
        grid: what :func:`quantrature.ops.quantize` made of w, on axis 1, or another grid of its shape; its codes do not
            matter.
        bits, group_size, sym: in place of a grid, as in :func:`quantrature.ops.quantize`.
        solver: "minmax" or "mse", likewise.
        damp_percent: what is added to the diagonal, as a share of its mean (0.01 is one hundredth, as in the field's
            configurations); 2, 5, 10, 20, 50 and 100 times as much where the Hessian is not positive definite.
        desc_act: take columns by falling diagonal of the Hessian, and not as they stand. Groups stay those of the
            matrix, so that nothing more is stored; without a grid, whole groups are therefore taken by their largest
            element of the diagonal, and columns by theirs within a group (arXiv 2505.14638).
        exclude: positions that are stored exactly elsewhere, an object with ``row_offsets`` and ``columns``: columns
            after them make up for no error of theirs.

    Returns:
        The grid with new codes, or a new one, where ``w`` is, and a :class:`Feedback`. The same for every number of
        threads and on every device.

    Raises:
        InvalidArgumentError: for an argument outside of the above, a NaN or infinity, naming its position, or a
            negative number on the diagonal.
    """
    source = as_input(w, "gptq", "w", ndim=(2,), on_cuda=True)
    of_inputs = as_input(hessian, "gptq", "hessian", dtypes=("float32",), ndim=(2,), on_cuda=True)
    if tuple(of_inputs.shape) != (source.shape[1], source.shape[1]):
        raise _C.InvalidArgumentError(
            f"[gptq] hessian must have a row and a column for each column of w: got shape={tuple(of_inputs.shape)}, "
            f"expected {(int(source.shape[1]), int(source.shape[1]))}"
        )
    if (grid is None) == (bits is None):
        raise _C.InvalidArgumentError("[gptq] either grid or bits must be given, not both")
    offsets, columns = (None if x is None else core_view(x) for x in positions("gptq", exclude, w))
    if is_torch(of_inputs):
        of_inputs = of_inputs.cpu()
    if bits is not None:
        return _fitted(
            source, of_inputs, w, bits, group_size, sym, solver, (damp_percent, desc_act), (offsets, columns)
        )
    assert grid is not None
    if grid.axis != 1 or tuple(grid.shape) != tuple(source.shape):
        raise _C.InvalidArgumentError(
            f"[gptq] grid must be one of the shape of w on axis 1: got shape={tuple(grid.shape)}, axis={grid.axis}"
        )
    scale, zero = (
        x if x is None else dequantize(x, "float32") if isinstance(x, QuantizedTensor) else x
        for x in (grid.scale, grid.zero)
    )
    halves = ("float32", "float16")
    scale = as_input(scale, "gptq", "scale", dtypes=halves, on_cuda=True)
    zero = None if zero is None else as_input(zero, "gptq", "zero", dtypes=halves, on_cuda=True)
    codes = empty_like_kind(w, tuple(grid.codes.shape), "uint8")
    damp, loss, dead = _C.gptq(
        core_view(source),
        core_view(of_inputs),
        grid.bits,
        grid.group_size,
        core_view(scale),
        None if zero is None else core_view(zero),
        float(damp_percent),
        bool(desc_act),
        offsets,
        columns,
        core_view(codes),
        place=place("gptq", w=source, scale=scale, zero=zero),
    )
    return replace(grid, codes=codes), Feedback(damp, loss, dead)


def _fitted(
    source: Array,
    hessian: Array,
    w: Array,
    bits: int,
    group_size: int,
    sym: bool,
    solver: str,
    how: tuple[float, bool],
    exclude: tuple[Any, Any],
) -> tuple[QuantizedTensor, Feedback]:
    """The grid of each group found on the way, its numbers float16 where all of them can be."""
    if solver not in ("minmax", "mse"):
        raise _C.InvalidArgumentError(f"[gptq] solver must be minmax or mse: got solver={solver!r}")
    check_grid("gptq", bits, group_size, 1)
    shape = (int(w.shape[0]), int(w.shape[1]))
    rows, cols, parameters = layout(shape, group_size, 1, "gptq")
    codes = empty_like_kind(w, (rows, _C.row_bytes(cols, bits)), "uint8")
    scale, zero = (empty_like_kind(w, parameters, "float32") for _ in range(2))
    damp_percent, desc_act = how
    for half in (True, False):
        damp, loss, dead = _C.gptq(
            core_view(source),
            core_view(hessian),
            bits,
            group_size,
            None,
            None,
            float(damp_percent),
            bool(desc_act),
            *exclude,
            core_view(codes),
            core_view(scale),
            None if sym else core_view(zero),
            SOLVERS[solver],
            half,
            place("gptq", w=source),
        )
        stored = narrow(scale, None if sym else zero, "auto" if half else "float32")
        if not half or dtype_name(stored[0]) == "float16":
            break
    found = QuantizedTensor(codes, *stored, int(bits), int(group_size), 1, bool(sym), shape, dtype_name(w))
    return found, Feedback(damp, loss, dead)
