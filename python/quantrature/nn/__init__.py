"""Layers that hold quantized weights, and functions that put them into a model."""

from .behavior import settle
from .layers import QuantEmbedding, QuantLayer, QuantLinear, quantized_layers
from .places import dequantize_layers, install, put_everywhere, replace_module
from .tied import Tied, TiedEmbedding, TiedLinear

__all__ = [
    "QuantEmbedding",
    "QuantLayer",
    "QuantLinear",
    "Tied",
    "TiedEmbedding",
    "TiedLinear",
    "dequantize_layers",
    "install",
    "put_everywhere",
    "quantized_layers",
    "replace_module",
    "settle",
]
