"""Describe a quantized folder without loading its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._C import InvalidArgumentError, QuantratureError
from ..files.json_files import read_json
from ..packed import MatrixSpec
from .tensors import stored_tensors

QUANT_METHOD = "quantrature"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Contents:
    """Description of a quantized folder.

    Attributes:
        bits_per_weight: mean over the quantized matrices, with scales, zero points, tables and outliers.
        bytes: size of the quantized matrices.
        other_bytes: size of all other tensors.
        modules: matrix name to a JSON object: the fields of :class:`quantrature.packed.MatrixSpec`, and ``setting``
            (their short form), ``bytes`` and ``bits_per_weight``.
    """

    bits_per_weight: float
    bytes: int
    other_bytes: int
    modules: Mapping[str, Mapping[str, Any]]


def is_quantized(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model that quantrature quantized.

    Raises:
        InvalidArgumentError: if config.json exists and is not JSON.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "checkpoint") if path.is_file() else None
    about = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(about, dict) and about.get("quant_method") == QUANT_METHOD


def quantization_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` in the config.json of a quantized folder.

    Raises:
        InvalidArgumentError: if there is no config.json, or it is not of a model quantized by quantrature.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "checkpoint")
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise InvalidArgumentError(f"[checkpoint] {folder} holds no model quantized by quantrature")
    if found.get("format_version") != FORMAT_VERSION:
        raise InvalidArgumentError(
            f"[checkpoint] {path} has format_version {found.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}"
        )
    if not isinstance(found.setdefault("modules", {}), dict):
        raise InvalidArgumentError(f"[checkpoint] {path}: modules must be an object: got {found['modules']!r}")
    return found


def inspect(folder: str | os.PathLike[str]) -> Contents:
    """Return matrices and sizes of a quantized folder, from config.json and the headers of its safetensors files.

    Raises:
        InvalidArgumentError: if quantrature did not make the folder, or its description is invalid.
        QuantratureError: if a file is truncated or corrupted, or a tensor is missing or does not have the shape and
            dtype of its description; the message names the file or tensor.
    """
    described_modules = quantization_config(folder)["modules"]
    stored = stored_tensors(sorted(Path(folder).glob("*.safetensors")))
    if not stored:
        raise InvalidArgumentError(f"[checkpoint] {folder} has no safetensors files")
    others = dict(stored)
    modules: dict[str, dict[str, Any]] = {}
    for name, described in described_modules.items():
        try:
            spec = MatrixSpec.from_json(described)
            layout = list(spec.layout())
        except InvalidArgumentError as e:
            raise InvalidArgumentError(f"[checkpoint] {name}: {str(e).removeprefix('[checkpoint] ')}") from None
        for tensor, shape, dtype in layout:
            full = f"{name}.{tensor}"
            if full not in stored:
                raise QuantratureError(f"[checkpoint] {folder} lacks the tensor {full}")
            stored[full].check(full, shape, dtype)
            others.pop(full, None)
        modules[name] = spec.to_json() | {
            "setting": spec.dense.setting,
            "bytes": spec.nbytes,
            "bits_per_weight": 8 * spec.nbytes / spec.dense.numel,
        }
    nbytes = sum(m["bytes"] for m in modules.values())
    weights = sum(m["shape"][0] * m["shape"][1] for m in modules.values())
    return Contents(
        8 * nbytes / weights if weights else 0.0, nbytes, sum(tensor.nbytes for tensor in others.values()), modules
    )
