"""Allocation: choose a setting (bits, group size, outliers) for each matrix, within a size budget."""

import importlib
from typing import TYPE_CHECKING, Any

from ..plan.fusion import fusion_groups
from ..plan.option import Option, stored_bytes
from ._allocate import STRATEGIES, allocate
from .boosts import conspicuous
from .constraints import Constraints
from .estimate import estimate
from .loss import LossModel
from .published import TableChoice, boost, mxq
from .sources import Source
from .table import CONFIGURATIONS, Configuration, CostTable, ladder, read_table

if TYPE_CHECKING:
    from .activation import activation_sensitivity
    from .validation import Validation, measured_loss_changes, random_plans, validate

_LAZY = {
    "activation_sensitivity": "activation",
    "Validation": "validation",
    "measured_loss_changes": "validation",
    "random_plans": "validation",
    "validate": "validation",
}
"""Public names that need torch, and the module of each."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


__all__ = [
    "CONFIGURATIONS",
    "STRATEGIES",
    "Configuration",
    "Constraints",
    "CostTable",
    "LossModel",
    "Option",
    "Source",
    "TableChoice",
    "Validation",
    "activation_sensitivity",
    "allocate",
    "boost",
    "conspicuous",
    "estimate",
    "fusion_groups",
    "ladder",
    "measured_loss_changes",
    "mxq",
    "random_plans",
    "read_table",
    "stored_bytes",
    "validate",
]
