"""Methods with a fixed table of values for the codes: NF4 and FP4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import ops
from .._C import InvalidArgumentError
from ..ops import row_bytes
from ..packed import QuantizedMatrix
from .method import Method, Statistics, kept_beside, scale_bytes

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry


def by_name(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize to the table that the entry's method names, scaled by the largest magnitude in each group."""
    outliers = kept_beside(weight, entry, kept)
    dense = ops.quantize(
        weight, entry.bits, entry.group_size, codebook=entry.method, meta_bits=entry.meta_bits, exclude=outliers
    )
    return QuantizedMatrix(dense, outliers)


def _four_bits(entry: PlanEntry) -> None:
    if entry.bits != 4:
        raise InvalidArgumentError(f"bits of {entry.method} must be 4: got {entry.bits}")
    if entry.sym:
        raise InvalidArgumentError(f"sym must be false with {entry.method}, whose table of values is fixed: got true")


def _bytes(rows: int, columns: int, entry: PlanEntry) -> int:
    return rows * row_bytes(columns, entry.bits) + scale_bytes(rows, columns, entry, zeros=False)


NF4 = Method(
    "rounds to the nearest of 16 quantiles of a normal distribution, scaled per group; 4 bits (QLoRA)",
    by_name,
    check=_four_bits,
    dense_bytes=_bytes,
    uniform=False,
    on_devices=True,
)
FP4 = Method(
    "rounds to the nearest of 15 4-bit floating-point numbers, scaled per group; 4 bits",
    by_name,
    check=_four_bits,
    dense_bytes=_bytes,
    uniform=False,
    on_devices=True,
)
