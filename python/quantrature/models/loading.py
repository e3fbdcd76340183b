"""Load models, configurations and tokenizers from a folder or the Hugging Face Hub, with one-line errors."""

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
from ..files.remote_code import REMOTE_CODE

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
    """Load a model in evaluation mode, as the class that its configuration names.

    If the model has Python code of its own (``auto_map`` in config.json) and ``trust_remote_code`` is true, its class
    is loaded from this code, even if transformers has a class of the same name. If ``trust_remote_code`` is false, the
    class of transformers is used, and a warning names the code that was not run.

    Args:
        name_or_path: a local folder, or the id of a model on the Hugging Face Hub.
        dtype: ``"auto"`` for the dtype in the checkpoint, or the name of a dtype (``"float32"``), or a torch dtype.
        device_map: as in transformers; needs Accelerate. By default the model is loaded on the CPU.
        trust_remote_code: whether to run Python code from the model's folder.
        max_memory: with ``device_map``: device to the most memory for weights on it, as in transformers.

    Raises:
        InvalidArgumentError: for an unknown dtype, a folder that does not exist, and a folder that is not a model:
            without config.json or weights, or with a model type or quantization method that the installed transformers
            does not know.
        QuantratureError: for a file that is truncated or corrupted (the message names it); for a checkpoint that lacks
            tensors, which transformers would initialize at random, or has them in other shapes (the message names
            them); and for any other error of transformers.
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
        tensor_files(folder)
    with quiet(), _one_error(f"[load_model] cannot load {where}"):
        # Mismatched shapes are reported below, because the error of transformers does not name the tensors.
        model, report = model_class(config, trust_remote_code).from_pretrained(
            where, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **settings
        )
    return _checked(model, report, where, trust_remote_code)


def load_tensors(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model from tensors in memory, as the class that the configuration in a folder names.

    Args:
        folder: a folder with config.json. A ``quantization_config`` in it is ignored, because the tensors are dense.
        tensors: dense weights, by the names of checkpoints.
        dtype, trust_remote_code: as in :func:`load_model`.

    Raises:
        InvalidArgumentError, QuantratureError: as for :func:`load_model`; and if the configuration names no class of
            transformers in ``architectures``.
    """
    config = load_config(folder, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    found = model_class(config, trust_remote_code)
    if not issubclass(found, PreTrainedModel):
        raise InvalidArgumentError(
            f"[load_model] architectures in {Path(folder) / 'config.json'} must name a class of transformers: got "
            f"{config.architectures}"
        )
    with quiet(), _one_error(f"[load_model] cannot load {folder}"):
        model, report = found.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=_dtype(dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return _checked(model, report, str(folder), trust_remote_code)


def _checked(model: Any, report: Mapping[str, Any], where: str, trust_remote_code: bool) -> PreTrainedModel:
    """Return a loaded model after a check that it got all its weights."""
    if not trust_remote_code:
        _warn_of_own_code(model.config, type(model))
    wrong = {f"{key} ({tuple(had)} instead of {tuple(has)})" for key, had, has in report["mismatched_keys"]}
    for tensors, what in ((wrong, "tensors of other shapes"), (set(report["missing_keys"]), "no values for tensors")):
        if tensors:
            raise QuantratureError(f"[load_model] the checkpoint in {where} has {what} of the model: {_some(tensors)}")
    if report["unexpected_keys"]:
        _log.warning("%s has tensors that the model does not use: %s", where, _some(report["unexpected_keys"]))
    return model  # type: ignore[no-any-return]


def load_config(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model, without its weights.

    Raises:
        InvalidArgumentError: as for :func:`load_model`, for errors that are not in the weights.
        QuantratureError: for any other error of transformers.
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
        trust_remote_code: whether to run Python code from the tokenizer's folder.

    Raises:
        InvalidArgumentError: for a folder that does not exist.
        QuantratureError: if the folder has no tokenizer or it cannot be read; the message names the folder.
    """
    folder = _folder(name_or_path, "load_tokenizer")
    where = str(name_or_path if folder is None else folder)
    head = f"[load_tokenizer] cannot load the tokenizer of {where}"
    try:
        with quiet(), _one_error(head):
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except QuantratureError:
        what = _other_content(folder) if folder is not None and not (folder / "config.json").is_file() else ""
        if not what:
            raise
        raise QuantratureError(f"{head}: it is {what}") from None
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the ``with`` block, suppress progress bars and advice of transformers."""
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
    """Turn any error of transformers into a one-line QuantratureError that begins with ``head``."""
    try:
        yield
    except QuantratureError:
        raise
    except Exception as error:
        text = str(error)
        if "couldn't connect to" in text:
            text = "there is no such folder, the model is not in the cache, and the Hugging Face Hub cannot be reached"
        elif "pass the argument `trust_remote_code=True`" in text:
            text = "it needs to run code of its own; pass trust_remote_code=True if you trust it"
        elif "instantiate the backend tokenizer" in text:
            text = "it has no tokenizer that the installed packages can read"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise QuantratureError(f"{head}: {' '.join(lines[:2]) or type(error).__name__}") from error


def _folder(name_or_path: str | os.PathLike[str], op: str) -> Path | None:
    """Return the local folder; ``None`` for an id on the Hub."""
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise InvalidArgumentError(f"[{op}] {text} is {_gguf(folder)}")
    if folder.exists():
        raise InvalidArgumentError(
            f"[{op}] model must be a folder or an id on the Hugging Face Hub: got the file {text}"
        )
    if isinstance(name_or_path, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1:
        raise InvalidArgumentError(
            f"[{op}] model must be a folder or an id on the Hugging Face Hub: there is no such folder: {text}"
        )
    return None


def _other_content(folder: Path) -> str:
    """Return what a folder without a model is, and what to do with it; '' if unknown."""
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        return _gguf(gguf[0])
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = None
        of = f" of {base}" if base else ""
        return (
            f"an adapter (PEFT, such as LoRA){of}, not a model. Merge it first: load the base model, then "
            f'PeftModel.from_pretrained(base, "{folder}").merge_and_unload().save_pretrained(FOLDER)'
        )
    if (folder / "model_index.json").is_file():
        return "a pipeline of diffusers, not a language model"
    if (folder / "sensitivity.json").is_file():
        return "an analysis that quantrature made, not a model"
    for pattern, form in {"consolidated*": "the format of its authors", "*.onnx": "ONNX", "*.pth": "PyTorch"}.items():
        if any(folder.glob(pattern)):
            return f"a model in {form}, which transformers does not load: convert it, or use one with safetensors files"
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
        return f"a folder of models, not a model: give one of the folders inside it ({', '.join(inside[:3])})"
    return ""


def _gguf(path: Path) -> str:
    convert = f'AutoModelForCausalLM.from_pretrained("{path.parent}", gguf_file="{path.name}").save_pretrained(FOLDER)'
    return (
        f"a model in GGUF, the format of llama.cpp ({path.name}). Give the model that it was converted from, or "
        f"convert it back: {convert}"
    )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype in DTYPES else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidArgumentError(f"[load_model] dtype must be one of {', '.join(DTYPES)}: got dtype={dtype}")
    return found


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    """Raise a one-line error for a config.json that transformers rejects at length, or only warns about."""
    path = folder / "config.json"
    if not path.is_file():
        what = _other_content(folder)
        raise InvalidArgumentError(
            f"[load_config] {folder} is {what}"
            if what
            else f"[load_config] {folder} is not a model: it has no config.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"[load_config] {path} is not valid JSON: {error}") from None
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    config = config if isinstance(config, dict) else {}
    kind, own = config.get("model_type"), config.get("auto_map") or {}
    # AutoTokenizer is not checked: its entry is a list of two classes, one in Python and one in Rust.
    if not isinstance(own, dict) or not all(
        isinstance(name, str) for auto, name in own.items() if auto.startswith(("AutoModel", "AutoConfig"))
    ):
        raise InvalidArgumentError(
            f"[load_config] {path}: auto_map must name Python classes by auto class: got {own!r}"
        )
    if kind not in known and not (trust_remote_code and "AutoConfig" in own):
        hint = "; it has code of its own: pass trust_remote_code=True to run it" if "AutoConfig" in own else ""
        raise InvalidArgumentError(
            f"[load_config] {path} must have a model_type that transformers {transformers.__version__} knows: "
            f"got model_type={kind}{hint}"
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InvalidArgumentError(
            f"[load_config] {path} must have a quant_method that is installed: got quant_method={method}"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder.

    Raises:
        InvalidArgumentError: for a folder without weights.
        QuantratureError: for a shard index that is damaged or names a missing file.
    """
    present = [name for name in WEIGHTS if (folder / name).is_file()]
    if not present:
        what = _other_content(folder)
        missing = f"[load_model] {folder} has no weights ({WEIGHTS[0]} or {WEIGHTS[1]})"
        raise InvalidArgumentError(f"{missing}: it is {what}" if what else missing)
    files = [present[0]]
    if present[0].endswith(".index.json"):
        try:
            files = sorted(set(json.loads((folder / present[0]).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise QuantratureError(f"[load_model] {folder / present[0]} is not a valid index of shards") from None
    for name in files:
        if not (folder / name).is_file():
            raise QuantratureError(
                f"[load_model] {folder / present[0]} names a shard that is missing: {name}; download it again"
            )
    return [folder / name for name in files]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the tensor names in the safetensors files of a model, with the file of each.

    Raises:
        InvalidArgumentError, QuantratureError: as for :func:`weight_files`, and for a damaged file, which is named.
    """
    found = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with _opened(path) as file:
                found.update(dict.fromkeys(file.keys(), path))
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; a truncated or corrupted file raises QuantratureError."""
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as raw:
            pointer = raw.read(27) == b"version https://git-lfs.git"
        why = "it is a Git LFS pointer, not the file itself" if pointer else error
        raise QuantratureError(f"[load_model] {path} is truncated or corrupted: {why}") from None
    with opened as file:
        yield file


def model_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Choose the class of a model from its configuration.

    Args:
        config: configuration of the model.
        trust_remote_code: whether to use the model's own Python code, if it has some. If it has several classes, the
            one in ``architectures`` is used, else the causal language model.

    Returns:
        A class of transformers, or an auto class that finds the class in the model's code or in transformers.

    Raises:
        InvalidArgumentError: if the model's ``auto_map`` names no auto class that transformers has.
    """
    named = [getattr(transformers, name, None) for name in config.architectures or []]
    known = [each for each in named if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    own = _own_classes(config) if trust_remote_code else {}
    usable = {auto: name for auto, name in own.items() if hasattr(transformers, auto)}
    if own and not usable and not known:
        raise InvalidArgumentError(
            f"[load_config] auto_map must name an auto class of transformers {transformers.__version__}: "
            f"got {', '.join(own)}"
        )
    for auto, name in usable.items():
        if name.rpartition(".")[2] in (config.architectures or []):
            return getattr(transformers, auto)
    if "AutoModelForCausalLM" in usable:
        return AutoModelForCausalLM
    # If transformers has the class in `architectures`, only the model's own AutoModel class may replace it.
    others = usable if not known else {"AutoModel"} & set(usable)
    if others:
        return getattr(transformers, next(iter(others)))
    return known[0] if known else AutoModelForCausalLM


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model that :func:`load_model` would load on the meta device, without weights.

    Raises:
        InvalidArgumentError: as for :func:`model_class`.
        QuantratureError: for any other error of transformers.
    """
    found = model_class(config, trust_remote_code)
    head = f"[load_model] cannot build the model of {config.name_or_path}"
    with torch.device("meta"), quiet(), _one_error(head):
        if issubclass(found, PreTrainedModel):
            built: PreTrainedModel = found._from_config(config)
        else:
            built = found.from_config(config, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        _warn_of_own_code(config, type(built))
    return built


def _warn_of_own_code(config: PreTrainedConfig, chosen: type[PreTrainedModel]) -> None:
    files = sorted({f"{name.rpartition('.')[0]}.py" for name in _own_classes(config).values()})
    if files:
        _log.warning(
            "%s has Python code of its own (%s), which was not run: %s of transformers is loaded instead. If the model "
            "needs its own code and you trust it, set trust_remote_code.",
            config.name_or_path,
            ", ".join(files),
            chosen.__name__,
        )


def _own_classes(config: PreTrainedConfig) -> dict[str, str]:
    """Return model auto classes to ``FILE.CLASS`` of the model's own code, except code that ``save`` wrote."""
    auto_map: dict[str, str] = getattr(config, "auto_map", None) or {}
    return {
        auto: name
        for auto, name in auto_map.items()
        if auto.startswith("AutoModel") and name.rpartition(".")[0] != REMOTE_CODE
    }


def _some(names: set[str]) -> str:
    """Return the first three names, and the number of others, as text."""
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
