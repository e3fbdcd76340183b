"""Methods that look at the weights alone: each group of weights on the grid that a solver fits to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import ops
from .._C import InvalidArgumentError
from ..packed import QuantizedMatrix
from .method import Method, Statistics, kept_beside, squared

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry


def on_grid(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """The matrix on the grid of the entry's solver, with outliers left out of the fit and kept exactly."""
    outliers = kept_beside(weight, entry, kept)
    dense = ops.quantize(
        weight,
        entry.bits,
        entry.group_size,
        sym=entry.sym,
        solver="hqq-scale-free" if entry.solver == "hqq" else entry.solver,
        meta_bits=entry.meta_bits,
        exclude=outliers,
    )
    return QuantizedMatrix(dense, outliers)


def _not_symmetric(entry: PlanEntry) -> None:
    if entry.sym:
        raise InvalidArgumentError(f"solver must be minmax or mse when sym is true: got {entry.solver!r}")


def _sparse(apart: torch.Tensor, statistics: Statistics) -> float:
    """Sum of the errors of the weights to the power of 0.7, which the half-quadratic solver minimizes."""
    return float(apart.abs_().pow_(0.7).sum())


RTN = Method("round to the nearest point of the min-max grid of each group", "minmax", on_grid, on_devices=True)
MSE = Method("the same, on the grid with the least squared error", "mse", on_grid, objective=squared, on_devices=True)
HQQ = Method(
    "half-quadratic quantization: zero points solved for sparse errors, without calibration; not with sym",
    "hqq",
    on_grid,
    check=_not_symmetric,
    objective=_sparse,
    on_devices=True,
)
