"""Count the parameters of quantized models as of dense ones."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .layers import quantized_layers


def count_as_dense(model: nn.Module) -> None:
    """Let ``num_parameters()`` of a model from transformers, and of the models in it, count quantized weights, too."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            typed: Any = module
            typed.num_parameters = NumParameters(module)


class NumParameters:
    """In the place of the method ``num_parameters`` of a model; copied and pickled with it, as no method would be.

    Args:
        model: whose parameters are counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters; a quantized matrix counts as the weights that it stands for.

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
