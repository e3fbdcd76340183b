"""One quantized matrix in memory."""

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
    """A weight matrix in its stored form.

    Attributes:
        dense: a form of all weights, (out_features, in_features).
        outliers: weights that are kept exactly, in place of those of the dense form.
        input_scale: float32 or float16 of shape (in_features,): what each input is multiplied by on its way into the
            dense form, so that column j of the matrix is that of the dense form times ``input_scale[j]``.
            ``None`` for ones. Outliers act on the input as it is.
    """

    dense: DenseForm
    outliers: SparseCSR | None = None
    input_scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes and all that goes with them, outliers and their positions."""
        parts = (self.dense, self.outliers, self.input_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device | str) -> QuantizedMatrix:
        """The same matrix with its tensors on a device."""
        return QuantizedMatrix(*(_moved(part, device) for part in (self.dense, self.outliers, self.input_scale)))

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> torch.Tensor:
        """The matrix that the stored form stands for, (out_features, in_features), or some rows of it.

        Args:
            dtype: "float32", "float16" or "bfloat16"; by default that of what was quantized.
            rows: those to make, following each other; by default all.
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
    """A stored form, or a part of one, with its tensors on a device."""
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{field.name: _moved(getattr(part, field.name), device) for field in fields(part)})
    return part.to(device) if is_torch(part) else part
