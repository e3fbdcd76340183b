"""Codes that make up for the errors of those before them (contract: quantrature/gptq.hpp)."""

from __future__ import annotations

import math
import sys
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


@dataclass(frozen=True, eq=False)
class GptqFactor:
    """The factor of a Hessian that :func:`gptq` works with, made by :func:`gptq_factor`.

    Attributes:
        panels: float32 (panels, in_features, 8): the numbers that the error of a column (the second dimension) is
            multiplied by on its way to another (the first and third).
        order: int64 (in_features,), on the CPU: the columns in the order in which they are taken.
        pivots: float64 (in_features,), on the CPU: the squared diagonal of the factor.
        damp_percent, dead: as of :class:`Feedback`.
    """

    panels: Array
    order: Array
    pivots: Array
    damp_percent: float
    dead: int


_RAISED = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def gptq_factor(
    hessian: Array, *, damp_percent: float = 0.01, desc_act: bool = True, group_size: int | None = None
) -> GptqFactor:
    """Factor a Hessian where it is, in float64 by torch, for several matrices that share it.

    :func:`gptq` factors a Hessian itself on the CPU. For 4096 columns and more on a device this takes longer than all
    the rest, and it is done anew for each matrix.

    Args:
        hessian: a torch tensor, else as of :func:`gptq`. The memory for about five float64 matrices of its size is
            needed beside it.
        damp_percent, desc_act: as of :func:`gptq`.
        group_size: of the groups whose grids :func:`gptq` is to find, which it keeps whole; ``None`` for a given grid.

    Returns:
        The factor, equal to the one of the CPU up to the rounding of float64, so that few codes differ.

    Raises:
        InvalidArgumentError: for an argument outside of the above, a NaN or infinity, naming its position, or a
            negative number on the diagonal.
    """
    h = as_input(hessian, "gptq", "hessian", dtypes=("float32",), ndim=(2,), on_cuda=True)
    if not is_torch(h):
        raise _C.InvalidArgumentError("[gptq] hessian must be a torch tensor to be factored before: got numpy.ndarray")
    columns = int(h.shape[0])
    if tuple(h.shape) != (columns, columns):
        raise _C.InvalidArgumentError(f"[gptq] hessian must be square: got shape={tuple(h.shape)}")
    if not (math.isfinite(damp_percent) and damp_percent >= 0):
        raise _C.InvalidArgumentError(f"[gptq] damp must be finite and not negative: got damp={damp_percent}")
    torch = sys.modules["torch"]
    with torch.no_grad():
        h = h.tril()
        diagonal = h.diagonal()
        _demand_sound(h, diagonal)
        order = torch.arange(columns, device=h.device)
        if desc_act:
            order = torch.argsort(diagonal, descending=True, stable=True)
        if desc_act and group_size is not None and 0 < group_size < columns:
            groups = order.div(group_size, rounding_mode="floor")
            rank = torch.full((columns,), columns, device=h.device)
            rank.scatter_reduce_(0, groups, torch.arange(columns, device=h.device), "amin")
            order = order[torch.argsort(rank[groups], stable=True)]
        alive = diagonal > 0
        living = int(alive.sum())
        mean = float(diagonal[alive].double().sum()) / living if living else 1.0
        backwards = order.flip(0)
        h = (h + h.tril(-1).T)[backwards][:, backwards]
        dead = ~alive[backwards]
        exact = h.masked_fill_(dead[:, None], 0).masked_fill_(dead, 0).double()
        for raised in _RAISED:
            damped = diagonal.double() + raised * damp_percent * mean
            exact.diagonal().copy_(torch.where(alive, damped, torch.full_like(damped, mean))[backwards])
            root, failed = torch.linalg.cholesky_ex(exact)
            if not int(failed):
                break
        else:
            root, raised = torch.eye(columns, dtype=exact.dtype, device=exact.device), math.inf
        del exact, h
        roots = root.diagonal().clone()
        width = -columns % 8
        factor = root.div_(roots).float().flip(0, 1)
        panels = torch.nn.functional.pad(factor, (0, width)).view(columns, -1, 8).transpose(0, 1).contiguous()
        pivots = roots.flip(0).square()
        used = math.inf if math.isinf(raised) else raised * damp_percent
        return GptqFactor(panels, order.cpu(), pivots.cpu(), used, columns - living)


