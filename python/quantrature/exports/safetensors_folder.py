"""Write and read folders with config.json, safetensors files and a tokenizer, which most engines load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._C import QuantratureError
from ..models.loading import tensor_files
from .target import Encoded

MAX_SHARD_SIZE = "5GB"


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    encoded: Mapping[str, Encoded],
    tensors: Mapping[str, torch.Tensor],
    files: Mapping[str, Path],
    made_for: str,
) -> None:
    """Write a folder.

    Args:
        folder: an existing, empty folder.
        config: content of config.json.
        encoded: name of a quantized matrix to its tensors, whose names follow the name of the matrix.
        tensors: all other tensors.
        files: files to copy: path in the folder to path of the file.
        made_for: the ``format`` in the metadata of the safetensors files.
    """
    from huggingface_hub import save_torch_state_dict

    every = dict(tensors)
    for name, parts in encoded.items():
        every |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in every.items()},
        folder,
        max_shard_size=MAX_SHARD_SIZE,
        metadata={"format": made_for},
    )
    write_beside(folder, config, files)


def write_beside(folder: Path, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Write what a folder has besides weights: config.json, and copies of files by their paths in the folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder.

    Raises:
        InvalidArgumentError, QuantratureError: as for :func:`quantrature.models.loading.tensor_files`.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    files = tensor_files(folder)
    for path in dict.fromkeys(files.values()):
        try:
            with safe_open(path, "pt") as file:
                found.update({name: file.get_tensor(name) for name, at in files.items() if at == path})
        except (SafetensorError, OSError) as error:
            raise QuantratureError(f"[export] {path} is truncated or corrupted: {error}") from None
    return found
