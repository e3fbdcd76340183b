"""Methods that need no calibration: rtn, mse and hqq compute each group's scale and zero point from its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import ops
from .._C import InvalidArgumentError
from ..packed import QuantizedMatrix
from .method import Method, Statistics, grid_settings, kept_beside, squared

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry


SOLVERS = {"rtn": "minmax", "mse": "mse", "hqq": "hqq-scale-free"}
"""Method to the argument ``solver`` of :func:`quantrature.ops.quantize`."""


def on_grid(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize with the method's solver. Outliers do not affect scales and zero points, and stay unquantized."""
    outliers = kept_beside(weight, entry, kept)
    dense = ops.quantize(
        weight,
        **grid_settings(entry),
        solver=SOLVERS[entry.method],
        meta_bits=entry.meta_bits,
        exclude=outliers,
    )
    return QuantizedMatrix(dense, outliers)


def _not_symmetric(entry: PlanEntry) -> None:
    if entry.sym:
        raise InvalidArgumentError(f"method must be rtn or mse when sym is true: got {entry.method!r}")


def _sparse(apart: torch.Tensor, statistics: Statistics) -> float:
    """Sum of abs(weight error)^0.7, which the half-quadratic solver minimizes."""
    return float(apart.abs_().pow_(0.7).sum())


RTN = Method("rounds to nearest, between minimum and maximum of each group", on_grid, on_devices=True)
MSE = Method("rtn with the range of least squared error per group", on_grid, objective=squared, on_devices=True)
HQQ = Method(
    "half-quadratic quantization: optimizes zero points for sparse errors, without calibration; not with sym",
    on_grid,
    check=_not_symmetric,
    objective=_sparse,
    on_devices=True,
)
