"""Quantizing by calibration text: what it says about each matrix is found block by block."""

from ..analysis.snapshot import RESUME
from .sequential import Calibrated, calibrate, collect, peak_bytes, units
from .state import BlockState

__all__ = ["RESUME", "BlockState", "Calibrated", "calibrate", "collect", "peak_bytes", "units"]
