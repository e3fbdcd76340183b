"""From what each matrix costs to a plan that fits a budget."""

from typing import TYPE_CHECKING, Any

from ._allocate import ALLOCATORS, allocate
from .constraints import Constraints
from .estimate import estimate
from .groups import fusion_groups
from .knapsack import Selection, choose
from .loss import LossModel
from .options import Option, stored_bytes
from .published import TableChoice, boost, conspicuous, mxq
from .table import CONFIGURATIONS, Configuration, CostTable, ladder, read_table

if TYPE_CHECKING:
    from .activation import activation_sensitivity


def __getattr__(name: str) -> Any:
    if name == "activation_sensitivity":  # which needs torch
        from .activation import activation_sensitivity

        return activation_sensitivity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ALLOCATORS",
    "CONFIGURATIONS",
    "Configuration",
    "Constraints",
    "CostTable",
    "LossModel",
    "Option",
    "Selection",
    "TableChoice",
    "activation_sensitivity",
    "allocate",
    "boost",
    "choose",
    "conspicuous",
    "estimate",
    "fusion_groups",
    "ladder",
    "mxq",
    "read_table",
    "stored_bytes",
]
