"""Find layers whose weight the model's code uses directly, besides or instead of calling the layer.

Mamba multiplies by ``dt_proj.weight``; other models pass ``layer.weight`` to ``F.linear``. For such code, a quantized
layer would have to dequantize its whole weight on every use, so these layers stay dense. Rwkv divides weights by
constants in place, which a quantized layer cannot do at all.

To find these layers, a copy of the model runs on a few tokens. Each parameter of the copy is one zero, expanded to the
shape of the parameter. Its linear layers and embeddings return zeros and record each use of their weight. The copy
needs almost no memory, and the model may be on the meta device. The result depends only on the model's code and
configuration.
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
"""Largest number of elements of a buffer that gets memory of its own in the copy; some models write to buffers."""


def weights_in_use(model: nn.Module, layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the layers whose weight is used directly or changed in the forward pass of a model.

    Args:
        model: any model. If it does not run on token ids alone, the result has only the layers found until then.
        layers: name to linear layer or embedding; a layer with several names is listed under each.
    """
    used: set[str] = set()
    try:
        with _without_a_trace(), torch.no_grad():
            watched = _hollow(model, layers, used)
            _run(watched)
    except Exception as error:  # the model's code may need other inputs
        _log.debug("%s could not be run to watch its weights: %r", type(model).__name__, error)
    return frozenset(used)


class _Watched(nn.Module):
    """Replacement for a linear layer or an embedding that returns zeros and records each use of its weight."""

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
        """The weight, as a :class:`LazyWeight` that records its use."""
        return LazyWeight(tuple(self.kind.shape), self.kind.dtype, self.kind.device, self._read, self._note)

    def _read(self, rows: slice | None) -> torch.Tensor:
        values: torch.Tensor = self.kind.detach()
        if rows is not None:  # not recorded: a quantized layer can dequantize one row quickly
            return values[rows]
        self._note("")
        return values

    def _note(self, _: str) -> None:
        self.used.add(self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros in the shape and dtype of the layer's output."""
        if self.looks_up:
            return torch.zeros(*x.shape, self.width, dtype=self.kind.dtype)
        return x.new_zeros(*x.shape[:-1], self.width)


def _hollow(model: nn.Module, layers: Mapping[str, nn.Module], used: set[str]) -> nn.Module:
    """Copy a model without its weights and hooks, and without Accelerate's changes to its modules."""
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
    """Run a model on some tokens, and then on one more token with the cache of the first run."""
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
    """Inside the ``with`` block, hide warnings and messages, keep the random state, and use one thread."""
    from .loading import quiet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads would be slower for such small tensors
    try:
        with warnings.catch_warnings(), quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
