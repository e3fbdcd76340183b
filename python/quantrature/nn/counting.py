"""Make ``num_parameters()`` count quantized weights like dense ones."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .layers import quantized_layers


def count_as_dense(model: nn.Module) -> None:
    """Make ``num_parameters()`` of a transformers model, and of the models inside it, count quantized weights, too."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            typed: Any = module
            typed.num_parameters = NumParameters(module)


class NumParameters:
    """Replaces the method ``num_parameters`` of a model. Unlike a method, it is copied and pickled with the model.

    Args:
        model: the model whose parameters are counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters; a quantized matrix counts with its number of weights, not of bytes.

        Args:
            only_trainable: leave out quantized weights and frozen parameters.
            exclude_embeddings: leave out token embeddings, quantized or not.
        """
        layers = quantized_layers(self.model)
        embeddings = {name for name, module in self.model.named_modules() if hasattr(module, "num_embeddings")}
        weights = {f"{name}.weight" for name in [*layers, *(embeddings if exclude_embeddings else ())]}
        counted = 0
        for name, parameter in self.model.named_parameters():
            if name not in weights and (parameter.requires_grad or not only_trainable):
                counted += parameter.numel()
        if not only_trainable:
            for name, layer in layers.items():
                if not (exclude_embeddings and name in embeddings):
                    counted += layer.spec.shape[0] * layer.spec.shape[1]
        return counted
