"""Write quantized models as other engines load them, and plans as options of other quantization tools."""

from __future__ import annotations

import importlib
from typing import Any

from .plans import FORMATS, export_plan, to_text

# Loaded on first use: plans are exported without torch.
_LAZY = {
    "TARGETS": ".targets",
    "Exported": "._export",
    "ExportedMatrix": "._export",
    "Fit": ".target",
    "Setting": ".target",
    "Target": ".target",
    "export": "._export",
    "load": ".read",
    "target_of": ".read",
    "verify": "._verify",
}

__all__ = [
    "FORMATS",
    "TARGETS",
    "Exported",
    "ExportedMatrix",
    "Fit",
    "Setting",
    "Target",
    "export",
    "export_plan",
    "load",
    "target_of",
    "to_text",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
