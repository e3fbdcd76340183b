"""Modules that hold quantized weights."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .._C import InvalidArgumentError, UnsupportedError
from ..models import LazyWeight, small_embedding
from ..packed import GridSpec, MatrixSpec, QuantizedMatrix, digest
from .lookup import lookup
from .names import IN_FILES, IN_MODULES
from .product import describe, linear


class QuantLayer(nn.Module):
    """Base class of modules whose weight is stored quantized.

    The stored tensors are buffers. The packed codes, one-dimensional uint8, are named ``codes``; scales, outliers and
    others have the same names as in the checkpoint. Casting the module does not change their dtypes.

    Args:
        spec: description of the stored matrix.
        device: device of the buffers. They are empty until :meth:`store` or a checkpoint fills them.
        dtype: dtype of the dequantized ``weight``; by default that of the original weight. Casting the module changes
            it.
    """

    transposed = False
    holds_codes = True
    """Marks quantized modules for :func:`quantrature.models.find_linears`, which cannot import this class."""
    _is_hf_initialized = True  # transformers must not draw random values for the weight

    def __init__(self, spec: MatrixSpec, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dense.dtype) if dtype is None else dtype
        self._names = _buffer_names(spec)
        for name, shape, dtype_of_part in spec.layout():
            empty = torch.empty(shape, dtype=getattr(torch, dtype_of_part), device=device)
            self.register_buffer(self._names[name], empty)
        self._description = describe(spec)

    def store(self, matrix: QuantizedMatrix, device: Any = None) -> None:
        """Fill the buffers with a matrix that fits the description of this layer."""
        for name, tensor in self.spec.tensors(matrix).items():
            kept: Any = tensor.to(device) if device is not None else tensor
            kept._is_hf_initialized = True  # or transformers, while it loads, takes it for a weight to be drawn
            self._buffers[self._names[name]] = kept

    def become(self, matrix: QuantizedMatrix) -> None:
        """Replace the matrix by another of the same shape; the device stays the same."""
        device = self.device
        self.spec = MatrixSpec.of(matrix)
        for buffer in self._names.values():
            del self._buffers[buffer]
        self._names = _buffer_names(self.spec)
        self._description = describe(self.spec)
        self.store(matrix, device)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors by their names in the checkpoint."""
        return {name: self.get_buffer(buffer) for name, buffer in self._names.items()}

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.get_buffer(IN_MODULES).device

    @property
    def weight(self) -> torch.Tensor:
        """The weight, in the shape of a dense layer's weight.

        Its dtype, shape and device are known without dequantizing. Each operation that uses its values dequantizes the
        weight again. Writing to it raises UnsupportedError.
        """
        shape = self.spec.shape[::-1] if self.transposed else self.spec.shape
        return LazyWeight(shape, self.dtype, self.device, self._values, _refuse_to_change)

    def _values(self, rows: slice | None) -> torch.Tensor:
        if self.transposed:
            weight = self.dequantize(self.dtype).mT
            return weight if rows is None else weight[rows]
        return self.matrix.dequantize(str(self.dtype).removeprefix("torch."), rows)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if isinstance(value, LazyWeight) and value.of(self._values):
                return  # PEFT gives a layer its own weight when it takes adapters away
            _refuse_to_change("an assignment")
        super().__setattr__(name, value)

    @property
    def intact(self) -> bool:
        """Whether the buffers still equal the quantized matrix bit for bit, by the hash in its description."""
        return digest(self.stored()) == self.spec.digest

    @property
    def matrix(self) -> QuantizedMatrix:
        """The quantized matrix; it shares memory with the buffers.

        Raises:
            InvalidArgumentError: if the buffers are inconsistent, for example after loading a damaged state dict.
        """
        return self.spec.matrix(self.stored())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dequantize the weight; the result has the shape in :attr:`spec`."""
        return self.matrix.dequantize(str(dtype).removeprefix("torch."))

    @abstractmethod
    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return a dense module with the dequantized weight."""

    def _in_order(self) -> Any:
        """Return the buffers in the order of the operators. (``get_buffer`` is slower than a small product.)"""
        return [self._buffers[buffer] for buffer in self._names.values()]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        codes = state_dict.get(f"{prefix}{IN_FILES}")  # as they are called in files
        if codes is not None and codes.dtype == torch.uint8:
            state_dict[prefix + IN_MODULES] = state_dict.pop(f"{prefix}{IN_FILES}")
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLayer:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                changed = fn(parameter.data)
                if torch._has_compatible_shallow_copy_type(parameter, changed):
                    parameter.data = changed  # the same parameter, since BERT's bias is also that of another module
                else:
                    self._parameters[name] = nn.Parameter(changed, requires_grad=parameter.requires_grad)
        return self

    def extra_repr(self) -> str:
        """Shape and stored form, for printing."""
        return f"{self.spec.shape}, {self.spec.dense.kind} {self.spec.dense.setting}, outliers={self.spec.outliers}"


