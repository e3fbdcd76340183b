"""Weights that are in a checkpoint but not in the model's class, such as layers for multi-token prediction.

transformers ignores these weights on purpose, but other engines use them. They are copied unchanged into the quantized
folder if the original checkpoint is available.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._C import QuantratureError
from ..models.loading import tensor_files

_log = logging.getLogger(__name__)

ANNOUNCING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Configuration fields that hold the number of layers for multi-token prediction. These follow the other layers."""


def carried_tensors(model: Any, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the tensors of a checkpoint that must be copied into a quantized folder besides the model's own.

    These are tensors that the model's class ignores by name, and layers for multi-token prediction, but not buffers
    that the model computes. If the model's class is not the one that was saved, for example without its head, there
    are none.

    Args:
        model: dense or quantized, loaded or on the meta device.
        files: tensor name in the checkpoint to its file.

    Returns:
        Tensor name in the checkpoint to its file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if type(model).__name__ not in (model.config.architectures or ()):
        return {}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_further_layers(model.config)]
    if not ignored:
        return {}
    pattern = re.compile("|".join(f"(?:{each})" for each in ignored))
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    has = dict.fromkeys([name for name, _ in model.named_modules()], True)
    found = {}
    for key, path in files.items():
        renamed = rename_source_key(key, renamings, [], model.base_model_prefix, has)[0]
        if not (pattern.search(renamed) or pattern.search(key)) or key.endswith("rotary_emb.inv_freq"):
            continue
        if not {name.rpartition(".")[0] for name in (key, renamed)} & set(has):
            found[key] = path
    return found


def source_tensors(model: Any) -> dict[str, Path]:
    """Return the tensors of the checkpoint that a model was loaded from, with their files; none if it is not local."""
    from transformers.utils.hub import cached_file

    name = getattr(model.config, "_name_or_path", "")
    if not name:
        return {}
    folder = Path(name)
    try:
        if not folder.is_dir():
            config = cached_file(
                name, "config.json", local_files_only=True, revision=getattr(model.config, "_commit_hash", None)
            )
            if config is None:
                return {}
            folder = Path(config).parent
        return tensor_files(folder)
    except (OSError, ValueError, QuantratureError):
        return {}


def carried_from_source(model: Any) -> dict[str, Path]:
    """Return the tensors to copy from the original checkpoint, and correct the configuration if some are lost.

    If the original checkpoint is not available, as for a model made in memory, nothing is copied. The configuration
    fields with the number of layers for multi-token prediction are then set to 0, and a warning is logged.

    Returns:
        Tensor name in the checkpoint to its file, as :func:`carried_tensors`.
    """
    if not _announced(model.config) and not model._keys_to_ignore_on_load_unexpected:
        return {}
    source = source_tensors(model)
    found = carried_tensors(model, source)
    if not found:
        correct_announced(model, source)
    return found


def correct_announced(model: Any, files: Mapping[str, Path]) -> None:
    """Set the number of layers for multi-token prediction to 0 if they will not be saved, and log a warning.

    If the checkpoint is of the model's own class and lacks these layers itself, its configuration is not changed.

    Args:
        model: a model from which no tensors are copied.
        files: tensor name in its checkpoint to file; empty if the checkpoint is not available.
    """
    announced = _announced(model.config)
    if not announced or (files and type(model).__name__ in (model.config.architectures or ())):
        return
    for section, name, _ in announced:
        setattr(section, name, 0)
    _log.warning(
        "the configuration names layers for multi-token prediction, which %s does not have and %s: they will not be "
        "saved, and %s is set to 0",
        type(model).__name__,
        "which belong to another class" if files else "whose checkpoint is not available",
        ", ".join(sorted({name for _, name, _ in announced})),
    )


def _announced(config: Any) -> list[tuple[Any, str, int]]:
    """Return the fields with a number of multi-token prediction layers above 0: section, name, value."""
    sections = {id(section): section for section in (config, config.get_text_config())}.values()
    described = [(section, section.to_dict()) for section in sections]
    found = [(section, name, about.get(name)) for section, about in described for name in ANNOUNCING]
    return [(section, name, count) for section, name, count in found if isinstance(count, int) and count > 0]


def _further_layers(config: Any) -> list[str]:
    """Return name patterns of the multi-token prediction layers that the configuration names."""
    count = max((count for _, _, count in _announced(config)), default=0)
    first = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return [rf"(?:^|\.)layers\.{first + i}\." for i in range(count)]


def read_carried(tensors: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """Read tensors from their files.

    Raises:
        QuantratureError: if a file cannot be read, for example because it was removed; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in dict.fromkeys(tensors.values()):
        try:
            with safe_open(path, "pt") as file:
                for name in (name for name, at in tensors.items() if at == path):
                    found[name] = file.get_tensor(name).clone()  # the file may be the one that is written next
        except (SafetensorError, OSError) as error:
            raise QuantratureError(
                f"[save] cannot read {path}, which holds weights of the original model to copy unchanged: {error}"
            ) from None
    return found
