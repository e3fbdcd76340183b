"""Save a quantized model to a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._C import InvalidArgumentError
from ..files.new_folder import new_folder
from ..files.remote_code import write_remote_code
from .card import model_card
from .contents import inspect

if TYPE_CHECKING:
    from ..plan import Plan
    from ..requantization import Requantization


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    processor: Iterable[Path] = (),
    plan: Plan | None = None,
    requant: Requantization | None = None,
    source: str = "",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    auto_map: bool = False,
) -> None:
    """Save a quantized model with its configuration, generation settings, tokenizer, plan and a model card.

    Args:
        model: a model that :func:`quantrature.quantize` returned.
        folder: folder to write. If an error occurs, no partial folder is left.
        tokenizer: tokenizer to save in the folder, if given.
        processor: files to copy into the folder, unless the tokenizer writes them
            (:func:`quantrature.models.processor_files`).
        plan: plan to save as plan.json, if given.
        requant: record to save as requant.json, if given. Give either ``plan`` or ``requant``: a plan does not tell
            which weights ReQuant keeps.
        source: name of the original model, for the model card.
        overwrite: replace a folder that is not empty.
        max_shard_size: largest size of one safetensors file, such as ``"5GB"``.
        auto_map: also save Python code that imports quantrature, and name it in config.json. Then
            ``from_pretrained(folder, trust_remote_code=True)`` works in a process that has not imported quantrature.

    Raises:
        InvalidArgumentError: if the folder is not empty; with ``auto_map``, if the model has code of its own or no
            auto class of transformers.
        QuantratureError: if the disk is full.
    """
    from ..models.loading import quiet

    if auto_map and model.is_custom_code():
        raise InvalidArgumentError(
            f"[save] auto_map must be false for a model with code of its own: got {type(model).__name__}"
        )
    classes = _auto_classes(model)
    if auto_map and not classes:
        raise InvalidArgumentError(
            f"[save] auto_map must be false for a model without an auto class: got {type(model).__name__}"
        )
    with new_folder(folder, overwrite) as partial, quiet():
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if auto_map:
            write_remote_code(partial, type(model).__name__, classes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for file in processor:
            part = Path("additional_chat_templates") if file.suffix == ".jinja" and file.stem != "chat_template" else ""
            (partial / part).mkdir(exist_ok=True)
            if not (partial / part / file.name).exists():
                shutil.copyfile(file, partial / part / file.name)
        if plan is not None:
            plan.save(partial / "plan.json")
        if requant is not None:
            requant.save(partial / "requant.json")
        (partial / "README.md").write_text(model_card(inspect(partial), source, *_opened_by(model), auto_map))


def _auto_classes(model: Any) -> list[str]:
    """Return the auto classes of transformers that build the model's class from its configuration."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    own, config = type(model), type(model.config)
    found = []
    for name, auto in vars(modeling_auto).items():
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto is not _BaseAutoModelClass:
            mapping: Any = auto._model_mapping
            made: Any = mapping[config] if mapping is not None and config in mapping else ()
            if own is made or (isinstance(made, tuple) and own in made):
                found.append(name)
    return found


def _opened_by(model: Any) -> tuple[str, str]:
    """Return the transformers class that loads a model, and the further arguments of its ``from_pretrained``."""
    name = type(model).__name__
    own = getattr(model.config, "auto_map", None) or {}
    if model.is_custom_code():
        named = (auto for auto, code in own.items() if isinstance(code, str) and code.rpartition(".")[2] == name)
        return next(named, "AutoModelForCausalLM"), ", trust_remote_code=True"
    classes = _auto_classes(model)
    ending = f"AutoModelFor{name.rpartition('For')[2]}"
    several = (ending, "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", *classes)
    return next((auto for auto in several if auto in classes), name), ""
