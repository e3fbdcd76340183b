"""Modules that hold quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import fuse
from .models import LinearWeight
from .packed_linear import describe, linear
from .storage import MatrixSpec, QuantizedMatrix, digest


class QuantLinear(nn.Module):
    """A linear layer whose weight is stored quantized.

    The packed codes are the buffer ``weight``, one-dimensional uint8, so that a checkpoint opened by something that
    expects a plain weight fails on its shape. Storage buffers keep their dtypes whatever the module is cast to; the
    bias, never quantized, follows the cast.

    Args:
        spec: what is stored.
        bias: the bias, a parameter of shape (out_features,), or ``None``.
        transposed: whether the layer stands in for GPT-2's ``Conv1D``.
        device: of the buffers; they hold nothing until :meth:`store` or a checkpoint fills them.
    """

    def __init__(
        self, spec: MatrixSpec, bias: nn.Parameter | None = None, transposed: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        self.transposed = transposed
        for name, shape, dtype in spec.layout():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device=device))
        self._names = [name for name, _, _ in spec.layout()]
        self._description = describe(spec)
        self.bias = bias

    @classmethod
    def replacing(cls, linear: LinearWeight, spec: MatrixSpec) -> QuantLinear:
        """The empty layer, on the meta device, that takes the place of a dense one and takes over its bias."""
        transposed = linear.transposed and linear.expert is None
        return cls(spec, getattr(linear.module, "bias", None), transposed, "meta")

    def store(self, matrix: QuantizedMatrix, device: Any = None) -> None:
        """Fill the buffers with a matrix of this layer's description."""
        for name, tensor in self.spec.tensors(matrix).items():
            kept: Any = tensor.to(device) if device is not None else tensor
            kept._is_hf_initialized = True  # or transformers, while it loads, takes it for a weight to be drawn
            self._buffers[name] = kept

    def stored(self) -> dict[str, torch.Tensor]:
        """The buffers by name."""
        return {name: self.get_buffer(name) for name, _, _ in self.spec.layout()}

    @property
    def intact(self) -> bool:
        """Whether the buffers hold what was once quantized, to the bit."""
        return digest(self.stored()) == self.spec.digest

    @property
    def matrix(self) -> QuantizedMatrix:
        """The quantized matrix; shares memory with the buffers.

        Raises:
            InvalidArgumentError: when the buffers, loaded from somewhere, do not fit together.
        """
        return self.spec.matrix(self.stored())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the stored form stands for, (out_features, in_features)."""
        return self.matrix.dequantize(str(dtype).removeprefix("torch."))

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The dense layer that computes the same: an ``nn.Linear``, or the ``Conv1D`` that this one stands in for."""
        weight = self.dequantize(dtype)
        dense: nn.Module
        with torch.device("meta"):
            if self.transposed:
                dense = Conv1D(self.out_features, self.in_features)
                weight = weight.mT.contiguous()
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X times the weight, plus bias; see :func:`quantrature.packed_linear.linear`."""
        stored: Any = [
            self._buffers[name] for name in self._names
        ]  # get_buffer() takes longer than to multiply a little
        return linear(x, stored, self._description, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=self.bias.requires_grad)
        return self

    def extra_repr(self) -> str:
        """Shape and stored form, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.dense.kind} {self.spec.dense.setting}, outliers={self.spec.outliers}"
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is, under the hooks that Accelerate gave to that one."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)
    model.set_submodule(name, module)


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the place of every quantized layer of a model to a dense one that computes the same."""
    for name in list(quantized_layers(model)):
        replace_module(model, name, model.get_submodule(name).to_dense(dtype))  # type: ignore[operator]
    fuse(model)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
