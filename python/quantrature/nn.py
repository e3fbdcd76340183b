"""Modules that hold quantized weights."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._C import InvalidArgumentError, UnsupportedError
from .experts import fuse, split
from .models import LazyWeight, LinearWeight, small_embedding
from .names import IN_FILES, IN_MODULES
from .packed_embedding import lookup
from .packed_linear import describe, linear
from .storage import GridSpec, MatrixSpec, QuantizedMatrix, digest


class QuantLayer(nn.Module):
    """A module whose weight is stored quantized.

    The stored tensors are buffers: the packed codes, one-dimensional uint8, are called ``codes``; scales, outliers and
    the rest have the names that they have in files. They keep their dtypes whatever the module is cast to.

    Args:
        spec: what is stored.
        device: of the buffers; they hold nothing until :meth:`store` or a checkpoint fills them.
        dtype: that the float weight would have; by default that of what was quantized. It follows casts.
    """

    transposed = False
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
        """Fill the buffers with a matrix of this layer's description."""
        for name, tensor in self.spec.tensors(matrix).items():
            kept: Any = tensor.to(device) if device is not None else tensor
            kept._is_hf_initialized = True  # or transformers, while it loads, takes it for a weight to be drawn
            self._buffers[self._names[name]] = kept

    def become(self, matrix: QuantizedMatrix) -> None:
        """Hold another matrix of the same shape, on the device of this one."""
        device = self.device
        self.spec = MatrixSpec.of(matrix)
        for buffer in self._names.values():
            del self._buffers[buffer]
        self._names = _buffer_names(self.spec)
        self._description = describe(self.spec)
        self.store(matrix, device)

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored tensors by the names that they have in files."""
        return {name: self.get_buffer(buffer) for name, buffer in self._names.items()}

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.get_buffer(IN_MODULES).device

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a dense layer would have it.

        Its dtype, shape and device cost nothing to read. Code that computes with it gets the dequantized values, made
        anew for each operation; code that writes to it gets an UnsupportedError.
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
        """The weight that the stored form stands for, of the shape in :attr:`spec`."""
        return self.matrix.dequantize(str(dtype).removeprefix("torch."))

    @abstractmethod
    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The dense module that computes the same."""

    def _in_order(self) -> Any:
        """The buffers as operators take them; ``get_buffer`` takes longer than to multiply a little."""
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
    """The buffers of a matrix by the names of their tensors in files."""
    return {name: IN_MODULES if name == IN_FILES else name for name, _, _ in spec.layout()}


def _refuse_to_change(operation: str) -> NoReturn:
    raise UnsupportedError(
        f"[weight] {operation} cannot change the weight of a quantized layer: call model.dequantize() first"
    )


class QuantLinear(QuantLayer):
    """A linear layer whose weight is stored quantized. The bias, never quantized, follows casts of the module.

    Args:
        spec, device, dtype: as of :class:`QuantLayer`.
        bias: the bias, a parameter of shape (out_features,), or ``None``.
        transposed: whether the layer stands in for GPT-2's ``Conv1D``.
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
        """The dense layer that computes the same: an ``nn.Linear``, or the ``Conv1D`` that this one stands in for."""
        weight = self.dequantize(dtype)
        return _dense_linear(
            nn.Parameter(weight.mT.contiguous() if self.transposed else weight), self.bias, self.transposed
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X times the weight, plus bias; see :func:`quantrature.packed_linear.linear`."""
        return linear(x, self._in_order(), self._description, self.bias)


class QuantEmbedding(QuantLayer):
    """A token embedding whose table is stored quantized; only the rows that are looked up are dequantized.

    Args:
        spec: a grid without outliers, (num_embeddings, embedding_dim).
        replaced: the embedding whose place this takes. Where its class multiplies what it looks up by a constant, so
            does this.
        device: as of :class:`QuantLayer`.

    Raises:
        InvalidArgumentError: for another stored form.
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
                f"[embedding] {type(replaced).__name__} is an embedding with a forward of its own"
            )
        self._small = (small,)  # in a tuple, since its weight is none of the model's

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The dense embedding that gives the same, of the class whose place this one took."""
        dense = copy.deepcopy(self._small[0])
        dense.num_embeddings, dense.padding_idx = self.num_embeddings, self.padding_idx
        dense.weight = nn.Parameter(self.dequantize(dtype))
        return dense

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of some tokens, (..., embedding_dim), in the dtype that the module was cast to."""
        rows = lookup(ids, self._in_order(), self._description, self.dtype)
        small = self._small[0]
        if type(small) is nn.Embedding:
            return rows
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        found: torch.Tensor = functional_call(small, {"weight": rows.flatten(0, -2)}, (places,))
        return found


class Tied(nn.Module):
    """Stands where a model uses the weight of a quantized layer under a further name; the weight is held only once.

    Args:
        layer: holds the weight.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, or its buffers would be saved under this name, too

    @property
    def layer(self) -> QuantLayer:
        """What holds the weight.

        Raises:
            InvalidArgumentError: when a device map leaves it on disk.
        """
        layer = self._layer[0]
        if layer.get_buffer(IN_MODULES).is_meta:
            raise InvalidArgumentError(
                "[linear] a quantized weight that is used under several names must be on a device: the device_map has "
                "it on disk"
            )
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """As :attr:`QuantLayer.weight`."""
        return self.layer.weight


class TiedEmbedding(Tied):
    """A further place at which a model looks up tokens in the same table."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As :meth:`QuantEmbedding.forward`."""
        found: torch.Tensor = self.layer(ids)
        return found


