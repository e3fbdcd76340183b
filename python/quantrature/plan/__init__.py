"""Plans: how each matrix of a model is stored, its size in bytes, and which matrices must have the same setting."""

from .fusion import fusion_groups
from .option import Option, stored_bytes
from .plan import KEEP_BITS, Plan, PlanEntry

__all__ = ["KEEP_BITS", "Option", "Plan", "PlanEntry", "fusion_groups", "stored_bytes"]
