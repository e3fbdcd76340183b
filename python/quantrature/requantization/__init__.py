"""ReQuant: quantize, compute the cost of each weight, and keep the costliest weights unquantized (arXiv 2503.01901)."""

from ._requant import requant
from .folder import requant_folder
from .outliers import SELECTIONS, SHARES, TEMPERATURES
from .record import KeptWeights, Requantization, Stage, Trial

__all__ = [
    "SELECTIONS",
    "SHARES",
    "TEMPERATURES",
    "KeptWeights",
    "Requantization",
    "Stage",
    "Trial",
    "requant",
    "requant_folder",
]
