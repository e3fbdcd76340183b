"""Estimate how much the loss changes when each matrix is quantized, without changing the model."""

from ._analyze import analyze
from .at_plan import integrate_plan, measure_plan
from .integral import ABS_MODES, Integral, integrate
from .metrics import METRICS
from .objective import OBJECTIVES
from .quadrature import RULES, quadrature
from .sensitivity import AtPlan, MatrixSensitivity, Proof, Sensitivity

__all__ = [
    "ABS_MODES",
    "METRICS",
    "OBJECTIVES",
    "RULES",
    "AtPlan",
    "Integral",
    "MatrixSensitivity",
    "Proof",
    "Sensitivity",
    "analyze",
    "integrate",
    "integrate_plan",
    "measure_plan",
    "quadrature",
]
