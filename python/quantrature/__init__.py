"""quantrature: post-training weight quantization that knows what each weight costs."""

from __future__ import annotations

import importlib
from typing import Any

from ._C import (
    DeviceError,
    InvalidArgumentError,
    QuantratureError,
    UnsupportedError,
    available_targets,
    cuda_device_count,
    num_threads,
    set_num_threads,
    set_target,
    target,
)
from ._C import version as _version
from .integrations import _import_hook

__version__ = _version()

for _error in (QuantratureError, InvalidArgumentError, UnsupportedError, DeviceError):
    _error.__module__ = __name__

_MODULES = {"adapters", "checkpoint", "evaluate", "exports", "methods", "models", "nn", "ops", "text"}

# Loaded on first use: "import quantrature" itself needs NumPy alone.
_LAZY: dict[str, str] = {
    "Plan": ".plan",
    "PlanEntry": ".plan",
    "QuantratureConfig": ".integrations.transformers",
    "Requantization": ".requantization",
    "Sensitivity": ".analysis",
    "adapters": ".integrations.peft",
    "allocate": ".allocation",
    "analyze": ".analysis",
    "checkpoint": ".checkpoint",
    "evaluate": ".evaluate",
    "export": ".exports",
    "exports": ".exports",
    "methods": ".methods",
    "models": ".models",
    "nn": ".nn",
    "ops": ".ops",
    "quantize": ".quantization",
    "quantize_to_budget": ".to_budget",
    "requant": ".requantization",
    "requant_folder": ".requantization",
    "text": ".text",
}

__all__ = [
    "DeviceError",
    "InvalidArgumentError",
    "Plan",
    "PlanEntry",
    "QuantratureConfig",
    "QuantratureError",
    "Requantization",
    "Sensitivity",
    "UnsupportedError",
    "adapters",
    "allocate",
    "analyze",
    "available_targets",
    "checkpoint",
    "cuda_device_count",
    "evaluate",
    "export",
    "exports",
    "methods",
    "models",
    "nn",
    "num_threads",
    "ops",
    "quantize",
    "quantize_to_budget",
    "requant",
    "requant_folder",
    "set_num_threads",
    "set_target",
    "target",
    "text",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantrature' has no attribute '{name}'")
    module = importlib.import_module(_LAZY[name], __name__)
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)


_import_hook.install()
