"""GPTQ: quantize column by column with error compensation (contract: quantrature/gptq.hpp)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

from .. import _C
from ._arrays import Array, as_input, core_view, dtype_name, empty_like_kind, is_torch, place
from ._grid import SOLVERS, NumberFormat, QuantizedTensor, check_grid, dequantize, layout, narrow, positions


@dataclass(frozen=True)
class Feedback:
    """What :func:`gptq` reports besides the codes.

    Attributes:
        damp_percent: the damping that was used. It is infinite if no damping made the Hessian positive definite; all
            weights were then rounded to nearest.
        loss: ``tr((w - v) (H + lambda I) (w - v)^T)``, with v the dequantized weights.
        dead: number of columns whose inputs are always 0.
    """

    damp_percent: float
    loss: float
    dead: int

    @property
    def failed(self) -> bool:
        """Whether the Hessian could not be factored, so that weights were rounded to nearest."""
        return math.isinf(self.damp_percent)


@dataclass(frozen=True, eq=False)
class GptqFactor:
    """The factor of a Hessian for :func:`gptq`, made by :func:`gptq_factor`.

    Attributes:
        panels: float32 (panels, in_features, 8): factors by which the error of a column (second dimension) changes
            another column (first and third dimension).
        order: int64 (in_features,), on the CPU: the order in which columns are quantized.
        pivots: float64 (in_features,), on the CPU: the squared diagonal of the factor.
        damp_percent, dead: as in :class:`Feedback`.
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
    """Factor a Hessian on its device, in float64 with torch, to use it for several matrices.

    Without this, :func:`gptq` factors the Hessian on the CPU for each matrix. For weights on a CUDA device with 4096
    columns or more, this takes longer than all other steps.

    Args:
        hessian: torch tensor, otherwise as in :func:`gptq`. About five float64 matrices of its size are needed as
            additional memory.
        damp_percent, desc_act: as in :func:`gptq`.
        group_size: if you call :func:`gptq` with ``bits``, its group size; ``None`` if you call it with a grid.

    Returns:
        The factor. It equals the factor computed on the CPU up to float64 rounding, so few codes differ.

    Raises:
        InvalidArgumentError: for an invalid argument, a NaN or infinity (the message names its position), or a negative
            number on the diagonal.
    """
    h = as_input(hessian, "gptq", "hessian", dtypes=("float32",), ndim=(2,), on_cuda=True)
    if not is_torch(h):
        raise _C.InvalidArgumentError("[gptq] hessian must be a torch tensor for gptq_factor: got numpy.ndarray")
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
    """Check that a Hessian is finite and its diagonal not negative, with the same errors as the core."""
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
    scale_dtype: str = "auto",
    zero: str = "float",
    damp_percent: float = 0.01,
    desc_act: bool = True,
    exclude: Any = None,
) -> tuple[QuantizedTensor, Feedback]:
    """Quantize ``w`` column by column; each column compensates the errors of those before it.

    This is GPTQ (arXiv 2210.17323), which equals LDLQ (arXiv 2307.13304). With ``grid`` (static groups), its scales
    and zero points are used. With ``bits``, the scale and zero point of a group are computed when its first column is
    reached, from the weights with the compensation so far.

    Args:
        w: float32, float16 or bfloat16 (out_features, in_features), contiguous, finite; on the CPU or a CUDA device.
        hessian: float32 (in_features, in_features), contiguous: the sum or mean of x x^T. Only the lower triangle is
            read. It is factored on the CPU; a Hessian on a device is copied. Instead, you can give a
            :class:`GptqFactor` on the device of ``w``, made with the same ``damp_percent``, ``desc_act`` and groups;
            these arguments are then ignored here.
        grid: result of :func:`quantrature.ops.quantize` for ``w`` with axis 1, or another grid of this shape. Its codes
            are ignored.
        bits, group_size, sym, scale_dtype, zero: instead of ``grid``, as in :func:`quantrature.ops.quantize`. With
            ``scale_dtype="auto"``, too, scales and zero points are rounded before codes are computed.
        solver: with ``bits``: "minmax" or "mse", as in :func:`quantrature.ops.quantize`.
        damp_percent: damping added to the Hessian's diagonal, as a fraction of the diagonal's mean (0.01 is one
            percent, as usual for GPTQ). If the Hessian is not positive definite, 2, 5, 10, 20, 50 and 100 times as much
            is tried.
        desc_act: quantize columns in the order of decreasing diagonal of the Hessian, instead of from left to right.
            Groups are not reordered, so nothing more is stored. With ``bits``, groups are therefore processed whole:
            ordered by their largest diagonal element, and columns inside a group by theirs (arXiv 2505.14638).
        exclude: positions of outliers, which are stored elsewhere: an object with ``row_offsets`` and ``columns``.
            They count as having no error.

    Returns:
        The grid with new codes, or a new one, on the device of ``w``; and a :class:`Feedback`. The result does not
        depend on the number of threads, nor on the device if the Hessian in CPU memory, or the factor, is the same.

    Raises:
        InvalidArgumentError: for an invalid argument, a NaN or infinity (the message names its position), or a negative
            number on the diagonal.
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
        raise _C.InvalidArgumentError("[gptq] give either grid or bits, not both")
    offsets, columns = (None if x is None else core_view(x) for x in positions("gptq", exclude, w))
    if of_inputs is not None:
        of_inputs = core_view(of_inputs.cpu() if is_torch(of_inputs) else of_inputs)
    if bits is not None:
        number_format = NumberFormat(zero, scale_dtype)
        number_format.check("gptq", sym, None)
        how = (damp_percent, desc_act)
        inputs = (of_inputs, factor)
        return _fitted(source, inputs, w, bits, group_size, sym, solver, number_format, how, (offsets, columns))
    assert grid is not None
    if grid.axis != 1 or tuple(grid.shape) != tuple(source.shape):
        raise _C.InvalidArgumentError(
            f"[gptq] grid must be one of the shape of w on axis 1: got shape={tuple(grid.shape)}, axis={grid.axis}"
        )
    scale, zeros = (
        x if x is None else dequantize(x, "float32") if isinstance(x, QuantizedTensor) else x
        for x in (grid.scale, grid.zero)
    )
    scale = as_input(scale, "gptq", "scale", on_cuda=True)
    zeros = None if zeros is None else as_input(zeros, "gptq", "zero", on_cuda=True)
    codes = empty_like_kind(w, tuple(grid.codes.shape), "uint8")
    damp, loss, dead = _C.gptq(
        core_view(source),
        of_inputs,
        grid.bits,
        grid.group_size,
        core_view(scale),
        None if zeros is None else core_view(zeros),
        float(damp_percent),
        bool(desc_act),
        offsets,
        columns,
        core_view(codes),
        **_of_factor(factor),
        place=place("gptq", w=source, scale=scale, zero=zeros),
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
    number_format: NumberFormat,
    how: tuple[float, bool],
    exclude: tuple[Any, Any],
) -> tuple[QuantizedTensor, Feedback]:
    """Quantize with scales computed per group on the way; by default they are float16 if all of them fit."""
    if solver not in ("minmax", "mse"):
        raise _C.InvalidArgumentError(f"[gptq] solver must be minmax or mse: got solver={solver!r}")
    check_grid("gptq", bits, group_size, 1)
    shape = (int(w.shape[0]), int(w.shape[1]))
    rows, cols, parameters = layout(shape, group_size, 1, "gptq")
    codes = empty_like_kind(w, (rows, _C.row_bytes(cols, bits)), "uint8")
    scale, zero = (empty_like_kind(w, parameters, "float32") for _ in range(2))
    damp_percent, desc_act = how
    hessian, factor = inputs
    automatic = number_format.scale_dtype == "auto"
    for half in (True, False) if automatic else (False,):
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
            *number_format.of_core,
            **_of_factor(factor),
            place=place("gptq", w=source),
        )
        kind = ("auto" if half else "float32") if automatic else number_format.scale_dtype
        stored = narrow(scale, None if sym else zero, kind)
        if not half or dtype_name(stored[0]) == "float16":
            break
    found = QuantizedTensor(codes, *stored, int(bits), int(group_size), 1, bool(sym), shape, dtype_name(w))
    return found, _feedback(damp, loss, dead, factor)
