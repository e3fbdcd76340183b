"""The target gguf: one file with matrices, metadata and tokenizer, for llama.cpp and for what is built on it.

Matrices of the method gguf are copied. Grids go over if GGUF has a type for them: blocks of 32 codes with a scale d,
and an offset m if the grid is asymmetric, both float16. The value of a code q is ``d * (q - zero)`` or ``d * q + m``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .._C import InvalidArgumentError
from ..files.json_files import read_json
from ..ops import GGUF_TYPES, gguf_dequantize
from ..packed.gguf import GgufMatrix, GgufSpec
from .gguf_file import check_model, read_file, write_file
from .gguf_tokenizer import read_tokenizer
from .grid import Floats, Grid
from .safetensors_folder import write_beside
from .target import Content, Encoded, Fit, Setting, Target, Weights, held, refused

FILE = "model.gguf"
BLOCK = 32

OF_GRIDS = {(4, True): "Q4_0", (5, True): "Q5_0", (8, True): "Q8_0", (4, False): "Q4_1", (5, False): "Q5_1"}
"""Bits and symmetry of a grid to the type that has its codes."""

ROUNDING = 1e-6
"""Offsets are a few times as large as the weights, so that rounding them to float16 adds about 2e-7."""


def _fit(setting: Setting) -> Fit:
    if setting.kind == GgufSpec.kind:
        return held(setting)
    instead = "quantize it with 8 bits, sym" if setting.embedding else "quantize it with the method gguf"
    if setting.beyond_a_grid:
        return refused("gguf", f"cannot hold {setting.beyond_a_grid.partition(';')[0]}; {instead}")
    type = OF_GRIDS.get((setting.bits, setting.sym))
    if type is None:
        what = "4, 5 and 8 bits with sym, 4 and 5 bits without"
        return refused("gguf", f"holds grids of {what}, but it has {setting.form}; {instead}")
    if setting.scale_dtype != "float16":
        what = "needs float16 scales; quantize it with scale_dtype float16 and without meta_bits"
        return refused("gguf", f"{what}, or {instead}")
    if setting.largest_group((BLOCK,)) is None:
        return refused("gguf", f"needs groups that are multiples of {BLOCK}, but it has {setting.form}; {instead}")
    return held(setting, group_size=BLOCK, form=type)


def _encode(form: Grid | GgufMatrix, setting: Setting) -> Encoded:
    return {"weight": form.data.cpu() if isinstance(form, GgufMatrix) else torch.from_numpy(_blocks(form))}


def _blocks(grid: Grid) -> npt.NDArray[np.uint8]:
    """Return the blocks of a grid in groups of 32, (rows, bytes of a row)."""
    rows = len(grid.codes)
    codes = grid.codes.reshape(rows, -1, BLOCK)
    parts: list[npt.NDArray[Any]] = [_float16(grid.scale)]
    if grid.zero is not None:
        parts.append(_float16(-grid.zero.astype(np.float64) * grid.scale))
    if grid.bits == 8:
        parts.append(codes ^ 128)  # the bits of code - 128 as int8
    else:
        if grid.bits == 5:
            parts.append(np.packbits(codes >> 4, axis=2, bitorder="little"))
        low = codes & 15
        parts.append(low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4)
    found: npt.NDArray[np.uint8] = np.concatenate(parts, axis=2).reshape(rows, -1)
    return found


def _float16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return values.astype("<f2")[..., None].view(np.uint8)


def _decode(encoded: Encoded, setting: Setting) -> Floats:
    found: Floats = gguf_dequantize(encoded["weight"], setting.form, setting.shape[1]).numpy()
    return found


def _nbytes(setting: Setting) -> int:
    rows, cols = setting.shape
    return rows * GGUF_TYPES[setting.form].row_bytes(cols)


def _check(config: Mapping[str, Any], names: Collection[str], files: Mapping[str, Path]) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InvalidArgumentError(
            "[export] gguf needs the package gguf, which is not installed: pip install 'quantrature[gguf]'"
        ) from None
    check_model(config, names)
    read_tokenizer(files, config["vocab_size"])


def _write(content: Content, folder: Path) -> None:
    write_file(folder / FILE, content, read_tokenizer(content.files, content.config["vocab_size"]))
    # For programs that look at the folder; the file itself has all of this.
    write_beside(folder, content.config, content.files)


def _owns(folder: Path, config: Mapping[str, Any]) -> bool:
    return (folder / FILE).is_file() and "quantization_config" not in config


def _read(folder: Path) -> Weights:
    dtype = read_json(folder / "config.json", "export").get("dtype", "float32")
    return read_file(folder / FILE, getattr(torch, dtype))


GGUF = Target(
    name="gguf",
    summary="llama.cpp: the method gguf; grids of 4, 5 and 8 bits in groups of 32, 64, ... with float16 scales",
    fit=_fit,
    encode=_encode,
    decode=_decode,
    nbytes=_nbytes,
    write=_write,
    owns=_owns,
    read=_read,
    scheme=lambda setting: setting.form,
    check=_check,
    rounding=ROUNDING,
)
