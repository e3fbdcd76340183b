"""The target mlx: folders that mlx-lm loads on Apple GPUs and on CPUs.

Each matrix is codes, scales s and biases B: the value of a code q is ``s * q + B``, so that B is minus scale times zero
point, and any zero point goes over. Codes are a bit stream along each row, in words of 32 bits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files.json_files import read_json
from .bitstream import pack_words, unpack_words, words_in_row
from .grid import Floats, Grid
from .safetensors_folder import read_tensors, write_folder
from .target import Content, Encoded, Fit, Setting, Target, Weights, held, refused

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
"""Bits and group sizes for which MLX has kernels. Its CPU build computes garbage for others, without an error."""

PARTS = ("weight", "scales", "biases")

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
_STACKED = re.compile(r"(.+)\.switch_mlp\.(\w+)")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Names of the projections of an expert in checkpoints of Mixtral, to the names in mlx-lm."""


def _fit(setting: Setting) -> Fit:
    if setting.beyond_a_grid:
        return refused("mlx", f"cannot hold {setting.beyond_a_grid}")
    group = setting.largest_group(GROUPS)
    if group is None:
        cols = setting.shape[1]
        if cols % min(GROUPS):
            return refused("mlx", f"needs columns that are a multiple of 32, but it has {cols}; keep it unquantized")
        size = max(size for size in GROUPS if cols % size == 0 and size <= max(setting.group, min(GROUPS)))
        nearest = f"b{setting.bits}g{size}"
        return refused(
            "mlx", f"needs whole groups of 32, 64 or 128, but it has {setting.form}; quantize it as {nearest}"
        )
    return held(setting, bits=min(bits for bits in BITS if bits >= setting.bits), group_size=group)


def _encode(grid: Grid, setting: Setting) -> Encoded:
    exact = -grid.zeros.astype(np.float64) * grid.scale
    biases = torch.from_numpy(exact).to(getattr(torch, _parameter_dtype(setting)))
    if not np.array_equal(biases.double().numpy(), exact):
        biases = torch.from_numpy(exact).float()
    return {
        "weight": torch.from_numpy(pack_words(grid.codes, grid.bits)),
        "scales": torch.from_numpy(grid.scale).to(biases.dtype),
        "biases": biases,
    }


def _parameter_dtype(setting: Setting) -> str:
    """Return the dtype of scales and biases that has the biases exactly, but for extreme scales."""
    # A looked-up row of the table has the dtype of its scales: float16 would round it.
    wide = not setting.sym or (setting.embedding and setting.scale_dtype == "float16")
    return "float32" if wide else setting.scale_dtype


def _decode(encoded: Encoded, setting: Setting) -> Floats:
    """Values in float64, rounded once: MLX multiplies and adds in one step or in two, depending on the build."""
    codes = unpack_words(encoded["weight"].numpy(), setting.bits, setting.shape[1])
    scales, biases = (np.repeat(encoded[part].double().numpy(), setting.group, axis=1) for part in ("scales", "biases"))
    found: Floats = (scales * codes + biases).astype(np.float32)
    return found


def _nbytes(setting: Setting) -> int:
    rows, cols = setting.shape
    parameter = 4 if _parameter_dtype(setting) == "float32" else 2
    return 4 * rows * words_in_row(cols, setting.bits) + 2 * parameter * setting.groups


def _scheme(setting: Setting) -> dict[str, Any]:
    return {"group_size": setting.group, "bits": setting.bits}


def _alike(name: str) -> str:
    """Matrices that mlx-lm stacks into one tensor: a projection of all experts of a layer."""
    expert = _EXPERT.fullmatch(name)
    return f"{expert[1]}.{expert[3]}" if expert else name


def _write(content: Content, folder: Path) -> None:
    stacks: dict[str, dict[int, str]] = {}
    for name in content.encoded:
        expert = _EXPERT.fullmatch(name)
        if expert:
            stacked = f"{expert[1]}.switch_mlp.{_MIXTRAL.get(expert[3], expert[3])}"
            stacks.setdefault(stacked, {})[int(expert[2])] = name
        else:
            stacks[name] = {-1: name}
    encoded, entries = {}, {}
    for name, members in stacks.items():
        of_members = [content.encoded[member] for _, member in sorted(members.items())]
        encoded[name] = of_members[0] if -1 in members else {p: torch.stack([m[p] for m in of_members]) for p in PARTS}
        setting = content.settings[next(iter(members.values()))]
        entries[name] = _scheme(setting)
    (most, _), *_ = Counter(tuple(entry.items()) for entry in entries.values()).most_common(1)
    about = {**dict(most), "mode": "affine", **entries}
    # mlx-lm reads the first, the Hugging Face Hub shows the second.
    config = {**_with_earlier_names(content.config), "quantization": about, "quantization_config": about}
    write_folder(folder, config, encoded, content.tensors, content.files, "mlx")


def _with_earlier_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the fields of rotary embeddings that configurations had before transformers 5.

    Many models of mlx-lm read only these, and take defaults in the place of missing ones.
    """
    found = {
        key: _with_earlier_names(value) if key.endswith("_config") and value else value for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return found
    of_full = rope.get("full_attention", rope)
    if "sliding_attention" in rope:
        found.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
    scaling = {key: value for key, value in of_full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in of_full:
            found.setdefault(key, of_full[key])
    if scaling.get("rope_type", "default") != "default":
        found.setdefault("rope_scaling", scaling)
    return found


def _owns(_folder: Path, config: Mapping[str, Any]) -> bool:
    about = config.get("quantization")
    return isinstance(about, dict) and {"group_size", "bits"} <= set(about) and about.get("mode", "affine") == "affine"


def _read(folder: Path) -> Weights:
    about = read_json(folder / "config.json", "export")["quantization"]
    tensors = read_tensors(folder)
    found = Weights()
    mixtral = any(".block_sparse_moe." in name for name in tensors)
    for name in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS}
        entry = about[name] if isinstance(about.get(name), dict) else about
        rows, groups = parts["scales"].shape[-2:]
        setting = Setting((rows, groups * entry["group_size"]), entry["bits"], entry["group_size"])
        stacked = _STACKED.fullmatch(name)
        if not stacked:
            found.quantized[f"{name}.weight"] = torch.from_numpy(_decode(parts, setting))
            continue
        back = {new: old for old, new in _MIXTRAL.items()} if mixtral else {}
        for i in range(len(parts["weight"])):
            expert = f"{stacked[1]}.experts.{i}.{back.get(stacked[2], stacked[2])}"
            values = _decode({part: parts[part][i] for part in PARTS}, setting)
            found.quantized[f"{expert}.weight"] = torch.from_numpy(values)
    found.others.update(tensors)
    return found


MLX = Target(
    name="mlx",
    summary="mlx-lm: 1 to 6 and 8 bits, any zero points, groups of 32, 64 and 128",
    fit=_fit,
    encode=_encode,
    decode=_decode,
    nbytes=_nbytes,
    write=_write,
    owns=_owns,
    read=_read,
    scheme=_scheme,
    alike=_alike,
)