class TiedLinear(Tied):
    """A linear layer that multiplies with the weight of another one, or with the table of a token embedding.

    Args:
        layer: holds the weight.
        bias: the bias, a parameter of shape (out_features,), or ``None``.
    """

    def __init__(self, layer: QuantLayer, bias: nn.Parameter | None = None) -> None:
        super().__init__(layer)
        self.out_features, self.in_features = layer.spec.shape
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X times the weight, plus bias; see :func:`quantrature.packed_linear.linear`."""
        layer = self.layer
        device = layer.get_buffer(IN_MODULES).device
        y = linear(x.to(device), layer._in_order(), layer._description, None).to(x.device)
        return y if self.bias is None else y + self.bias


def _dense_linear(weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """The dense layer around a weight, (out_features, in_features), or the other way round where ``transposed``."""
    with torch.device("meta"):
        if transposed:
            dense: Any = Conv1D(weight.shape[1], weight.shape[0])
        else:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    dense.weight = weight
    if bias is not None:
        dense.bias = bias if bias.dtype == weight.dtype else nn.Parameter(bias.detach().to(weight.dtype))
    return dense  # type: ignore[no-any-return]


def install(model: nn.Module, linear: LinearWeight, spec: MatrixSpec) -> QuantLayer:
    """Put an empty quantized layer, on the meta device, wherever a model has a matrix; it takes over the bias.

    Raises:
        InvalidArgumentError: for a stored form that an embedding cannot have.
    """
    layer: QuantLayer
    if isinstance(linear.module, nn.Embedding):
        layer = QuantEmbedding(spec, linear.module, "meta")
    else:
        transposed = linear.transposed and linear.expert is None
        layer = QuantLinear(spec, getattr(linear.module, "bias", None), transposed, "meta", linear.weight.dtype)
    if linear.expert is not None:
        split(linear)
    put_everywhere(model, linear, layer)
    return layer


def put_everywhere(model: nn.Module, linear: LinearWeight, layer: QuantLayer) -> None:
    """Give a quantized layer, with the weight of a matrix, all places at which a model uses it."""
    replace_module(model, linear.name, layer)
    for name in linear.aliases:
        there: Any = model.get_submodule(name)
        if there is layer:
            continue  # the module itself has several names
        looks_up = isinstance(there, nn.Embedding | TiedEmbedding)
        replace_module(model, name, TiedEmbedding(layer) if looks_up else TiedLinear(layer, there.bias))
    # Transformers would give the codes to what is tied to them.
    keys = {f"{name}.weight" for name in linear.aliases}
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        tied = getattr(model, attribute, None)
        if isinstance(tied, dict) and not keys.isdisjoint(tied):
            setattr(model, attribute, {target: source for target, source in tied.items() if target not in keys})


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one is, under the hooks that Accelerate gave to that one."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)
    model.set_submodule(name, module)


class DtypeAndDevice(nn.Module):
    """Holds an empty parameter, from which transformers tells dtype and device of a model without any other.

    The parameter is in no state dict.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def settle(model: nn.Module) -> None:
    """Make a model whose layers have been quantized behave as transformers expects of a quantized model.

    Its configurations say that it is quantized, ``dtype`` and ``device`` have an answer though no floating-point
    parameter may be left, and a quantized embedding is not resized.
    """
    layers = quantized_layers(model)
    if layers and not any(parameter.is_floating_point() for parameter in model.parameters()):
        first = next(iter(layers.values()))
        model.add_module("dtype_and_device", DtypeAndDevice(first.dtype, first.device))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inner: Any = module
            inner.config._is_quantized = True
            if _quantized_ends(inner):
                inner.resize_token_embeddings = RefuseToResize(inner)


def _quantized_ends(model: Any) -> list[str]:
    """The token embedding and the output embedding of a model, those that are quantized."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    return [name for name, module in model.named_modules() if isinstance(module, QuantLayer | Tied) and module in ends]


class RefuseToResize:
    """Stands for ``resize_token_embeddings`` of a model whose token embedding or output embedding is quantized.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Give back the token embedding if its size is to stay.

        Raises:
            UnsupportedError: naming the quantized embedding, for another size.
        """
        embedding = self.model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == rows:
            return embedding
        names = " and ".join(_quantized_ends(self.model))
        raise UnsupportedError(
            f"[embedding] {names} cannot be resized, being quantized: got new_num_tokens={wanted}, the table has "
            f"{rows}; resize before you quantize, or call model.dequantize() first"
        )


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the place of every quantized layer of a model to a dense one that computes the same."""
    for module in model.modules():
        if isinstance(module, QuantLinear | TiedLinear) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)  # it may be that of another module, too, as BERT's is
    weights: dict[nn.Module, nn.Module] = {}
    for name, layer in quantized_layers(model).items():
        weights[layer] = layer.to_dense(dtype)
        replace_module(model, name, weights[layer])
    tied = {name: module for name, module in model.named_modules() if isinstance(module, Tied)}
    for name, module in tied.items():
        dense: Any = weights[module._layer[0]]
        if isinstance(module, TiedLinear):
            dense = _dense_linear(dense.weight, module.bias, isinstance(dense, Conv1D))
        replace_module(model, name, dense)
    if tied and isinstance(model, PreTrainedModel):
        typed: Any = model
        typed.__dict__.pop("_tied_weights_keys", None)  # its class has them still
        typed.all_tied_weights_keys = typed.get_expanded_tied_weights_keys(all_submodels=True)
    fuse(model)
    _unsettle(model)


def _unsettle(model: nn.Module) -> None:
    """The reverse of :func:`settle`."""
    if isinstance(getattr(model, "dtype_and_device", None), DtypeAndDevice):
        del model.dtype_and_device
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inner: Any = module
            vars(inner.config).pop("_is_quantized", None)
            vars(inner).pop("resize_token_embeddings", None)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
