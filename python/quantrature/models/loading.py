"""Models and tokenizers from a folder or the Hugging Face Hub, or one error that says what is wrong with them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from .._C import InvalidArgumentError, QuantratureError

_log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> PreTrainedModel:
    """Load a model for evaluation, as the class that its configuration names.

    Args:
        name_or_path: a local folder, or the id of a model on the Hugging Face Hub.
        dtype: ``"auto"`` for the one it was saved in, or the name of another (``"float32"``), or a torch dtype.
        device_map: as in transformers; needs Accelerate.
        trust_remote_code: run Python code that comes with the model.
        max_memory: with a device_map, device to what of its memory the weights may take, as in transformers.

    Raises:
        InvalidArgumentError: for another dtype, a folder that does not exist, and a folder that is no model: without
            config.json or weights, or of a model type or quantization method that this transformers does not know.
        QuantratureError: naming the file, for one that is truncated or corrupted; naming the tensors, for a checkpoint
            that lacks some (transformers would leave them random) or has them in other shapes; and for whatever else
            transformers reports.
    """
    folder = _folder(name_or_path, "load_model")
    where = str(name_or_path if folder is None else folder)
    settings: dict[str, Any] = {"dtype": _dtype(dtype), "trust_remote_code": trust_remote_code}
    if device_map is not None:
        settings["device_map"] = device_map
        if max_memory is not None:
            settings["max_memory"] = dict(max_memory)
    config = load_config(name_or_path, trust_remote_code)
    if folder is not None:
        _check_weights(folder)
    with quiet(), _one_error(f"[load_model] cannot load {where}"):
        # Other shapes are left to the report below: transformers' own error does not say which.
        model, report = _model_class(config).from_pretrained(
            where, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **settings
        )
    wrong = {f"{key} ({tuple(had)} instead of {tuple(has)})" for key, had, has in report["mismatched_keys"]}
    for tensors, what in ((wrong, "tensors of other shapes"), (set(report["missing_keys"]), "no values for tensors")):
        if tensors:
            raise QuantratureError(f"[load_model] the checkpoint in {where} has {what} of the model: {_some(tensors)}")
    if report["unexpected_keys"]:
        _log.warning("%s holds tensors that the model has no use for: %s", where, _some(report["unexpected_keys"]))
    return model  # type: ignore[no-any-return]


def load_config(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model: all that there is to know before its weights are read.

    Raises:
        InvalidArgumentError: as :func:`load_model`, for what is not in the weights.
        QuantratureError: for whatever else transformers reports.
    """
    folder = _folder(name_or_path, "load_config")
    where = str(name_or_path if folder is None else folder)
    if folder is not None:
        _check_config(folder, trust_remote_code)
    with quiet(), _one_error(f"[load_config] cannot load {where}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    return config


def load_tokenizer(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name_or_path: a local folder, or the id of a model on the Hugging Face Hub.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        InvalidArgumentError: for a folder that does not exist.
        QuantratureError: naming the folder, when there is no tokenizer in it or it cannot be read.
    """
    folder = _folder(name_or_path, "load_tokenizer")
    where = str(name_or_path if folder is None else folder)
    with quiet(), _one_error(f"[load_tokenizer] cannot load the tokenizer of {where}"):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting progress and advice; its settings are as before afterwards."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _one_error(head: str) -> Iterator[None]:
    """Turn whatever transformers raises into one line that begins with head."""
    try:
        yield
    except QuantratureError:
        raise
    except Exception as error:
        text = str(error)
        if "couldn't connect to" in text:
            text = "it is no folder here, and the Hugging Face Hub cannot be reached and has left nothing in the cache"
        elif "pass the argument `trust_remote_code=True`" in text:
            text = "it runs code of its own; pass trust_remote_code=True if you trust it"
        elif "instantiate the backend tokenizer" in text:
            text = "there is no tokenizer in it that this installation can read"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise QuantratureError(f"{head}: {' '.join(lines[:2]) or type(error).__name__}") from error


def _folder(name_or_path: str | os.PathLike[str], op: str) -> Path | None:
    """The local folder that is meant; None for an id on the Hub."""
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InvalidArgumentError(f"[{op}] a model is a folder or an id on the Hugging Face Hub: got the file {text}")
    if isinstance(name_or_path, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1:
        raise InvalidArgumentError(f"[{op}] there is no such folder: {text}")
    return None


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype in DTYPES else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgumentError(f"[load_model] dtype must be one of {', '.join(DTYPES)}: got dtype={dtype}")
    return found


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    """Refuse what transformers refuses in many words, or only warns about."""
    path = folder / "config.json"
    if not path.is_file():
        raise InvalidArgumentError(f"[load_config] {folder} is no model: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"[load_config] {path} is not valid JSON: {error}") from None
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in known:
        if kind is not None and trust_remote_code and "auto_map" in config:
            return
        hint = "; it comes with code of its own, which trust_remote_code=True would run" if "auto_map" in config else ""
        raise InvalidArgumentError(
            f"[load_config] {path} must name a model_type that transformers {transformers.__version__} knows: "
            f"got model_type={kind}{hint}"
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InvalidArgumentError(
            f"[load_config] {path} must name a quant_method that is available here: got quant_method={method}"
        )


def _check_weights(folder: Path) -> None:
    """Open every safetensors file that will be read: its header says how long the file must be."""
    present = [name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        raise InvalidArgumentError(f"[load_model] {folder} has no weights ({WEIGHTS[0]} or {WEIGHTS[1]})")
    files = [present[0]]
    if present[0].endswith(".index.json"):
        try:
            files = sorted(set(json.loads((folder / present[0]).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise QuantratureError(f"[load_model] {folder / present[0]} is not a valid index of shards") from None
    for name in files:
        path = folder / name
        if not path.is_file():
            raise QuantratureError(f"[load_model] {folder / present[0]} names a shard that is not there: {name}")
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            with path.open("rb") as file:
                pointer = file.read(27) == b"version https://git-lfs.git"
            why = "it is a Git LFS pointer, not the file itself" if pointer else error
            raise QuantratureError(f"[load_model] {path} is truncated or corrupted: {why}") from None


def _model_class(config: Any) -> Any:
    """The class that the configuration names, where transformers has it."""
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModelForCausalLM


def _some(names: set[str]) -> str:
    """A few of many names."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
