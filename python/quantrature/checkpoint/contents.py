"""Look into a quantized folder without loading its model."""

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
    """What a quantized folder holds.

    Attributes:
        bits_per_weight: of the quantized matrices, everything that is stored for them counted.
        bytes: of the quantized matrices.
        other_bytes: of all other tensors.
        modules: matrix name to its description (:class:`quantrature.packed.MatrixSpec`), and setting (the same in
            short), bytes, bits_per_weight.
    """

    bits_per_weight: float
    bytes: int
    other_bytes: int
    modules: Mapping[str, Mapping[str, Any]]


def is_quantized(folder: str | os.PathLike[str]) -> bool:
    """Whether quantrature quantized the model of a folder.

    Raises:
        InvalidArgumentError: for a config.json that is there and is not JSON.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "checkpoint") if path.is_file() else None
    about = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(about, dict) and about.get("quant_method") == QUANT_METHOD


def quantization_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a folder made by quantrature.

    Raises:
        InvalidArgumentError: when there is no config.json, or it is not of a model quantized by quantrature.
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
    """Sizes of everything in a quantized folder, from its configuration and the headers of its files.

    Raises:
        InvalidArgumentError: for a folder that quantrature did not make, or whose description is broken.
        QuantratureError: naming the file that is truncated or corrupted, or the tensor that is missing or of another
            shape or dtype than its description says.
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
