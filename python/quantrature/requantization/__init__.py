"""ReQuant: quantize, find out what each weight costs, and keep exactly those that cost most (arXiv 2503.01901)."""

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
