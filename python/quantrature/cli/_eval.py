"""``quantrature eval``: perplexity, divergence from a reference, and tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Loading
from ._options import Json, ModelArgument
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..evaluate import DivergenceResult, PerplexityResult, TaskResult


BEGUN = {"window": ", each begun by BOS", "text": ", BOS before the text", "none": ", without BOS"}
"""What is said of windows by where they have BOS."""

TEXT = "On a text"
TASKS = "On tasks"


@dataclass(frozen=True)
class OnText:
    """A text, and how it is cut into windows."""

    text: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .jsonl or .json file, or a data set: NAME[:CONFIGURATION[:SPLIT]].", rich_help_panel=TEXT
        ),
    ] = None
    reference: Annotated[
        str | None, typer.Option(help="Model to measure the divergence from.", rich_help_panel=TEXT)
    ] = None
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window.", show_default="2048, or what the model was built for", rich_help_panel=TEXT
        ),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Use no more of the text than its first tokens.", rich_help_panel=TEXT)
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            help="Let windows overlap and begin this many tokens apart; not with --reference.", rich_help_panel=TEXT
        ),
    ] = None
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Field that has the text in rows of .jsonl, .json and data sets; by default text, content, messages, "
            "conversations, instruction with output, or input_ids.",
            metavar="NAME",
            rich_help_panel=TEXT,
        ),
    ] = None


@dataclass(frozen=True)
class OnTasks:
    """Tasks of the LM Evaluation Harness."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help="In place of a text, tasks of the LM Evaluation Harness, with commas between.", rich_help_panel=TASKS
        ),
    ] = None
    include_path: Annotated[
        str | None, typer.Option(help="Folder with definitions of further tasks.", rich_help_panel=TASKS)
    ] = None
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt of a task.", rich_help_panel=TASKS)
    ] = None
    limit: Annotated[
        float | None,
        typer.Option(help="Documents of each task to use; below 1, the share of them.", rich_help_panel=TASKS),
    ] = None


