"""The low-level operations, on NumPy arrays and CPU torch tensors, without copies."""

from ._moments import Moments, kurtosis, moments

__all__ = ["Moments", "kurtosis", "moments"]
