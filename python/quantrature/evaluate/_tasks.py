"""Benchmark tasks of the LM Evaluation Harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._C import InvalidArgumentError
from ..exports import load, target_of
from ..models import load_model, load_tokenizer
from ..text import own_bos


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        name: name of the task or group.
        metrics: metric name with its filter, as in the harness (``acc,none``), to value.
        errors: the same names to standard errors, for metrics that have one.
        bos: ``window`` if every request began with BOS, otherwise ``none``.
    """

    name: str
    metrics: dict[str, float]
    errors: dict[str, float]
    bos: str = "none"


def tasks(
    model: str | os.PathLike[str],
    names: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 8,
    bos: str = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[TaskResult]:
    """Run tasks of the LM Evaluation Harness (the package ``lm_eval``) on a model.

    Args:
        model: model folder, or id on the Hugging Face Hub; quantized or not, or exported.
        names: names of tasks or groups.
        include_path: a folder with your own task definitions.
        num_fewshot: number of examples in each prompt; by default as the task defines it.
        limit: use only this many documents of each task; below 1, this fraction of them. By default all.
        batch_size: prompts per forward pass, or ``"auto"``.
        bos: ``"auto"`` adds BOS to each request if the tokenizer adds it by default; ``"window"`` raises an error
            if it does not; ``"none"`` adds none.
        dtype, trust_remote_code: as in :func:`quantrature.models.load_model`.
        device: device to run on, such as ``"cuda:0"``.

    Raises:
        InvalidArgumentError: for another ``bos``, for no names or an unknown task, and if ``lm_eval`` is not installed.
    """
    if not names:
        raise InvalidArgumentError("[eval] tasks must name at least one task")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"[eval] tasks need {error.name}, which is not installed: pip install 'quantrature[eval]'"
        ) from None
    tokenizer = load_tokenizer(model, trust_remote_code)
    add_bos = _adds_bos(tokenizer, bos)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InvalidArgumentError(f"[eval] tasks must be known to the LM Evaluation Harness: got {unknown[0]!r}")
    # Loaded here: the harness takes the class of transformers where a folder has code for a class of the same name.
    loading = load_model if target_of(model) is None else load
    loaded: Any = loading(model, dtype, trust_remote_code=trust_remote_code)
    loaded.to(device)
    found: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos),
        tasks=list(names),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    said = "window" if add_bos else "none"
    return [_result(name, values, said) for name, values in found["results"].items()]


def _adds_bos(tokenizer: Any, bos: str) -> bool:
    """Whether to let the tokenizer add special tokens. Releases of the harness have different defaults."""
    if bos not in ("auto", "none", "window"):
        raise InvalidArgumentError(f"[eval] bos must be auto, none or window for tasks: got bos={bos}")
    adds = bool(own_bos(tokenizer))
    if bos == "window" and not adds:
        raise InvalidArgumentError("[eval] bos=window needs a tokenizer that adds BOS by default: use bos=auto")
    return adds and bos != "none"


def _result(name: str, values: dict[str, Any], bos: str) -> TaskResult:
    numbers = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, (int, float))}
    errors = {key.replace("_stderr,", ","): value for key, value in numbers.items() if "_stderr," in key}
    return TaskResult(name, {key: value for key, value in numbers.items() if "_stderr," not in key}, errors, bos)
