"""``quantrature analyze``: what quantizing each matrix of a model would cost."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._input import memory_limits, resume_folder_of
from ._options import (
    CALIBRATION,
    MEMORY,
    OUTPUT,
    RESUMING,
    BatchSize,
    Bos,
    Calibration,
    Checkpointing,
    DeviceMap,
    GroupSize,
    Ignore,
    Json,
    MapFolder,
    MaxMemory,
    Method,
    ModelArgument,
    Nsamples,
    OverwriteOutput,
    Resume,
    Rule,
    Seed,
    Seqlen,
    Sym,
    TextColumn,
    TrustRemoteCode,
)
from ._output import print_cost, print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..analysis import Sensitivity


def run(
    model: ModelArgument,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder for the result.", metavar="SENS")] = None,
    metrics: Annotated[str, typer.Option(help="Names of 'quantrature list metrics', with commas.")] = "pqi,kurtosis",
    bits: Annotated[str, typer.Option(help="Of the quantized weights: 3, or several with commas: 2,3,4.")] = "3",
    group_size: GroupSize = 64,
    method: Method = "rtn",
    sym: Sym = False,
    ignore: Ignore = None,
    calibration: Calibration = None,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    text_column: TextColumn = None,
    batch_size: BatchSize = 1,
    rule: Rule = "gauss",
    nodes: Annotated[int, typer.Option(help="Gradient evaluations for each window.", rich_help_panel=CALIBRATION)] = 4,
    tol: Annotated[
        float | None,
        typer.Option(
            help="Add nodes until prediction and measurement agree to this share.", rich_help_panel=CALIBRATION
        ),
    ] = None,
    abs_mode: Annotated[
        str, typer.Option(help="after_mean, per_sample or per_node.", rich_help_panel=CALIBRATION)
    ] = "after_mean",
    dtype: Annotated[
        str, typer.Option(help="What to run in: auto, float32, bfloat16.", rich_help_panel=MEMORY)
    ] = "float32",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    checkpointing: Checkpointing = False,
    map_folder: MapFolder = None,
    resume: Resume = "auto",
    resume_folder: Annotated[
        str | None,
        typer.Option(
            help="Where to keep what an interrupted run goes on from.",
            show_default="SENS.resume",
            rich_help_panel=RESUMING,
        ),
    ] = None,
    overwrite: OverwriteOutput = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take.", rich_help_panel=OUTPUT)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Predict what quantizing costs, matrix by matrix, and prove it by measurement.

    Processes that torchrun starts (torchrun --no-python quantrature analyze ...) divide the windows among them.
    """
    settings = _numbers(bits)
    limits = memory_limits("analyze", max_memory, device_map)
    if calibration is None:
        raise InvalidArgumentError("[analyze] --calibration must name the text to analyze on")
    if output is None and not (as_json or dry_run):
        raise InvalidArgumentError("[analyze] -o must name a folder for the result")
    if output is not None:
        resume_folder = resume_folder_of(output, resume_folder)
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        from .. import analysis, models
        from ..files.new_folder import check_new_folder
        from ..models.ranks import joined
        from ..text import token_windows

        rank = processes.enter_context(joined())
        if output is not None:
            check_new_folder(output, overwrite)
        analysis.quadrature(rule, nodes)
        config = models.load_config(model, trust_remote_code)
        models.check_dense("analyze", config)
        tokenizer = models.load_tokenizer(model, trust_remote_code)
        tokens = token_windows(
            calibration,
            tokenizer,
            seqlen=seqlen,
            nsamples=nsamples,
            seed=seed,
            bos=bos,
            text_column=text_column,
            model=config,
        )
        loaded = models.load_model(model, dtype, device_map, trust_remote_code, limits)
        cost = None
        if dry_run:
            from ._estimate import analyzing

            linears = models.find_linears(loaded, ignore or (), experts=False)
            passes = ("pqi" in names) * len(settings) * nodes + bool({"fisher", "first_order"} & set(names))
            cost = analyzing(loaded, tokens, linears, passes, batch_size)
        else:
            found = analysis.analyze(
                loaded,
                tokens,
                metrics=names,
                bits=settings,
                group_size=group_size,
                method=method,
                sym=sym,
                ignore=ignore or (),
                tokenizer=tokenizer,
                seed=seed,
                batch_size=batch_size,
                rule=rule,
                nodes=nodes,
                tol=tol,
                abs_mode=abs_mode,
                checkpointing=checkpointing,
                map_folder=map_folder,
                resume_folder=resume_folder,
                resume=resume,
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


def _numbers(bits: str) -> list[int]:
    try:
        return [int(part) for part in bits.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"[analyze] --bits must be numbers with commas between: got {bits!r}") from None


def _metrics(found: Sensitivity) -> list[tuple[str, str]]:
    """How each metric orders the matrices, one line each."""
    correlations = found.rank_correlations()
    rows = [("metrics", "rank correlation with the loss change, and where it is highest")]
    for metric in found.matrices[0].scores:
        most = max(found.matrices, key=lambda m: m.scores[metric])
        agrees = correlations.get(metric)
        rows.append((f"  {metric}", ("     " if agrees is None else f"{agrees:+.2f}") + f"  {most.name}"))
    return rows


def _rows(found: Sensitivity, output: Any) -> list[tuple[str, str]]:
    rows = []
    for proof in found.proofs:
        missed = ", above the tolerance" if proof.within_tolerance is False else ""
        rows += [
            (f"{proof.setting} {proof.method}", f"{proof.gradient_evaluations} gradient evaluations per sample"),
            ("  predicted loss change", f"{proof.predicted_loss_change:+.6f} nats a token"),
            ("  measured loss change", f"{proof.measured_loss_change:+.6f} nats a token"),
            ("  apart by", f"{proof.relative_error:.2%}{missed}"),
        ]
    if found.proofs:
        setting = found.proofs[0].setting
        worst = sorted(found.matrices, key=lambda m: m.loss_change[setting], reverse=True)[:5]
        rows += [(m.name, f"{m.loss_change[setting]:+.6f} nats a token") for m in worst]
    rows += _metrics(found)
    if output is not None:
        rows.append(("written to", str(output)))
    return rows
