"""Modules that hold quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .methods import QuantizedMatrix
from .storage import MatrixSpec


class QuantLinear(nn.Module):
    """A linear layer whose weight is stored quantized.

    The packed codes are the buffer ``weight``, one-dimensional uint8, so that a checkpoint opened by something that
    expects a plain weight fails on its shape. Storage buffers keep their dtypes whatever the module is cast to; the
    bias, never quantized, follows the cast.

    Args:
        spec: what is stored.
        bias: the bias, a parameter of shape (out_features,), or ``None``.
        device: of the buffers; they hold nothing until :meth:`store` or a checkpoint fills them.
    """

    def __init__(self, spec: MatrixSpec, bias: nn.Parameter | None = None, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.grid.shape
        for name, shape, dtype in spec.layout():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device=device))
        self.bias = bias

    @classmethod
    def of(cls, matrix: QuantizedMatrix, bias: nn.Parameter | None = None, device: Any = None) -> QuantLinear:
        """The layer of a quantized matrix."""
        layer = cls(MatrixSpec.of(matrix), bias, "meta")
        layer.store(matrix, device)
        return layer

    def store(self, matrix: QuantizedMatrix, device: Any = None) -> None:
        """Take over the tensors of a matrix, and its description."""
        for name, _, _ in self.spec.layout():
            delattr(self, name)
        self.spec = MatrixSpec.of(matrix)
        for name, tensor in self.spec.tensors(matrix).items():
            self.register_buffer(name, tensor.to(device) if device is not None else tensor)

    @property
    def matrix(self) -> QuantizedMatrix:
        """The quantized matrix; shares memory with the buffers.

        Raises:
            InvalidArgumentError: when the buffers, loaded from somewhere, do not fit together.
        """
        return self.spec.matrix({name: getattr(self, name) for name, _, _ in self.spec.layout()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the stored form stands for, (out_features, in_features)."""
        weight = self.matrix.dequantize(str(dtype).removeprefix("torch."))
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X times the dequantized weight, plus bias."""
        return nn.functional.linear(x, self.dequantize(x.dtype), self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = move(buffer)
        bias = self.bias
        if bias is not None:
            self.bias = nn.Parameter(fn(bias.data), requires_grad=bias.requires_grad)
        return self

    def extra_repr(self) -> str:
        """Shape and grid, for printing."""
        grid = self.spec.grid
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={grid.bits}, group_size={grid.group_size}, sym={grid.sym}, outliers={self.spec.outliers}"
        )