def _demand_sound(lower: Array, diagonal: Array) -> None:
    """Refuse a Hessian as the core does."""
    torch = sys.modules["torch"]
    if bool(torch.isfinite(lower).all()) and not bool((diagonal < 0).any()):
        return
    for row, numbers in enumerate(lower.cpu().numpy()):
        if numbers[row] < 0:
            raise _C.InvalidArgumentError(
                f"[gptq] hessian must not be negative on its diagonal: got value={numbers[row]:g}, row={row}"
            )
        for column, number in enumerate(numbers):
            if not math.isfinite(number):
                raise _C.InvalidArgumentError(
                    f"[gptq] hessian must be finite: got value={number:g}, row={row}, col={column}"
                )


def gptq(
    w: Array,
    hessian: Array | GptqFactor,
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
            Its Cholesky factor is found on the CPU, wherever ``w`` is: a Hessian on a device is copied. Or the factor,
            where ``w`` is, made with the same damp_percent, desc_act and groups, which are then not looked at here.
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
        threads and, of the same Hessian in the same memory or the same factor, on every device.

    Raises:
        InvalidArgumentError: for an argument outside of the above, a NaN or infinity, naming its position, or a
            negative number on the diagonal.
    """
    source = as_input(w, "gptq", "w", ndim=(2,), on_cuda=True)
    factor = hessian if isinstance(hessian, GptqFactor) else None
    if factor is not None:
        as_input(factor.panels, "gptq", "factor", dtypes=("float32",), ndim=(3,), on_cuda=True)
        place("gptq", w=source, factor=factor.panels)
    of_inputs = (
        None
        if factor is not None
        else as_input(hessian, "gptq", "hessian", dtypes=("float32",), ndim=(2,), on_cuda=True)
    )
    if of_inputs is not None and tuple(of_inputs.shape) != (source.shape[1], source.shape[1]):
        raise _C.InvalidArgumentError(
            f"[gptq] hessian must have a row and a column for each column of w: got shape={tuple(of_inputs.shape)}, "
            f"expected {(int(source.shape[1]), int(source.shape[1]))}"
        )
    if (grid is None) == (bits is None):
        raise _C.InvalidArgumentError("[gptq] either grid or bits must be given, not both")
    offsets, columns = (None if x is None else core_view(x) for x in positions("gptq", exclude, w))
    if of_inputs is not None:
        of_inputs = core_view(of_inputs.cpu() if is_torch(of_inputs) else of_inputs)
    if bits is not None:
        return _fitted(
            source, (of_inputs, factor), w, bits, group_size, sym, solver, (damp_percent, desc_act), (offsets, columns)
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
        of_inputs,
        grid.bits,
        grid.group_size,
        core_view(scale),
        None if zero is None else core_view(zero),
        float(damp_percent),
        bool(desc_act),
        offsets,
        columns,
        core_view(codes),
        **_of_factor(factor),
        place=place("gptq", w=source, scale=scale, zero=zero),
    )
    return replace(grid, codes=codes), _feedback(damp, loss, dead, factor)


def _of_factor(factor: GptqFactor | None) -> dict[str, Any]:
    if factor is None:
        return {}
    return {
        name: core_view(x)
        for name, x in (("factor", factor.panels), ("order", factor.order), ("pivots", factor.pivots))
    }


def _feedback(damp: float, loss: float, dead: int, factor: GptqFactor | None) -> Feedback:
    return Feedback(damp, loss, dead) if factor is None else Feedback(factor.damp_percent, loss, factor.dead)


def _fitted(
    source: Array,
    inputs: tuple[Array | None, GptqFactor | None],
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
    hessian, factor = inputs
    for half in (True, False):
        damp, loss, dead = _C.gptq(
            core_view(source),
            hessian,
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
            **_of_factor(factor),
            place=place("gptq", w=source),
        )
        stored = narrow(scale, None if sym else zero, "auto" if half else "float32")
        if not half or dtype_name(stored[0]) == "float16":
            break
    found = QuantizedTensor(codes, *stored, int(bits), int(group_size), 1, bool(sym), shape, dtype_name(w))
    return found, _feedback(damp, loss, dead, factor)
