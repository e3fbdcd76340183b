"""Quantized models as folders: written whole or not at all, looked into without loading, compared with their source."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._C import InvalidArgumentError, QuantratureError
from .json_files import read_json

if TYPE_CHECKING:
    from .plan import Plan
    from .requantization import Requantization

QUANT_METHOD = "quantrature"
FORMAT_VERSION = 2

REMOTE_CODE = "modeling_quantrature"
"""Name of the Python file that lets transformers open a folder in a process that did not import quantrature."""


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when the ``with`` block ends well, and vanishes otherwise.

    What a killed process left behind is a hidden ``.NAME.partial`` beside it, which the next attempt removes.

    Raises:
        InvalidArgumentError: when the folder is a file, or is there, not empty, and not to be overwritten.
        QuantratureError: when the disk is full.
    """
    target = Path(folder)
    check_new_folder(target, overwrite)
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise QuantratureError(f"[save] the disk is full; nothing was written to {target}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse an output folder that holds something; asked before long work starts.

    Raises:
        InvalidArgumentError: naming the folder.
    """
    target = Path(folder)
    if target.is_file():
        raise InvalidArgumentError(f"[save] {target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InvalidArgumentError(f"[save] {target} exists and is not empty; --overwrite replaces it")


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
    """Write a quantized model with its configuration, generation settings, tokenizer, plan and a model card.

    Args:
        model: what :func:`quantrature.quantize` returned.
        folder: appears complete or not at all.
        tokenizer: written beside the model.
        processor: files copied beside the model unless the tokenizer wrote them
            (:func:`quantrature.models.processor_files`).
        plan: written as plan.json.
        requant: written as requant.json. A plan cannot say which weights ReQuant keeps, so one goes without the other.
        source: name of the original model, for the card.
        overwrite: replace a folder that is not empty.
        max_shard_size: of one safetensors file.
        auto_map: write a Python file, too, that imports quantrature, and name it in config.json, so that
            ``from_pretrained(folder, trust_remote_code=True)`` opens the folder in a process that did not import it.

    Raises:
        InvalidArgumentError: for a folder that is not empty, or with auto_map for a model that comes with code of its
            own or has no class of transformers.
        QuantratureError: when the disk is full.
    """
    from .models.loading import quiet

    if auto_map and model.is_custom_code():
        raise InvalidArgumentError(f"[save] auto_map: {type(model).__name__} comes with code of its own")
    classes = _auto_classes(model)
    if auto_map and not classes:
        raise InvalidArgumentError(f"[save] auto_map: no auto class of transformers makes a {type(model).__name__}")
    with new_folder(folder, overwrite) as partial, quiet():
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if auto_map:
            _write_remote_code(partial, type(model).__name__, classes)
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
        (partial / "README.md").write_text(_card(inspect(partial), source, model, auto_map))


def _auto_classes(model: Any) -> list[str]:
    """The auto classes of transformers that make a model's class of its configuration."""
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


def _write_remote_code(folder: Path, name: str, auto_classes: Iterable[str]) -> None:
    (folder / f"{REMOTE_CODE}.py").write_text(
        f"import quantrature  # registers the format\nimport transformers\n\n\n"
        f"class {name}(transformers.{name}):\n    pass\n"
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {auto: f"{REMOTE_CODE}.{name}" for auto in auto_classes}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _opened_by(model: Any) -> tuple[str, str]:
    """The class of transformers by which a model is opened, and what its ``from_pretrained`` takes beside the path."""
    name = type(model).__name__
    own = getattr(model.config, "auto_map", None) or {}
    if model.is_custom_code():
        named = (auto for auto, code in own.items() if isinstance(code, str) and code.rpartition(".")[2] == name)
        return next(named, "AutoModelForCausalLM"), ", trust_remote_code=True"
    classes = _auto_classes(model)
    ending = f"AutoModelFor{name.rpartition('For')[2]}"
    several = (ending, "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", *classes)
    return next((auto for auto in several if auto in classes), name), ""


def _card(contents: Contents, source: str, model: Any, auto_map: bool) -> str:
    opened_by, more = _opened_by(model)
    trusting = """
Where quantrature is installed, `from_pretrained("PATH", trust_remote_code=True)` needs no import.
"""
    base = f"base_model: {source}\n" if source and not Path(source).exists() else ""
    return f"""---
library_name: transformers
{base}tags:
- quantized
- quantrature
---
# {Path(source).name or "Model"}, {contents.bits_per_weight:.2f} bits per weight

Quantized by [quantrature](https://pypi.org/project/quantrature). {len(contents.modules)} matrices take
{contents.bytes:,} bytes, {contents.bits_per_weight:.3f} bits per weight, scales, zeros and outliers included.

```python
import quantrature  # registers the format with transformers
from transformers import {opened_by}

model = {opened_by}.from_pretrained("PATH"{more})
```
{trusting if auto_map else ""}"""


@dataclass(frozen=True)
class Contents:
    """What a quantized folder holds.

    Attributes:
        bits_per_weight: of the quantized matrices, everything that is stored for them counted.
        bytes: of the quantized matrices.
        other_bytes: of all other tensors.
        modules: matrix name to its description (:class:`quantrature.storage.MatrixSpec`), and setting (the same in
            short), bytes, bits_per_weight.
    """

    bits_per_weight: float
    bytes: int
    other_bytes: int
    modules: Mapping[str, Mapping[str, Any]]


def is_quantized(folder: str | os.PathLike[str]) -> bool:
    """Whether quantrature quantized the model of a folder.

    Raises:
        InvalidArgumentError: for a config.json that is there and is not JSON.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "checkpoint") if path.is_file() else None
    about = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(about, dict) and about.get("quant_method") == QUANT_METHOD


def quantization_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a folder made by quantrature.

    Raises:
        InvalidArgumentError: when there is no config.json, or it is not of a model quantized by quantrature.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "checkpoint")
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise InvalidArgumentError(f"[checkpoint] {folder} holds no model quantized by quantrature")
    if found.get("format_version") != FORMAT_VERSION:
        raise InvalidArgumentError(
            f"[checkpoint] {path} has format_version {found.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}"
        )
    if not isinstance(found.setdefault("modules", {}), dict):
        raise InvalidArgumentError(f"[checkpoint] {path}: modules must be an object: got {found['modules']!r}")
    return found


def inspect(folder: str | os.PathLike[str]) -> Contents:
    """Sizes of everything in a quantized folder, from its configuration and the headers of its files.

    Raises:
        InvalidArgumentError: for a folder that quantrature did not make, or whose description is broken.
        QuantratureError: naming the file that is truncated or corrupted, or the tensor that is missing or of another
            shape or dtype than its description says.
    """
    from .storage import MatrixSpec

    described_modules = quantization_config(folder)["modules"]
    stored = stored_tensors(sorted(Path(folder).glob("*.safetensors")))
    if not stored:
        raise InvalidArgumentError(f"[checkpoint] {folder} has no safetensors files")
    others = dict(stored)
    modules: dict[str, dict[str, Any]] = {}
    for name, described in described_modules.items():
        try:
            spec = MatrixSpec.from_json(described)
            layout = list(spec.layout())
        except InvalidArgumentError as e:
            raise InvalidArgumentError(f"[checkpoint] {name}: {str(e).removeprefix('[checkpoint] ')}") from None
        for tensor, shape, dtype in layout:
            full = f"{name}.{tensor}"
            if full not in stored:
                raise QuantratureError(f"[checkpoint] {folder} lacks the tensor {full}")
            stored[full].check(full, shape, dtype)
            others.pop(full, None)
        modules[name] = spec.to_json() | {
            "setting": spec.dense.setting,
            "bytes": spec.nbytes,
            "bits_per_weight": 8 * spec.nbytes / spec.dense.numel,
        }
    nbytes = sum(m["bytes"] for m in modules.values())
    weights = sum(m["shape"][0] * m["shape"][1] for m in modules.values())
    return Contents(
        8 * nbytes / weights if weights else 0.0, nbytes, sum(tensor.nbytes for tensor in others.values()), modules
    )


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor: dtype in its own terms, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Refuse a tensor of another shape or dtype than a description says.

        Raises:
            QuantratureError: naming the tensor.
        """
        if (self.dtype, self.shape) != (_DTYPES[dtype], shape):
            raise QuantratureError(
                f"[checkpoint] tensor {name} must be {_DTYPES[dtype]} of shape {list(shape)}: got {self.dtype} of "
                f"shape {list(self.shape)}"
            )


_DTYPES = {
    "uint8": "U8",
    "uint16": "U16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
}
"""What safetensors calls the dtypes of stored forms."""


def stored_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files, from their headers.

    Raises:
        QuantratureError: naming a file that is truncated or corrupted.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, "pt"):  # checks that offsets, shapes and the size of the file go together
                pass
        except (SafetensorError, OSError) as e:
            raise QuantratureError(f"[checkpoint] {path} is truncated or corrupted: {e}") from None
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                found[name] = StoredTensor(about["dtype"], tuple(about["shape"]), end - begin)
    return found
