"""``quantrature eval``: perplexity, KL divergence from a reference model, and benchmark tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Loading
from ._options import BOS_HELP, SEQLEN_DEFAULT, TEXT_COLUMN_HELP, Json, ModelArgument
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..evaluate import DivergenceResult, PerplexityResult, TaskResult


BEGUN = {"window": ", each begun by BOS", "text": ", BOS before the text", "none": ", without BOS"}
"""How the output describes windows, by where they have BOS."""

TEXT = "On a text"
TASKS = "On tasks"


@dataclass(frozen=True)
class OnText:
    """Evaluation text, and how it is cut into windows."""

    text: Annotated[
        str | None,
        typer.Option(
            help="Evaluation text: a .txt, .jsonl or .json file, or a dataset: NAME[:CONFIGURATION[:SPLIT]].",
            rich_help_panel=TEXT,
        ),
    ] = None
    reference: Annotated[
        str | None, typer.Option(help="Also measure the KL divergence from this model.", rich_help_panel=TEXT)
    ] = None
    seqlen: Annotated[
        int | None,
        typer.Option(help="Tokens per window.", show_default=SEQLEN_DEFAULT, rich_help_panel=TEXT),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only the first MAX_TOKENS tokens of the text.", rich_help_panel=TEXT)
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            help="Start a window every STRIDE tokens, so that windows overlap; not with --reference.",
            rich_help_panel=TEXT,
        ),
    ] = None
    text_column: Annotated[
        str | None,
        typer.Option(help=TEXT_COLUMN_HELP, metavar="NAME", rich_help_panel=TEXT),
    ] = None


@dataclass(frozen=True)
class OnTasks:
    """Tasks of the LM Evaluation Harness."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of --text: tasks of the LM Evaluation Harness, separated by commas.", rich_help_panel=TASKS
        ),
    ] = None
    include_path: Annotated[
        str | None, typer.Option(help="Folder with your own task definitions.", rich_help_panel=TASKS)
    ] = None
    num_fewshot: Annotated[
        int | None, typer.Option(help="Number of examples in each prompt.", rich_help_panel=TASKS)
    ] = None
    limit: Annotated[
        float | None,
        typer.Option(help="Use only this many documents per task; below 1: this fraction.", rich_help_panel=TASKS),
    ] = None


def run(
    model: ModelArgument,
    *,
    on: OnText,
    on_tasks: OnTasks,
    bos: Annotated[str, typer.Option(help=BOS_HELP)] = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows, or task prompts, per forward pass.")] = 8,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and KL divergence from a reference model; or run benchmark tasks."""
    if (on.text is None) == (on_tasks.tasks is None):
        raise InvalidArgumentError("[eval] give either --text or --tasks, not both")
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
        raise InvalidArgumentError("[eval] --stride cannot be combined with --reference: remove one of them")
    with stdout_kept_clean(as_json):
        found, divergence = _on_text(model, on, loading, bos, batch_size, False if as_json else None)
    if as_json:
        print_json(_values(found, divergence))
    else:
        print_table(f"{model} on {on.text}", _rows(found, divergence))


def _refuse_the_rest(unused: OnText | OnTasks) -> None:
    """Refuse options of --text if --tasks is given, and the reverse."""
    given = [field.name for field in fields(unused) if getattr(unused, field.name) != field.default]
    if given:
        other = "--tasks" if isinstance(unused, OnTasks) else "--text"
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InvalidArgumentError(f"[eval] {names} can only be used with {other}")


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
    ours = _loaded(model, loading)
    if on.reference is None:
        return evaluate.perplexity(ours, tokens, stride=on.stride, **more), None
    divergence = evaluate.divergence(ours, _loaded(on.reference, loading), tokens, **more)
    return divergence.model, divergence


def _loaded(model: str, loading: Loading) -> Any:
    """Load a model; for an exported folder, a dense model with the same weights."""
    from .. import exports

    if exports.target_of(model) is None:
        return loading.load(model, "eval")
    if loading.device_map is not None:
        raise InvalidArgumentError(f"[eval] --device-map cannot be used with an exported folder: {model} is")
    return exports.load(model, loading.dtype, loading.trust_remote_code)


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
            ("reference perplexity", f"{divergence.reference.perplexity:.4f}"),
            ("loss change", _within(divergence.loss_change, divergence.loss_change_standard_error, sign="+")),
            ("KL divergence, mean", _within(divergence.mean, divergence.standard_error)),
            ("KL divergence, median", f"{divergence.median:.6f}"),
            ("KL divergence, 99th percentile", f"{divergence.p99:.6f}"),
            ("KL divergence, maximum", f"{divergence.maximum:.6f}"),
            ("same top-1 token", f"{divergence.same_top1:.2%}"),
        ]
    return rows


def _task_rows(result: TaskResult) -> list[tuple[str, str]]:
    def shown(key: str, value: float) -> str:
        error = result.errors.get(key)
        return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")

    return [(f"{result.name}, {key.removesuffix(',none')}", shown(key, value)) for key, value in result.metrics.items()]


def _within(mean: float, error: float, sign: str = "") -> str:
    """Format a mean in nats per token, with its standard error if that is finite."""
    return f"{mean:{sign}.6f}" + (f" ± {error:.6f}" if math.isfinite(error) else "") + " nats per token"
