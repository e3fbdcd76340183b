"""Quantize a model: in memory, while it is loaded, or block by block with calibration text."""

from .layers import check_weight, declare, put
from .model import Request, plan_for, quantize, quantize_by_plan, text_settings
from .sequential import Calibrated, calibrate, collect, peak_bytes, units
from .state import BlockState

__all__ = [
    "BlockState",
    "Calibrated",
    "Request",
    "calibrate",
    "check_weight",
    "collect",
    "declare",
    "peak_bytes",
    "plan_for",
    "put",
    "quantize",
    "quantize_by_plan",
    "text_settings",
    "units",
]
