"""Products of quantized matrices with torch tensors.

For a few rows of activations, as in decoding, a kernel multiplies with the packed codes. For many rows, as in a prompt,
the matrix is dequantized block by block and multiplied by torch; the whole matrix is never dequantized at once. Trellis
codes are not rotated back: the activations are rotated instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from .. import _C
from ..ops import CodebookTensor, PackedMatrix, QuantizedTensor, SparseCSR
from ..ops._arrays import FLOATS, place
from ..ops._matvec import ACTIVATIONS
from .quantized import QuantizedMatrix
from .trellis import TrellisMatrix

FEW = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 32}
"""By dtype: largest number of rows of activations for which the packed product is faster (measured on two cores)."""

FEW_ON_CUDA = 16
"""The same for a CUDA device: not measured, but the number that the kernels are made for."""

BLOCK = 1 << 19
"""Number of weights to dequantize at a time: as many as fit into the L2 cache of a core."""

BLOCK_ON_CUDA = 1 << 24
"""The same for a CUDA device: enough to keep it busy."""

# Or torch's threads, which spin for a while after each of its own products, would have to be fought for.
_C.run_on_openmp_of(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))

_FLOATS = ACTIVATIONS.index("float32")
_IN_CORE = {getattr(torch, name): number for number, name in enumerate(FLOATS)}


class PreparedMatrix(Protocol):
    """A matrix prepared for products, of any kind."""

    @property
    def matrix(self) -> QuantizedMatrix:
        """The matrix, with its scales dequantized if they were quantized."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply ``x`` with the transposed matrix and add the bias.

        Args:
            x: float32, float16 or bfloat16 tensor (..., in_features).
            bias: tensor (out_features,), or ``None``.

        Returns:
            New tensor (..., out_features) in the dtype of ``x``.
        """

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """Multiply ``y``, float32 (n, out_features), with the matrix; returns float32 (n, in_features)."""


@dataclass(frozen=True)
class PackedProduct:
    """A matrix on a grid or with a codebook, prepared for products.

    Attributes:
        matrix: the matrix, with its scales dequantized if they were quantized.
        packed: the matrix in the form that the packed product needs.
        on_cpu: whether its tensors are on the CPU.
    """

    matrix: QuantizedMatrix
    packed: PackedMatrix
    on_cpu: bool

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> PackedProduct:
        """Prepare a matrix."""
        assert isinstance(matrix.dense, QuantizedTensor | CodebookTensor)
        packed = PackedMatrix.of(matrix.dense, _beside_the_codes(matrix))
        return cls(replace(matrix, dense=packed.dense), packed, place("linear", q=packed.dense.codes) is None)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`PreparedMatrix.product`. A few rows use the packed kernel, many rows dequantized blocks."""
        packed, scale, dtype = self.packed, self.matrix.input_scale, x.dtype
        rows, cols = packed.dense.shape
        count = x.numel() // cols
        if count > (FEW_ON_CUDA if x.is_cuda else FEW[dtype]):
            return self._product_with_blocks(x, bias)
        # The result is no view: models add to results in place, which autograd forbids for views.
        if bias is None and scale is None:
            y = x.new_empty((*x.shape[:-1], rows))
        else:
            y = x.new_empty((*x.shape[:-1], rows), dtype=torch.float32)
        if scale is not None:
            x = x.float() * scale
        x = x.contiguous()
        if count:
            where = None if self.on_cpu and not x.is_cuda else place("linear", q=packed.dense.codes, x=x)
            addresses = x.data_ptr(), _IN_CORE[x.dtype], y.data_ptr(), _IN_CORE[y.dtype]
            packed.core.multiply(*addresses, count, _FLOATS, where)
        if bias is not None:
            y.add_(bias)
        return y if y.dtype == dtype else y.to(dtype)

    def _product_with_blocks(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, cols = self.packed.dense.shape
        result = x.new_empty((*x.shape[:-1], rows))
        out = result.view(-1, rows)
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        left = x.reshape(-1, cols).to(dtype)
        for block, weight in self._blocks(dtype, x.device):
            out[:, block] = torch.nn.functional.linear(left, weight, None if bias is None else bias[block].to(dtype))
        return result

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """As :meth:`PreparedMatrix.transposed_product`."""
        total = y.new_zeros(len(y), self.packed.dense.shape[1])
        for block, weight in self._blocks(torch.float32, y.device):
            total.addmm_(y[:, block], weight)
        return total

    def _blocks(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield blocks of rows: their slice, and their dequantized weights."""
        rows, cols = self.packed.dense.shape
        step = max(1, (BLOCK if device.type == "cpu" else BLOCK_ON_CUDA) // cols)
        for begin in range(0, rows, step):
            block = slice(begin, min(rows, begin + step))
            yield block, self.matrix.dequantize(str(dtype).removeprefix("torch."), block)


def _beside_the_codes(matrix: QuantizedMatrix) -> SparseCSR | None:
    """Return the outliers divided by the input scale, which applies to the dense part but not to outliers."""
    outliers, scale = matrix.outliers, matrix.input_scale
    if outliers is None or scale is None:
        return outliers
    return replace(outliers, values=outliers.values.float() / scale.float()[outliers.columns.long()])


@dataclass(frozen=True)
class DecodedProduct:
    """A matrix without a kernel for products of its codes: blocks of rows are dequantized for each product.

    Attributes:
        matrix: the matrix.
    """

    matrix: QuantizedMatrix

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`PreparedMatrix.product`."""
        rows, cols = self.matrix.dense.shape
        result = x.new_empty((*x.shape[:-1], rows))
        left = x.reshape(-1, cols).float()
        for block, weight in self._blocks():
            y = torch.nn.functional.linear(left, weight, None if bias is None else bias[block].float())
            result.view(-1, rows)[:, block] = y
        return result

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """As :meth:`PreparedMatrix.transposed_product`."""
        total = y.new_zeros(len(y), self.matrix.dense.shape[1])
        for block, weight in self._blocks():
            total.addmm_(y[:, block], weight)
        return total

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield blocks of rows: their slice, and their dequantized weights."""
        rows, cols = self.matrix.dense.shape
        step = max(1, BLOCK // cols)
        for begin in range(0, rows, step):
            block = slice(begin, min(rows, begin + step))
            yield block, self.matrix.dequantize("float32", block)


@dataclass(frozen=True)
class RotatedProduct:
    """A rotated matrix (trellis codes), prepared for products. Products are computed in float32.

    Attributes:
        matrix: the matrix.
        dense: its dense form.
        residuals: sparse float32 (out_features, in_features), outliers minus the dequantized weights at their
            positions; ``None`` without outliers.
    """

    matrix: QuantizedMatrix
    dense: TrellisMatrix
    residuals: torch.Tensor | None

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> RotatedProduct:
        """Prepare a matrix."""
        assert isinstance(matrix.dense, TrellisMatrix)
        outliers = matrix.outliers
        if outliers is None or outliers.nnz == 0:
            return cls(matrix, matrix.dense, None)
        cols = matrix.dense.shape[1]
        places = outliers.positions()
        values = outliers.values.float() - replace(matrix, outliers=None).dequantize("float32").view(-1)[places]
        indices = torch.stack([places // cols, places % cols])
        residuals = torch.sparse_coo_tensor(indices, values, matrix.dense.shape, check_invariants=True).coalesce()
        return cls(matrix, matrix.dense, residuals)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`PreparedMatrix.product`."""
        rows, cols = self.dense.shape
        result = x.new_empty((*x.shape[:-1], rows))
        if x.numel() == 0:
            return result
        x = x.reshape(-1, cols).float()
        scale = self.matrix.input_scale
        y = self.dense.product(x if scale is None else x * scale)
        if self.residuals is not None:
            y = y + torch.sparse.mm(self.residuals, x.mT).mT
        result.view(-1, rows).copy_(y if bias is None else y + bias)
        return result

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """As :meth:`PreparedMatrix.transposed_product`."""
        x = self.dense.transposed_product(y)
        if self.matrix.input_scale is not None:
            x = x * self.matrix.input_scale
        return x if self.residuals is None else x + torch.sparse.mm(self.residuals.mT, y.mT).mT
