"""Tasks of the LM Evaluation Harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._C import InvalidArgumentError
from ..models import load_model, load_tokenizer
from ..text import own_bos


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        name: of the task or group.
        metrics: name of a metric, with its filter, to its value, as the harness has it (``acc,none``).
        errors: the same names to standard errors, where there are any.
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
    """Run tasks of the LM Evaluation Harness (the package ``lm_eval``) on a folder or id on the Hub.

    Args:
        model: what transformers loads, quantized or not.
        names: of tasks or groups.
        include_path: a folder with definitions of further tasks.
        num_fewshot: examples in the prompt; ``None`` for what the task says.
        limit: use so many documents of each task, or, below 1, such a share of them.
        batch_size: a number, or ``"auto"``.
        bos: ``"auto"`` begins each request with BOS if the tokenizer adds it by itself, ``"window"`` demands that it
            does, and ``"none"`` adds none.
        dtype, trust_remote_code: as :func:`quantrature.models.load_model`.
        device: to run on.

    Raises:
        InvalidArgumentError: for another ``bos``, without names, without the package, and for a task that there is not.
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
        raise InvalidArgumentError(f"[eval] there is no task of the name {unknown[0]!r}")
    # Loaded here: the harness takes the class of transformers where a folder has code for a class of the same name.
    loaded: Any = load_model(model, dtype, trust_remote_code=trust_remote_code)
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
    """Whether the harness is to let the tokenizer add its special tokens, which releases of it decide differently."""
    if bos not in ("auto", "none", "window"):
        raise InvalidArgumentError(f"[eval] bos must be auto, none or window for tasks: got bos={bos}")
    adds = bool(own_bos(tokenizer))
    if bos == "window" and not adds:
        raise InvalidArgumentError("[eval] bos=window needs, for tasks, a tokenizer that adds BOS by itself: use auto")
    return adds and bos != "none"


def _result(name: str, values: dict[str, Any], bos: str) -> TaskResult:
    numbers = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, (int, float))}
    errors = {key.replace("_stderr,", ","): value for key, value in numbers.items() if "_stderr," in key}
    return TaskResult(name, {key: value for key, value in numbers.items() if "_stderr," not in key}, errors, bos)
