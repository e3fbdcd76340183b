"""The low-level operations, on NumPy arrays and CPU torch tensors, without copies."""

from ._moments import Moments, kurtosis, moments
from ._packing import pack, row_bytes, unpack

__all__ = ["Moments", "kurtosis", "moments", "pack", "row_bytes", "unpack"]
