"""Quantize a model: in memory, while it is loaded, or block by block with calibration text."""

from .model import check_weight, declare, put, quantize, text_settings
from .request import Request, plan_for
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
    "text_settings",
    "units",
]
