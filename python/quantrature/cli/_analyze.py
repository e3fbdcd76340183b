"""``quantrature analyze``: predict how much the loss changes when each matrix of a model is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Grid, Loading, Quadrature, Resuming, Text
from ._options import CALIBRATION, DryRun, Json, ModelArgument, Objective, Overwrite
from ._output import print_cost, print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..analysis import Sensitivity
    from ._estimate import Cost


@dataclass(frozen=True)
class Integral(Quadrature):
    """How to approximate the integral of an analysis."""

    tol: Annotated[
        float | None,
        typer.Option(
            help="Double --nodes until the predicted loss change is within this fraction of the measured one.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None
    abs_mode: Annotated[
        str,
        typer.Option(
            help="When PQI takes absolute values: after_mean (of the mean gradient), per_sample or per_node.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "after_mean"


def run(
    model: ModelArgument,
    *,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder to write the analysis to.", metavar="OUT")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Metrics from 'quantrature list metrics', separated by commas.")
    ] = "pqi,kurtosis",
    bits: Annotated[
        str, typer.Option(help="Bits per weight to analyze: 3, or several separated by commas: 2,3,4.")
    ] = "3",
    grid: Grid,
    text: Text,
    objective: Objective = "nll",
    integral: Integral,
    loading: Loading,
    resuming: Resuming,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Predict how much the loss changes when each matrix is quantized, and check the sum by measuring it.

    On several processes (torchrun --no-python quantrature analyze ...), each process takes a share of the windows.
    """
    settings = _numbers(bits)
    loading.limits("analyze")
    if text.calibration is None:
        raise InvalidArgumentError("[analyze] --calibration must name a calibration text, such as a .txt file")
    if output is None and not (as_json or dry_run):
        raise InvalidArgumentError(
            "[analyze] -o must name a folder for the result, unless --json or --dry-run is given"
        )
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        from .. import analysis
        from ..files.new_folder import check_new_folder
        from ..models.ranks import joined

        rank = processes.enter_context(joined())
        if output is not None:
            check_new_folder(output, overwrite)
        analysis.quadrature(integral.rule, integral.nodes)
        config = loading.config(model, "analyze")
        tokenizer = loading.tokenizer(model)
        tokens = text.read_with(tokenizer).windows(config)
        loaded = loading.load(model, "analyze")
        cost = None
        if dry_run:
            cost = _cost(loaded, tokens, names, len(settings), grid, integral, text.batch_size)
        else:
            found = analysis.analyze(
                loaded,
                tokens,
                objective=objective,
                metrics=names,
                bits=settings,
                tokenizer=tokenizer,
                seed=text.seed,
                batch_size=text.batch_size,
                **grid.arguments,
                **vars(integral),
                **resuming.beside(output),
                progress=False if as_json or rank else None,
            )
            if rank:
                return  # the first process has the same result
            if output is not None:
                found.save(output, overwrite)
    if cost is not None:
        print_cost(f"analysis of {model}", cost, as_json)
    elif as_json:
        print_json(found.to_json())
    else:
        print_table(f"{model}: {len(found.matrices)} matrices", _rows(found, output))


def _cost(
    model: Any, tokens: Any, metrics: Sequence[str], settings: int, grid: Grid, integral: Integral, batch_size: int
) -> Cost:
    from ..models import find_linears
    from ._estimate import analyzing

    linears = find_linears(model, grid.ignore or (), experts=False)
    passes = ("pqi" in metrics) * settings * integral.nodes + bool({"fisher", "first_order"} & set(metrics))
    return analyzing(model, tokens, linears, passes, batch_size)


def _numbers(bits: str) -> list[int]:
    try:
        return [int(part) for part in bits.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"[analyze] --bits must be numbers separated by commas: got {bits!r}") from None


def _metrics(found: Sensitivity) -> list[tuple[str, str]]:
    """Return a row per metric: its rank correlation with the loss change, and the matrix it rates highest."""
    correlations = found.rank_correlations()
    rows = [("metrics", "rank correlation with the loss change, and the matrix with the highest value")]
    for metric in found.matrices[0].scores:
        most = max(found.matrices, key=lambda m: m.scores[metric])
        agrees = correlations.get(metric)
        rows.append((f"  {metric}", ("     " if agrees is None else f"{agrees:+.2f}") + f"  {most.name}"))
    return rows


def _rows(found: Sensitivity, output: Any) -> list[tuple[str, str]]:
    rows = []
    changes = "divergence" if found.objective == "kl" else "loss change"
    for proof in found.proofs:
        missed = ", above --tol" if proof.within_tolerance is False else ""
        rows += [
            (f"{proof.setting} {proof.method}", f"{proof.gradient_evaluations} gradient evaluations per sample"),
            (f"  predicted {changes}", f"{proof.predicted_loss_change:+.6f} nats per token"),
            (f"  measured {changes}", f"{proof.measured_loss_change:+.6f} nats per token"),
            ("  relative difference", f"{proof.relative_error:.2%}{missed}"),
        ]
    if found.proofs:
        setting = found.proofs[0].setting
        worst = sorted(found.matrices, key=lambda m: m.loss_change[setting], reverse=True)[:5]
        rows += [(m.name, f"{m.loss_change[setting]:+.6f} nats per token") for m in worst]
    rows += _metrics(found)
    if output is not None:
        rows.append(("written to", str(output)))
    return rows
