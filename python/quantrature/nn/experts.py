"""Split the fused experts of a mixture-of-experts model into one layer per expert, so that each can be quantized.

In transformers 5, the matrices of all experts are one three-dimensional parameter of an experts module. Here the
parameter is replaced by a list of layers, one per expert, so that ``experts.down_proj.3`` is the name of a module. The
experts module gets a forward that calls these layers; transformers supports such replacements of the forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..models import LinearWeight


def can_split(module: nn.Module) -> bool:
    """Whether the experts of a module can be split into layers: transformers marks modules whose forward is known."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def split(linear: LinearWeight) -> None:
    """Split a fused parameter into one layer per expert. The layers share its memory until they are replaced."""
    module: Any = linear.module
    stored = getattr(module, linear.attribute)
    if isinstance(stored, nn.ModuleList):
        return
    layers = nn.ModuleList()
    for matrix in stored.detach():
        layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = matrix.mT if linear.transposed else matrix
        layer.weight = nn.Parameter(weight, requires_grad=stored.requires_grad)
        layers.append(layer)
    delattr(module, linear.attribute)
    setattr(module, linear.attribute, layers)
    if not isinstance(module, SplitExperts):
        kind: Any = type(module)
        module.__class__ = _split_class(kind)
    module._is_hf_initialized = True  # transformers would look for the parameter to fill it


@contextmanager
def apart(linears: Iterable[LinearWeight]) -> Iterator[None]:
    """Split the fused experts among these matrices into layers inside the ``with`` block, and fuse them afterwards.

    The layers share the memory of the fused parameter, so that changes of their weights are in the model afterwards.
    """
    stored: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    before: dict[int, tuple[Any, Any, list[str]]] = {}
    for linear in linears:
        if linear.expert is not None and not isinstance(getattr(linear.module, linear.attribute), nn.ModuleList):
            module: Any = linear.module
            stored[id(module), linear.attribute] = module, linear.attribute, linear.parameter
            before.setdefault(id(module), (module, type(module), list(module._parameters)))
            split(linear)
    try:
        yield
    finally:
        for module, attribute, parameter in stored.values():
            delattr(module, attribute)
            setattr(module, attribute, parameter)
        for module, kind, order in before.values():
            module.__class__ = kind
            module._parameters = {name: module._parameters[name] for name in order}


def part_with_memory(model: nn.Module) -> None:
    """Free the fused parameters. Experts that stay dense are first copied into tensors of their own."""
    for module in model.modules():
        if isinstance(module, SplitExperts):
            for layer in (layer for layers in module.lists.values() for layer in layers if type(layer) is nn.Linear):
                weight = layer.weight
                if weight.untyped_storage().nbytes() != weight.nbytes or not weight.is_contiguous():
                    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def fuse(model: nn.Module) -> None:
    """Undo :func:`split` for modules whose experts are all dense and have no adapters."""
    for module in list(model.modules()):
        if isinstance(module, SplitExperts) and module.dense:
            module.fuse()


class SplitExperts(nn.Module):
    """Base class, put first, of an experts module whose experts are split into layers."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool

    @property
    def lists(self) -> dict[str, nn.ModuleList]:
        """The layers of all experts, by the name of the fused parameter that they replace."""
        return {name: module for name, module in self._modules.items() if isinstance(module, nn.ModuleList)}

    @property
    def dense(self) -> bool:
        """Whether all experts are plain linear layers."""
        return all(type(layer) is nn.Linear for layers in self.lists.values() for layer in layers)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of the outputs of the chosen experts for each token.

        Args:
            hidden_states: float tensor (tokens, width).
            top_k_index: integer tensor (tokens, k), the indices of the chosen experts.
            top_k_weights: float tensor (tokens, k), their weights.
        """
        this: Any = self
        tokens, width = hidden_states.shape
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        token_of = order // top_k_index.shape[-1]
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        parts, begin = [], 0
        for expert, count in enumerate(counts):
            if count:
                x = hidden_states[token_of[begin : begin + count]]
                if self.has_gate:
                    x = this._apply_gate(self._project("gate_up_proj", expert, x))
                else:
                    x = this.act_fn(self._project("up_proj", expert, x))
                parts.append(self._project("down_proj", expert, x))
            begin += count
        found = torch.cat(parts) if parts else hidden_states.new_empty(0, width)
        if self.has_post_expert_norm:
            found = this.post_expert_norm(found)
        found = found * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        result: torch.Tensor = found[back].view(tokens, top_k_index.shape[-1], width).sum(1).to(hidden_states.dtype)
        return result

    def _project(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        stored: Any = getattr(self, name)
        y: torch.Tensor
        if isinstance(stored, nn.ModuleList):
            y = stored[expert](x)
        else:
            y = nn.functional.linear(x, stored[expert].mT if self.is_transposed else stored[expert])
        if self.has_bias:
            y = y + getattr(self, f"{name}_bias")[expert]
        return y

    def fuse(self) -> None:
        """Fuse each list of layers into one parameter again, and restore the original module."""
        for name, layers in self.lists.items():
            weights = [layer.get_parameter("weight") for layer in layers]
            fused = torch.stack([weight.detach().mT if self.is_transposed else weight.detach() for weight in weights])
            delattr(self, name)
            setattr(self, name, nn.Parameter(fused, requires_grad=weights[0].requires_grad))
        self.__class__ = type(self).__bases__[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _bare, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _split_class(kind: Any) -> type[nn.Module]:
    return type(f"Split{kind.__name__}", (SplitExperts, kind), {"__doc__": SplitExperts.__doc__})


def _bare(kind: Any) -> nn.Module:
    split_class = _split_class(kind)
    return split_class.__new__(split_class)
