"""The target compressed-tensors, format pack-quantized: folders for vLLM, and for transformers with that package.

Each matrix is codes, scales s and, if the grid is asymmetric, whole zero points z: the value of a code q is
``(q - z) * s``. Codes are a bit stream along each row, zero points along each column, in words of 32 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._C import QuantratureError
from ..files.json_files import read_json
from .bitstream import pack_words, unpack_words, words_in_row
from .grid import Floats, Grid
from .plans import pack_quantized
from .safetensors_folder import read_tensors, write_folder
from .target import Content, Encoded, Fit, Setting, Target, Weights, held, refused

BITS = range(2, 9)
"""1 bit is left out: symmetric values are -1 and 0 there, and -0.5 and 0.5 in quantrature."""

SMALLEST_GROUP = 32
"""Smallest group into which larger ones are divided, if these do not divide the columns."""

_NAME = "compressed-tensors"
_INTEGER_ZEROS = 'its zero points must be whole numbers; quantize it with zero="integer", or symmetrically'


def _fit(setting: Setting) -> Fit:
    if setting.beyond_a_grid:
        return refused(_NAME, f"cannot hold {setting.beyond_a_grid}")
    if setting.embedding:
        return refused(_NAME, "holds no token embedding that transformers loads; keep it unquantized")
    if setting.bits not in BITS:
        return refused(_NAME, f"holds 2 to 8 bits, but it has {setting.form}; quantize it as b2g{setting.group}")
    cols = setting.shape[1]
    group = setting.group if cols % setting.group == 0 else setting.largest_group(range(SMALLEST_GROUP, cols))
    if group is None:
        size = next((size for size in (128, 64, 32) if cols % size == 0), -1)
        what = f"needs groups that divide the {cols} columns, but it has {setting.form}"
        return refused(_NAME, f"{what}; quantize it as b{setting.bits}g{size}")
    reason = "" if setting.sym or setting.integer_zeros else f"{_NAME} cannot hold it: {_INTEGER_ZEROS}"
    return held(setting, reason, group_size=-1 if group == cols else group)


def _encode(grid: Grid, setting: Setting) -> Encoded:
    parts = {
        "weight_packed": torch.from_numpy(pack_words(grid.codes, grid.bits).view(np.int32)),
        "weight_scale": torch.from_numpy(grid.scale).to(getattr(torch, grid.scale_dtype)),
        "weight_shape": torch.tensor(grid.codes.shape),
    }
    if not setting.sym:
        along_columns = pack_words(np.ascontiguousarray(grid.zeros.T.astype(np.uint8)), grid.bits)
        parts["weight_zero_point"] = torch.from_numpy(along_columns.view(np.int32)).T.contiguous()
    return parts


def _decode(encoded: Encoded, setting: Setting) -> Floats:
    rows, cols = setting.shape
    codes = unpack_words(encoded["weight_packed"].numpy().view(np.uint32), setting.bits, cols)
    scale, zero = encoded["weight_scale"].float().numpy(), None
    if not setting.sym:
        packed = encoded["weight_zero_point"].T.contiguous().numpy().view(np.uint32)
        zero = unpack_words(packed, setting.bits, rows).T.astype(np.float32)
    return Grid(codes, scale, zero, setting.bits, setting.group, setting.scale_dtype).values()


def _nbytes(setting: Setting) -> int:
    rows, cols = setting.shape
    scale = 4 if setting.scale_dtype == "float32" else 2
    zeros = 0 if setting.sym else 4 * words_in_row(rows, setting.bits) * (setting.groups // rows)
    return 4 * rows * words_in_row(cols, setting.bits) + scale * setting.groups + zeros + 16


def _scheme(setting: Setting) -> tuple[int, int, bool]:
    return setting.bits, setting.group_size, setting.sym


def _write(content: Content, folder: Path) -> None:
    schemes: dict[tuple[int, int, bool], list[str]] = {}
    for name, setting in content.settings.items():
        schemes.setdefault(_scheme(setting), []).append(name)
    # vLLM refuses linear layers that are neither in a group nor ignored.
    dense = [n.removesuffix(".weight") for n, t in content.tensors.items() if n.endswith(".weight") and t.ndim == 2]
    if content.config.get("tie_word_embeddings") and "lm_head" not in content.settings:
        dense.append("lm_head")
    patterns = {scheme: [f"re:^{re.escape(name)}$" for name in names] for scheme, names in schemes.items()}
    config = {**content.config, "quantization_config": pack_quantized(patterns, dense)}
    write_folder(folder, config, content.encoded, content.tensors, content.files, "pt")


def _owns(_folder: Path, config: Mapping[str, Any]) -> bool:
    about = config.get("quantization_config")
    return isinstance(about, dict) and (about.get("quant_method"), about.get("format")) == (_NAME, "pack-quantized")


def _read(folder: Path) -> Weights:
    groups = read_json(folder / "config.json", "export")["quantization_config"]["config_groups"].values()
    tensors = read_tensors(folder)
    found = Weights()
    for name in [each.removesuffix(".weight_packed") for each in tensors if each.endswith(".weight_packed")]:
        group = next((group for group in groups if any(_selects(target, name) for target in group["targets"])), None)
        if group is None:
            raise QuantratureError(f"[export] config.json of {folder} has no group for the quantized matrix {name}")
        bits, sym = group["weights"]["num_bits"], group["weights"]["symmetric"]
        suffixes = ("weight_packed", "weight_scale", "weight_shape", *(() if sym else ("weight_zero_point",)))
        parts = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in suffixes}
        rows, cols = parts["weight_shape"].tolist()
        setting = Setting((rows, cols), bits, cols // parts["weight_scale"].shape[1], sym)
        found.quantized[f"{name}.weight"] = torch.from_numpy(_decode(parts, setting))
    found.others.update(tensors)
    return found


def _selects(target: str, name: str) -> bool:
    """Whether a target of a group selects a module; class names select every module that is stored packed."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else True


COMPRESSED_TENSORS = Target(
    name=_NAME,
    summary="vLLM and transformers: 2 to 8 bits, symmetric or with whole zero points, groups that divide the columns",
    fit=_fit,
    encode=_encode,
    decode=_decode,
    nbytes=_nbytes,
    write=_write,
    owns=_owns,
    read=_read,
    scheme=_scheme,
    fuses_alike=True,
)
