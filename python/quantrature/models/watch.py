"""Find the layers whose weight a model's own code computes with, beside or in place of calling the layer.

Mamba multiplies with ``dt_proj.weight`` itself, other code gives ``layer.weight`` to ``F.linear``. A quantized layer
can serve such code only by dequantizing its whole weight each time, so these layers are better left dense. Rwkv divides
weights by constants, in place, which a quantized layer cannot do at all.

A copy of the model runs on a few tokens: its parameters are a single zero seen in the right shape, its linear layers
and embeddings give zeros, and their weights note what is done to them. So it takes no memory to speak of,
models on the meta device will do, and the result depends on nothing but the model's code and configuration.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .lazy_weight import LazyWeight

_log = logging.getLogger(__name__)
_TOKENS = 4
_REAL = 1 << 16
"""Buffers of up to so many numbers get memory of their own, since models write to some."""


def weights_in_use(model: nn.Module, layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of the layers whose weight the forward pass of a model computes with, or changes.

    Args:
        model: any model; of one that cannot be run on token ids alone, nothing is found out.
        layers: the linear layers and embeddings of the model under all their names.
    """
    used: set[str] = set()
    try:
        with _without_a_trace(), torch.no_grad():
            watched = _hollow(model, layers, used)
            _run(watched)
    except Exception as error:  # its code is not ours: it may want other inputs
        _log.debug("%s could not be run to watch its weights: %r", type(model).__name__, error)
    return frozenset(used)


class _Watched(nn.Module):
    """Stands for a linear layer or an embedding: gives zeros, and notes any use or change of its weight."""

    def __init__(self, name: str, layer: Any, used: set[str]) -> None:
        super().__init__()
        self.name, self.used, self.kind = name, used, layer.weight
        self.bias = getattr(layer, "bias", None)
        for attribute in ("in_features", "out_features", "nf", "nx", "num_embeddings", "embedding_dim", "padding_idx"):
            if hasattr(layer, attribute):
                setattr(self, attribute, getattr(layer, attribute))
        self.looks_up = isinstance(layer, nn.Embedding)
        if self.looks_up:
            self.width = layer.embedding_dim
        else:
            self.width = layer.out_features if isinstance(layer, nn.Linear) else layer.nf

    @property
    def weight(self) -> torch.Tensor:
        """The weight; see :class:`LazyWeight`."""
        return LazyWeight(tuple(self.kind.shape), self.kind.dtype, self.kind.device, self._read, self._note)

    def _read(self, rows: slice | None) -> torch.Tensor:
        values: torch.Tensor = self.kind.detach()
        if rows is not None:  # a quantized layer dequantizes a row as fast as a dense one copies it
            return values[rows]
        self._note("")
        return values

    def _note(self, _: str) -> None:
        self.used.add(self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape and dtype that the layer would give."""
        if self.looks_up:
            return torch.zeros(*x.shape, self.width, dtype=self.kind.dtype)
        return x.new_zeros(*x.shape[:-1], self.width)


def _hollow(model: nn.Module, layers: Mapping[str, nn.Module], used: set[str]) -> nn.Module:
    """A copy of a model without its weights, its hooks and what Accelerate made of its modules."""
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
        known[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        shape = tuple(buffer.shape)
        small = buffer.numel() <= _REAL
        empty = torch.zeros(shape if small else (), dtype=buffer.dtype, device="cpu")
        known[id(buffer)] = empty if small else empty.expand(shape)
    for module in model.modules():
        hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
        known.update((id(hook), None) for hook in [*hooks, getattr(module, "_hf_hook", None)])
    hollow = copy.deepcopy(model, known).eval()
    for module in hollow.modules():
        for name in _HOOKS:
            getattr(module, name).clear()
        if "_old_forward" in vars(module):
            module.forward = vars(module).pop("_old_forward")
        vars(module).pop("_hf_hook", None)
        config: Any = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel):
            config._is_quantized = True
        for setting in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if getattr(config, setting, None) is not None:
                setattr(config, setting, "eager")
    for name in layers:
        hollow.set_submodule(name, _Watched(name, hollow.get_submodule(name), used))
    return hollow


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def _run(model: Any) -> None:
    """Give a model some tokens, and then one more, with what it remembers of them."""
    ids = torch.arange(_TOKENS)[None] % model.get_input_embeddings().weight.shape[0]
    config = getattr(model, "config", None)
    both = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    output = model(input_ids=ids, **both)
    for memory in ("past_key_values", "cache_params"):
        if getattr(output, memory, None) is not None:
            one = {name: value[:, -1:] for name, value in both.items()}
            model(input_ids=ids if both else ids[:, -1:], **one, **{memory: getattr(output, memory)})


@contextmanager
def _without_a_trace() -> Iterator[None]:
    """Keep warnings, reports and random numbers of a model's code from showing; run it on one thread."""
    from .loading import quiet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that more only wait for each other
    try:
        with warnings.catch_warnings(), quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