def _buffer_names(spec: MatrixSpec) -> dict[str, str]:
    """Return tensor names in the checkpoint to buffer names."""
    return {name: IN_MODULES if name == IN_FILES else name for name, _, _ in spec.layout()}


def _refuse_to_change(operation: str) -> NoReturn:
    raise UnsupportedError(
        f"[weight] {operation} cannot change the weight of a quantized layer: call model.dequantize() first"
    )


class QuantLinear(QuantLayer):
    """A linear layer whose weight is stored quantized. The bias, never quantized, follows casts of the module.

    Args:
        spec, device, dtype: as in :class:`QuantLayer`.
        bias: parameter of shape (out_features,), or ``None``.
        transposed: whether the layer replaces a ``Conv1D`` of GPT-2, whose weight is (in_features, out_features).
    """

    def __init__(
        self,
        spec: MatrixSpec,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, device, dtype)
        self.out_features, self.in_features = spec.shape
        self.transposed = transposed
        self.bias = bias

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return a dense layer with the dequantized weight: an ``nn.Linear``, or a ``Conv1D`` if it replaced one."""
        weight = self.dequantize(dtype)
        return dense_linear(
            nn.Parameter(weight.mT.contiguous() if self.transposed else weight), self.bias, self.transposed
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x``, (..., in_features), with the weight and add the bias; returns (..., out_features)."""
        return linear(x, self._in_order(), self._description, self.bias)


class QuantEmbedding(QuantLayer):
    """A token embedding whose table is stored quantized; only the rows that are looked up are dequantized.

    Args:
        spec: a grid without outliers, of shape (num_embeddings, embedding_dim).
        replaced: the embedding that this module replaces. If its class multiplies embeddings by a constant, this module
            does so, too.
        device: as in :class:`QuantLayer`.

    Raises:
        InvalidArgumentError: for any other stored form, and for an embedding class with a forward of its own.
    """

    def __init__(self, spec: MatrixSpec, replaced: nn.Embedding, device: Any = None) -> None:
        if spec.dense.kind != GridSpec.kind or spec.outliers or spec.input_scale is not None:
            raise InvalidArgumentError("[embedding] an embedding must be stored as a grid without outliers")
        super().__init__(spec, device, replaced.weight.dtype)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.padding_idx = replaced.padding_idx
        small = small_embedding(replaced)
        if small is None:
            raise InvalidArgumentError(
                f"[embedding] {type(replaced).__name__} is an embedding with a forward of its own, which cannot be "
                "quantized"
            )
        self._small = (small,)  # in a tuple, since its weight is none of the model's

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """Return a dense embedding with the dequantized table, of the class that this module replaced."""
        dense = copy.deepcopy(self._small[0])
        dense.num_embeddings, dense.padding_idx = self.num_embeddings, self.padding_idx
        dense.weight = nn.Parameter(self.dequantize(dtype))
        return dense

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token ids, (..., embedding_dim), in the dtype that the module was cast to."""
        rows = lookup(ids, self._in_order(), self._description, self.dtype)
        small = self._small[0]
        if type(small) is nn.Embedding:
            return rows
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        found: torch.Tensor = functional_call(small, {"weight": rows.flatten(0, -2)}, (places,))
        return found


def dense_linear(weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """Return a dense layer with a weight of shape (out_features, in_features); a ``Conv1D`` if ``transposed``."""
    with torch.device("meta"):
        if transposed:
            dense: Any = Conv1D(weight.shape[1], weight.shape[0])
        else:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    dense.weight = weight
    if bias is not None:
        dense.bias = bias if bias.dtype == weight.dtype else nn.Parameter(bias.detach().to(weight.dtype))
    return dense  # type: ignore[no-any-return]


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
