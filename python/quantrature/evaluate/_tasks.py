"""Tasks of the LM Evaluation Harness."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._C import InvalidArgumentError


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        name: of the task or group.
        metrics: name of a metric, with its filter, to its value, as the harness has it (``acc,none``).
        errors: the same names to standard errors, where there are any.
    """

    name: str
    metrics: dict[str, float]
    errors: dict[str, float]


def tasks(
    model: str | os.PathLike[str],
    names: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 8,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[TaskResult]:
    """Run tasks of the LM Evaluation Harness (the package ``lm_eval``, model type ``hf``) on a folder or id on the Hub.

    Args:
        model: what transformers loads, quantized or not.
        names: of tasks or groups.
        include_path: a folder with definitions of further tasks.
        num_fewshot: examples in the prompt; ``None`` for what the task says.
        limit: use so many documents of each task, or, below 1, such a share of them.
        batch_size: a number, or ``"auto"``.
        dtype, trust_remote_code: as :func:`quantrature.models.load_model`.
        device: to run on.

    Raises:
        InvalidArgumentError: without names, without the package, and for a task that there is not.
    """
    if not names:
        raise InvalidArgumentError("[eval] tasks must name at least one task")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"[eval] tasks need {error.name}, which is not installed: pip install 'quantrature[eval]'"
        ) from None
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InvalidArgumentError(f"[eval] there is no task of the name {unknown[0]!r}")
    found: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": dtype, "trust_remote_code": trust_remote_code},
        tasks=list(names),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        log_samples=False,
    )
    return [_result(name, values) for name, values in found["results"].items()]


def _result(name: str, values: dict[str, Any]) -> TaskResult:
    numbers = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, (int, float))}
    errors = {key.replace("_stderr,", ","): value for key, value in numbers.items() if "_stderr," in key}
    return TaskResult(name, {key: value for key, value in numbers.items() if "_stderr," not in key}, errors)
