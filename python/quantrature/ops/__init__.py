"""The low-level operations, on NumPy arrays and CPU torch tensors, without copies."""

from ._grid import QuantizedTensor, dequantize, quantize
from ._moments import Moments, kurtosis, moments
from ._packing import pack, row_bytes, unpack

__all__ = [
    "Moments",
    "QuantizedTensor",
    "dequantize",
    "kurtosis",
    "moments",
    "pack",
    "quantize",
    "row_bytes",
    "unpack",
]
