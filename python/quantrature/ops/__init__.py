"""The low-level operations, on NumPy arrays and CPU torch tensors, without copies."""

from ._integral import interpolate, pqi_accumulate, pqi_finalize, pqi_sum
from ._moments import Moments, kurtosis, moments
from ._packing import pack, row_bytes, unpack

__all__ = [
    "Moments",
    "interpolate",
    "kurtosis",
    "moments",
    "pack",
    "pqi_accumulate",
    "pqi_finalize",
    "pqi_sum",
    "row_bytes",
    "unpack",
]
