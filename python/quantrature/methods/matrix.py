"""A weight matrix in its stored form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ops import QuantizedTensor, SparseCSR

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix in its stored form: a packed grid, and weights kept exactly beside it."""

    dense: QuantizedTensor
    outliers: SparseCSR | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes, scales, zeros, outliers and their positions."""
        return self.dense.nbytes + (self.outliers.nbytes if self.outliers is not None else 0)

    def dequantize(self, dtype: str | None = None) -> torch.Tensor:
        """The matrix that the stored form stands for, (out_features, in_features)."""
        dense: torch.Tensor = self.dense.dequantize(dtype)
        if self.outliers is not None:
            self.outliers.add_to(dense)
        return dense
