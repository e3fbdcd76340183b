"""Host methods: how the codes of a matrix are found once its plan entry says what they are to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import ops
from ._C import InvalidArgumentError, QuantratureError
from .plan import PlanEntry
from .storage import QuantizedMatrix

if TYPE_CHECKING:
    import torch

METHODS = {
    "rtn": "round to the nearest point of the min-max grid of each group",
    "mse": "the same, on the grid with the least squared error",
    "hqq": "half-quadratic quantization: zero points solved for sparse errors, without calibration",
}
"""Names that ``--method`` takes, and a line about each."""

_SOLVER = {"rtn": "minmax", "mse": "mse", "hqq": "hqq"}


def solver_of(method: str) -> str:
    """The grid solver of a method.

    Raises:
        InvalidArgumentError: for an unknown method.
    """
    if method not in _SOLVER:
        raise InvalidArgumentError(f"[quantize] method must be one of {', '.join(METHODS)}: got {method!r}")
    return _SOLVER[method]


def quantize_matrix(
    name: str, weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None = None
) -> QuantizedMatrix:
    """Quantize one matrix, (out_features, in_features) and contiguous, as its plan entry says.

    Args:
        name: for messages.
        weight: on the CPU; float32, float16 or bfloat16.
        entry: the grid, and how many outliers are left out of its fit and kept exactly.
        kept: int64 places in the flattened weight, ascending, to be left out and kept in place of the outliers.

    Raises:
        QuantratureError: of the kind the op raised, naming the matrix.
    """
    try:
        outliers = None
        if kept is not None and len(kept):
            _, outliers = ops.extract_outliers(weight, indices=kept)
        elif kept is None and entry.outliers > 0:
            _, outliers = ops.extract_outliers(weight, fraction=entry.outliers)
        dense = ops.quantize(
            weight,
            entry.bits,
            entry.group_size,
            sym=entry.sym,
            solver=entry.solver,
            # The package hqq rounds the starting zeros of 4-bit grids in its layers, and not in its quantizer;
            # unrounded ones have the smaller error.
            round_zero=False if entry.solver == "hqq" else None,
            meta_bits=entry.meta_bits,
            exclude=outliers,
        )
    except QuantratureError as e:
        raise type(e)(f"{name}: {e}") from None
    return QuantizedMatrix(dense, outliers)


def image_of(name: str, weight: torch.Tensor, entry: PlanEntry) -> Callable[[], torch.Tensor]:
    """A function that makes the float32 image of a matrix from its stored form, which it keeps."""
    stored = quantize_matrix(name, weight.contiguous(), entry)
    return lambda: stored.dequantize("float32")
