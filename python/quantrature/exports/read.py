"""Read exported folders back, as models of transformers with dense weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .._C import InvalidArgumentError, QuantratureError
from ..files.json_files import read_json
from .target import Target, Weights
from .targets import TARGETS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def target_of(folder: str | os.PathLike[str]) -> Target | None:
    """Return the target of an exported folder; ``None`` for any other folder, and for ids on the Hub.

    Raises:
        InvalidArgumentError: if config.json exists and is not JSON.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "export") if path.is_file() else None
    if not isinstance(config, dict):
        return None
    return next((target for target in TARGETS.values() if target.owns(path.parent, config)), None)


def weights_of(folder: str | os.PathLike[str]) -> tuple[Target, Weights]:
    """Read the weights of an exported folder.

    Raises:
        InvalidArgumentError: if the folder is of no target.
        QuantratureError: if a tensor or an entry of config.json is missing or does not fit the others; the message
            names it, or the file.
    """
    target = target_of(folder)
    if target is None:
        raise InvalidArgumentError(
            f"[load] folder must be one that quantrature export wrote, for {', '.join(TARGETS)}: got {folder}"
        )
    try:
        return target, target.read(Path(folder))
    except QuantratureError:
        raise
    except Exception as error:
        about = f"it lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise QuantratureError(f"[load] {folder} is damaged, or not of the target {target.name}: {about}") from error


def load(
    folder: str | os.PathLike[str], dtype: str | torch.dtype = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load an exported folder as a model of transformers with dense weights, without the engine.

    The values of quantized matrices are computed in float32, as the engine defines them.

    Args:
        folder: a folder that :func:`quantrature.export` wrote.
        dtype: dtype of all weights, "float32", "bfloat16" or "float16".
        trust_remote_code: run Python code from the folder, as in transformers.

    Raises:
        InvalidArgumentError: if the folder is of no target.
        QuantratureError: if tensors are missing, damaged or of other shapes than the model's; the message names them.
    """
    from ..models.loading import load_tensors

    _, weights = weights_of(folder)
    return load_tensors(folder, {**weights.others, **weights.quantized}, dtype, trust_remote_code)
