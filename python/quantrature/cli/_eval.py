"""``quantrature eval``: perplexity, divergence from a reference, and tasks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._options import MEMORY, BatchSize, Bos, DeviceMap, Json, ModelArgument, TextColumn, TextFile, TrustRemoteCode
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..evaluate import DivergenceResult, PerplexityResult, TaskResult


BEGUN = {"window": ", each begun by BOS", "text": ", BOS before the text", "none": ", without BOS"}
"""What is said of windows by where they have BOS."""


def run(
    model: ModelArgument,
    text: TextFile = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a window.", show_default="2048, or what the model was built for")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Model to measure the divergence from.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use no more of the text than its first tokens.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Let windows overlap and begin this many tokens apart; not with --reference.")
    ] = None,
    bos: Bos = "auto",
    text_column: TextColumn = None,
    batch_size: BatchSize = 8,
    tasks: Annotated[
        str | None, typer.Option(help="In place of a text, tasks of the LM Evaluation Harness, with commas between.")
    ] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder with definitions of further tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt of a task.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="Documents of each task to use; below 1, the share of them.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What to run in: auto, float32, bfloat16, float16.", rich_help_panel=MEMORY)
    ] = "float32",
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, and divergence from a reference, on a text; or run tasks."""
    if (text is None) == (tasks is None):
        raise InvalidArgumentError("[eval] either --text or --tasks must be given, not both")
    if text is None:
        assert tasks is not None
        if reference is not None or stride is not None or max_tokens is not None or seqlen is not None:
            raise InvalidArgumentError("[eval] --reference, --stride, --max-tokens and --seqlen go with --text")
        with stdout_kept_clean(as_json):
            from .. import evaluate

            results = evaluate.tasks(
                model,
                tasks.split(","),
                include_path=include_path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                bos=bos,
                dtype=dtype,
                device=device_map or "cpu",
                trust_remote_code=trust_remote_code,
            )
        if as_json:
            print_json({r.name: {"metrics": r.metrics, "standard_errors": r.errors, "bos": r.bos} for r in results})
        else:
            print_table(f"{model} on {tasks}", [row for r in results for row in _task_rows(r)])
        return
    if include_path is not None or num_fewshot is not None or limit is not None:
        raise InvalidArgumentError("[eval] --include-path, --num-fewshot and --limit go with --tasks")
    if stride is not None and reference is not None:
        raise InvalidArgumentError("[eval] stride goes without a reference: a divergence is taken window by window")
    with stdout_kept_clean(as_json):
        from .. import evaluate, models
        from ..text import token_stream, token_windows

        # The text first: a mistake in it shows before any weight is loaded.
        config = models.load_config(model, trust_remote_code)
        tokenizer = models.load_tokenizer(model, trust_remote_code)
        if stride is None:
            tokens = token_windows(
                text, tokenizer, seqlen=seqlen, max_tokens=max_tokens, model=config, bos=bos, text_column=text_column
            )
        else:
            tokens = token_stream(text, tokenizer, max_tokens=max_tokens, bos=bos, text_column=text_column)

        def load(name: str) -> Any:
            return models.load_model(name, dtype, device_map, trust_remote_code)

        more: dict[str, Any] = {
            "seqlen": seqlen,
            "tokenizer": tokenizer,
            "batch_size": batch_size,
            "bos": "auto" if stride is None else bos,  # windows have what they are to begin with
            "progress": False if as_json else None,
        }
        ours, theirs = load(model), None
        divergence = None
        if reference is None:
            found = evaluate.perplexity(ours, tokens, stride=stride, **more)
        else:
            theirs = load(reference)
            divergence = evaluate.divergence(ours, theirs, tokens, **more)
            found = divergence.model
    if as_json:
        print_json(_values(found, divergence))
    else:
        print_table(f"{model} on {text}", _rows(found, divergence))


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
