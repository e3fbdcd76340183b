"""From what each matrix costs to a plan that fits a budget."""

from ._allocate import ALLOCATORS, allocate
from .constraints import Constraints
from .groups import fusion_groups
from .knapsack import Selection, choose
from .loss import LossModel
from .options import Option, stored_bytes

__all__ = [
    "ALLOCATORS",
    "Constraints",
    "LossModel",
    "Option",
    "Selection",
    "allocate",
    "choose",
    "fusion_groups",
    "stored_bytes",
]
