"""A quantized matrix in memory."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from ..ops import SparseCSR
from ..ops._arrays import is_torch
from .dense import DenseForm

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized weight matrix: dense codes of all weights, and optionally outliers and an input scale.

    Attributes:
        dense: stored form of all weights, (out_features, in_features).
        outliers: sparse matrix of weights that are stored unquantized. They replace the weights of the dense form.
        input_scale: float32 or float16 tensor (in_features,), or ``None`` for ones. Inputs of the dense form are
            multiplied by it, so column j of the matrix is column j of the dense form times ``input_scale[j]``. It does
            not apply to outliers.
    """

    dense: DenseForm
    outliers: SparseCSR | None = None
    input_scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales, zero points and tables, outliers and their positions."""
        parts = (self.dense, self.outliers, self.input_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device | str) -> QuantizedMatrix:
        """Return the matrix with its tensors on a device."""
        return QuantizedMatrix(*(_moved(part, device) for part in (self.dense, self.outliers, self.input_scale)))

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> torch.Tensor:
        """Dequantize the matrix, (out_features, in_features), or a slice of its rows.

        Args:
            dtype: "float32", "float16" or "bfloat16"; by default the dtype of the original matrix.
            rows: slice of consecutive rows; by default all.
        """
        import torch

        weight: torch.Tensor
        if self.input_scale is None:
            weight = self.dense.dequantize(dtype, rows)
        else:
            scaled = self.dense.dequantize("float32", rows).mul_(self.input_scale)
            weight = scaled.to(getattr(torch, self.dense.dtype if dtype is None else dtype))
        if self.outliers is not None:
            (self.outliers if rows is None else self.outliers.rows(rows)).add_to(weight)
        return weight


def _moved(part: Any, device: torch.device | str) -> Any:
    """Return a stored form, or a part of one, with its tensors on a device."""
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{field.name: _moved(getattr(part, field.name), device) for field in fields(part)})
    return part.to(device) if is_torch(part) else part
