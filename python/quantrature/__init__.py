"""quantrature: post-training weight quantization that knows what each weight costs."""

from __future__ import annotations

import importlib
from typing import Any

from .integrations import _import_hook as _transformers_hook
from ._C import DeviceError, InvalidArgumentError, QuantratureError, UnsupportedError, available_targets, cuda_device_count, num_threads, set_num_threads, set_target, target
from ._C import version as _version

__version__ = _version()

for _error in (QuantratureError, InvalidArgumentError, UnsupportedError, DeviceError):
    _error.__module__ = __name__

# Loaded on first use: "import quantrature" itself needs NumPy alone.
_LAZY: dict[str, str] = {
    "Plan": ".plan",
    "PlanEntry": ".plan",
    "QuantratureConfig": ".hf",
    "Requantization": ".requantization",
    "Sensitivity": ".analysis",
    "allocate": ".allocation",
    "analyze": ".analysis",
    "evaluate": ".evaluate",
    "models": ".models",
    "ops": ".ops",
    "quantize": "._quantize",
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
    "allocate",
    "analyze",
    "available_targets",
    "cuda_device_count",
    "evaluate",
    "models",
    "num_threads",
    "ops",
    "quantize",
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
    return module if _LAZY[name] == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)


_transformers_hook.install()
