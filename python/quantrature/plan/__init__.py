"""Plans: what each matrix of a model becomes, how many bytes that takes, and which matrices are stored alike."""

from .fusion import fusion_groups
from .option import Option, stored_bytes
from .plan import KEEP_BITS, Plan, PlanEntry

__all__ = ["KEEP_BITS", "Option", "Plan", "PlanEntry", "fusion_groups", "stored_bytes"]
