"""Weights that a checkpoint has and the class of its model has not, such as layers for multi-token prediction.

transformers ignores these weights on purpose, and other engines read them. A quantized folder has them unchanged, as
long as the source of the model is at hand.
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
"""Settings of configurations that count layers for multi-token prediction, which follow the others."""


def carried_tensors(model: Any, files: Mapping[str, Path]) -> dict[str, Path]:
    """Choose the tensors of a checkpoint that a quantized folder has to have beside those of the model.

    These are tensors that the class of the model ignores by name, and layers for multi-token prediction; not buffers
    that the model computes. If the model is of another class than was saved, for example without its head, there are
    none.

    Args:
        model: dense or quantized, loaded or on the meta device.
        files: names of the tensors of the checkpoint, and the file of each.

    Returns:
        The names in the checkpoint, and the file of each.
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
    """Name the tensors of the checkpoint that a model was loaded from, and the file of each; none if it is not here."""
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
    """Choose what to carry from the source of a model, and correct a configuration that announces what is lost.

    If the source is not at hand, as for a model that was made in memory, there is nothing to carry. Then the settings
    of the configuration that count layers for multi-token prediction become 0, and a warning says so.

    Returns:
        As :func:`carried_tensors`.
    """
    if not _announced(model.config) and not model._keys_to_ignore_on_load_unexpected:
        return {}
    source = source_tensors(model)
    found = carried_tensors(model, source)
    if not found:
        correct_announced(model, source)
    return found


def correct_announced(model: Any, files: Mapping[str, Path]) -> None:
    """Correct the configuration of a model that announces layers which will not be in a saved folder, and say so.

    A checkpoint of the model's own class without such layers is left alone: it has announced them itself.

    Args:
        model: carries nothing.
        files: names of the tensors of its checkpoint, and the file of each; none if that is not at hand.
    """
    announced = _announced(model.config)
    if not announced or (files and type(model).__name__ in (model.config.architectures or ())):
        return
    for section, name, _ in announced:
        setattr(section, name, 0)
    _log.warning(
        "the configuration announces layers for multi-token prediction, which %s does not have and %s: they will not "
        "be in a saved folder, and %s is set to 0",
        type(model).__name__,
        "which belong to another class" if files else "whose source is not at hand",
        ", ".join(sorted({name for _, name, _ in announced})),
    )


def _announced(config: Any) -> list[tuple[Any, str, int]]:
    """Settings that count layers for multi-token prediction: section of the configuration, name, value above 0."""
    sections = {id(section): section for section in (config, config.get_text_config())}.values()
    described = [(section, section.to_dict()) for section in sections]
    found = [(section, name, about.get(name)) for section, about in described for name in ANNOUNCING]
    return [(section, name, count) for section, name, count in found if isinstance(count, int) and count > 0]


def _further_layers(config: Any) -> list[str]:
    """Patterns for the layers that follow those of the model, as many as the configuration announces."""
    count = max((count for _, _, count in _announced(config)), default=0)
    first = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return [rf"(?:^|\.)layers\.{first + i}\." for i in range(count)]


def read_carried(tensors: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """Read tensors from their files.

    Raises:
        QuantratureError: naming the file that is not there any more.
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
                f"[save] cannot read {path}, which holds weights of the source that are to be saved unchanged: {error}"
            ) from None
    return found
