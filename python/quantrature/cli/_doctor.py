"""``quantrature doctor``: show installed versions, kernels in use, threads and CUDA."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

from .. import __version__, available_targets, num_threads, target
from .._C import cuda_device_count
from ._options import Json
from ._output import print_json, print_table, stdout_kept_clean

LOADED = ("numpy", "torch", "transformers")
"""Packages that are imported to read their version, so that a broken installation shows."""
INSTALLED = ("accelerate", "datasets", "safetensors", "tokenizers")


def run(as_json: Json = False) -> None:
    """Show versions of packages, the kernels in use, the number of threads, and whether CUDA works."""
    with stdout_kept_clean(as_json):
        found: dict[str, Any] = {
            "quantrature": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: _loaded(name) for name in LOADED} | {name: _installed(name) for name in INSTALLED},
            "kernels": _kernels(),
            "threads": num_threads(),
            "cuda": _cuda(),
        }
    if as_json:
        print_json(found)
        return
    kernels = found["kernels"]
    rows = [
        ("quantrature", found["quantrature"]),
        ("Python", f"{found['python']} on {found['platform']}"),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("kernels", f"{kernels['in_use']} of {', '.join(kernels['available'])}"),
        *([("", kernels["why_not_simd"])] if kernels["why_not_simd"] else []),
        ("threads", str(found["threads"])),
        ("CUDA", found["cuda"]["why_not"] or f"{found['cuda']['devices']} devices"),
    ]
    print_table("quantrature doctor", rows)


def _loaded(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        return f"does not load: {error}"
    except Exception as error:
        return f"does not load: {type(error).__name__}: {' '.join(str(error).split())}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    devices, why_not = cuda_device_count()
    return {"devices": devices, "why_not": f"off: {why_not}" if why_not else None}


def _kernels() -> dict[str, Any]:
    available, in_use = available_targets(), target()
    why = None
    if available == ["reference"]:
        why = "this build has no SIMD kernels; it was made without Highway or with QUANTRATURE_SIMD=OFF"
    elif in_use == "reference":
        why = f"SIMD is off: QUANTRATURE_TARGET={os.environ.get('QUANTRATURE_TARGET', '')}"
    return {"available": available, "in_use": in_use, "why_not_simd": why}
