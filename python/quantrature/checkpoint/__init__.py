"""Folders with quantized models: save (all or nothing), inspect without loading, compare with the original model."""

from .contents import FORMAT_VERSION, QUANT_METHOD, Contents, inspect, is_quantized, quantization_config
from .save import save
from .tensors import StoredTensor, stored_tensors

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "Contents",
    "StoredTensor",
    "inspect",
    "is_quantized",
    "quantization_config",
    "save",
    "stored_tensors",
]
