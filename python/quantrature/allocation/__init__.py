"""From what each matrix costs to a plan that fits a budget."""

from ._allocate import ALLOCATORS, allocate
from .constraints import Constraints
from .groups import fusion_groups
from .knapsack import Selection, choose
from .loss import LossModel
from .options import Option, stored_bytes
from .published import TableChoice, boost, conspicuous, mxq
from .table import CONFIGURATIONS, Configuration, CostTable, ladder, read_table

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
    "allocate",
    "boost",
    "choose",
    "conspicuous",
    "fusion_groups",
    "ladder",
    "mxq",
    "read_table",
    "stored_bytes",
]
