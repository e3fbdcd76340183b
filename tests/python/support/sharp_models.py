"""Tiny models with some curvature, and their calibration tokens, loss and quantized weights."""

import torch

from quantrature import models
from quantrature.methods import quantize_matrix
from quantrature.plan import PlanEntry
from tiny_models import tiny_model

TOKENS = torch.arange(4 * 24).view(4, 24) * 7 % 256


def sharp_model(layout="llama"):
    """Return a tiny model whose loss has some curvature, because its random weights are five times as large."""
    model = tiny_model(layout)
    for linear in models.find_linears(model):
        linear.parameter.data *= 5
    return model


def loss(model, tokens=TOKENS):
    predicted = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())


def images(model, bits, group_size):
    return {
        linear.name: quantize_matrix(linear.name, linear.weight.contiguous(), PlanEntry(bits, group_size)).dequantize(
            "float32"
        )
        for linear in models.find_linears(model)
    }
