"""Replace dense layers of a model by quantized ones, and quantized layers by dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models import LinearWeight
from ..packed import MatrixSpec
from .behavior import unsettle
from .experts import fuse, split
from .layers import QuantEmbedding, QuantLayer, QuantLinear, dense_linear, quantized_layers
from .tied import Tied, TiedEmbedding, TiedLinear


def install(model: nn.Module, linear: LinearWeight, spec: MatrixSpec) -> QuantLayer:
    """Replace every layer that uses a matrix by an empty quantized layer on the meta device; the bias is kept.

    Raises:
        InvalidArgumentError: for an embedding, if the stored form is not supported for embeddings.
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
    """Put a quantized layer wherever the model uses the weight of a matrix."""
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
    """Replace a module of the model by another, and keep the hooks that Accelerate added to it."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)
    model.set_submodule(name, module)


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantized layer of a model by a dense layer with the dequantized weight."""
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
            dense = dense_linear(dense.weight, module.bias, isinstance(dense, Conv1D))
        replace_module(model, name, dense)
    if tied and isinstance(model, PreTrainedModel):
        typed: Any = model
        typed.__dict__.pop("_tied_weights_keys", None)  # its class has them still
        typed.all_tied_weights_keys = typed.get_expanded_tied_weights_keys(all_submodels=True)
    fuse(model)
    unsettle(model)