def run(
    model: ModelArgument,
    *,
    on: OnText,
    on_tasks: OnTasks,
    bos: Annotated[
        str,
        typer.Option(
            help="Where the BOS token goes: window (first of each window), text (once, before the text), none, or "
            "auto: window if the tokenizer adds BOS by itself."
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 8,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and divergence from a reference, on a text; or run tasks."""
    if (on.text is None) == (on_tasks.tasks is None):
        raise InvalidArgumentError("[eval] either --text or --tasks must be given, not both")
    _refuse_the_rest(on_tasks if on.text is not None else on)
    loading.limits("eval")
    if on_tasks.tasks is not None:
        with stdout_kept_clean(as_json):
            results = _on_tasks(model, on_tasks, loading, bos, batch_size)
        if as_json:
            print_json({r.name: {"metrics": r.metrics, "standard_errors": r.errors, "bos": r.bos} for r in results})
        else:
            print_table(f"{model} on {on_tasks.tasks}", [row for r in results for row in _task_rows(r)])
        return
    if on.stride is not None and on.reference is not None:
        raise InvalidArgumentError("[eval] stride goes without a reference: a divergence is taken window by window")
    with stdout_kept_clean(as_json):
        found, divergence = _on_text(model, on, loading, bos, batch_size, False if as_json else None)
    if as_json:
        print_json(_values(found, divergence))
    else:
        print_table(f"{model} on {on.text}", _rows(found, divergence))


def _refuse_the_rest(unused: OnText | OnTasks) -> None:
    """Refuse what goes with the other one of --text and --tasks."""
    given = [field.name for field in fields(unused) if getattr(unused, field.name) != field.default]
    if given:
        other = "--tasks" if isinstance(unused, OnTasks) else "--text"
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InvalidArgumentError(f"[eval] {names} goes with {other}")


def _on_tasks(model: str, on: OnTasks, loading: Loading, bos: str, batch_size: int) -> list[TaskResult]:
    from .. import evaluate

    assert on.tasks is not None
    return evaluate.tasks(
        model,
        on.tasks.split(","),
        include_path=on.include_path,
        num_fewshot=on.num_fewshot,
        limit=on.limit,
        batch_size=batch_size,
        bos=bos,
        dtype=loading.dtype,
        device=loading.device_map or "cpu",
        trust_remote_code=loading.trust_remote_code,
    )


def _on_text(
    model: str, on: OnText, loading: Loading, bos: str, batch_size: int, progress: bool | None
) -> tuple[PerplexityResult, DivergenceResult | None]:
    from .. import evaluate, models
    from ..text import token_stream, token_windows

    # The text first: a mistake in it shows before any weight is loaded.
    config = models.load_config(model, loading.trust_remote_code)
    tokenizer = loading.tokenizer(model)
    how: dict[str, Any] = {"max_tokens": on.max_tokens, "bos": bos, "text_column": on.text_column}
    if on.stride is None:
        tokens = token_windows(on.text, tokenizer, seqlen=on.seqlen, model=config, **how)
    else:
        tokens = token_stream(on.text, tokenizer, **how)
    more: dict[str, Any] = {
        "seqlen": on.seqlen,
        "tokenizer": tokenizer,
        "batch_size": batch_size,
        "bos": "auto" if on.stride is None else bos,  # windows have what they are to begin with
        "progress": progress,
    }
    ours = loading.load(model, "eval")
    if on.reference is None:
        return evaluate.perplexity(ours, tokens, stride=on.stride, **more), None
    divergence = evaluate.divergence(ours, loading.load(on.reference, "eval"), tokens, **more)
    return divergence.model, divergence


def _values(found: PerplexityResult, divergence: DivergenceResult | None) -> dict[str, float | str]:
    values: dict[str, float | str] = {
        "perplexity": found.perplexity,
        "nll": found.nll,
        "tokens": found.tokens,
        "nll_standard_error": found.standard_error,
        "bos": found.bos,
    }
    if divergence is not None:
        values |= {
            "kld_mean": divergence.mean,
            "kld_median": divergence.median,
            "kld_p99": divergence.p99,
            "kld_max": divergence.maximum,
            "kld_standard_error": divergence.standard_error,
            "same_top1": divergence.same_top1,
            "reference_perplexity": divergence.reference.perplexity,
            "loss_change": divergence.loss_change,
            "loss_change_standard_error": divergence.loss_change_standard_error,
        }
    return values


def _rows(found: PerplexityResult, divergence: DivergenceResult | None) -> list[tuple[str, str]]:
    rows = [
        ("perplexity", f"{found.perplexity:.4f}"),
        ("loss", _within(found.nll, found.standard_error)),
        ("tokens", f"{found.tokens} in {found.windows} windows" + BEGUN[found.bos]),
    ]
    if divergence is not None:
        rows += [
            ("perplexity of the reference", f"{divergence.reference.perplexity:.4f}"),
            ("change of the loss", _within(divergence.loss_change, divergence.loss_change_standard_error, sign="+")),
            ("divergence, mean", _within(divergence.mean, divergence.standard_error)),
            ("divergence, median", f"{divergence.median:.6f}"),
            ("divergence, 99th percentile", f"{divergence.p99:.6f}"),
            ("divergence, most", f"{divergence.maximum:.6f}"),
            ("same best guess", f"{divergence.same_top1:.2%}"),
        ]
    return rows


def _task_rows(result: TaskResult) -> list[tuple[str, str]]:
    def shown(key: str, value: float) -> str:
        error = result.errors.get(key)
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")

    return [(f"{result.name}, {key.removesuffix(',none')}", shown(key, value)) for key, value in result.metrics.items()]


def _within(mean: float, error: float, sign: str = "") -> str:
    """A mean in nats a token with its standard error, where there is one."""
    return f"{mean:{sign}.6f}" + (f" ± {error:.6f}" if math.isfinite(error) else "") + " nats a token"
