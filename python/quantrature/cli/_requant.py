"""``quantrature requant``: restore the most significant weights of a quantized folder."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._input import check_fraction, memory_limits, resume_folder_of, size_in_bytes
from ._options import (
    CALIBRATION,
    MEMORY,
    OUTPUT,
    RESUMING,
    BatchSize,
    Bos,
    Checkpointing,
    DeviceMap,
    Json,
    MapFolder,
    MaxMemory,
    MaxShardSize,
    Nsamples,
    Resume,
    Rule,
    Seed,
    Seqlen,
    TextColumn,
    TrustRemoteCode,
)
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..requantization import Requantization


def run(
    folder: Annotated[str, typer.Argument(help="Folder that quantrature quantized.", metavar="DIR")],
    source: Annotated[str, typer.Option(help="The model it was made from: folder or id.", metavar="MODEL")],
    calibration: Annotated[
        str, typer.Option(help="A .txt, .jsonl or .json file, or a data set: NAME[:CONFIGURATION[:SPLIT]].")
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder to write; DIR itself with --overwrite.", metavar="OUT")
    ] = None,
    significant_fraction: Annotated[
        float | None, typer.Option(help="Fraction of the weights, 0 to 1, to restore.")
    ] = None,
    avg_bits: Annotated[
        float | None, typer.Option(help="Instead: bits of storage for each weight, everything included.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Instead: size of all quantized matrices: 4.2GiB, 900MB, 123456.")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Integrals over which the weights are spread.", rich_help_panel=CALIBRATION)
    ] = 2,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    text_column: TextColumn = None,
    batch_size: BatchSize = 1,
    rule: Rule = "gauss",
    nodes: Annotated[
        int, typer.Option(help="Gradient evaluations for each window and integral.", rich_help_panel=CALIBRATION)
    ] = 4,
    dtype: Annotated[str, typer.Option(help="What to run in: float32, bfloat16.", rich_help_panel=MEMORY)] = "float32",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    checkpointing: Checkpointing = False,
    map_folder: MapFolder = None,
    resume: Resume = "auto",
    resume_folder: Annotated[
        str | None,
        typer.Option(
            help="Where to keep what an interrupted run goes on from.",
            show_default="OUT.resume or DIR.resume",
            rich_help_panel=RESUMING,
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is not empty.", rich_help_panel=OUTPUT)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Improve a quantized folder: keep the weights that cost most exactly, within a budget.

    Processes that torchrun starts (torchrun --no-python quantrature requant ...) divide the windows among them.
    """
    if output is None and not overwrite:
        raise InvalidArgumentError("[requant] -o must name a folder to write, or --overwrite allow to replace DIR")
    if sum(given is not None for given in (significant_fraction, avg_bits, target_size)) != 1:
        raise InvalidArgumentError(
            "[requant] a budget is given as exactly one of --significant-fraction, --avg-bits and --target-size"
        )
    check_fraction("requant", "--significant-fraction", significant_fraction)
    target = None if target_size is None else size_in_bytes("requant", target_size)
    limits = memory_limits("requant", max_memory, device_map)
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        from ..models.ranks import joined
        from ..requantization import requant_folder

        rank = processes.enter_context(joined())
        record = requant_folder(
            folder,
            source,
            calibration,
            significant_fraction=significant_fraction,
            avg_bits=avg_bits,
            target_bytes=target,
            steps=steps,
            output=output,
            overwrite=overwrite,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            bos=bos,
            text_column=text_column,
            batch_size=batch_size,
            rule=rule,
            nodes=nodes,
            checkpointing=checkpointing,
            map_folder=map_folder,
            dtype=dtype,
            device_map=device_map,
            max_memory=limits,
            resume_folder=resume_folder_of(output or folder, resume_folder),
            resume=resume,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            progress=False if as_json or rank else None,
        )
    if rank:
        return  # the first process has written the same
    if as_json:
        print_json({"output": output or folder, **summary(record)})
        return
    rows = [
        ("bits per weight", f"{record.bits_per_weight:.3f}, scales, zeros and kept weights included"),
        ("bytes", f"{record.nbytes:,}"),
        *record_rows(record),
        ("written to", output or folder),
    ]
    print_table(f"{folder}, improved", rows)


def summary(record: Requantization) -> dict[str, Any]:
    """What --json prints of a record: everything but the modules, which requant.json has."""
    found = record.to_json()
    for name in ("format", "format_version", "modules"):
        del found[name]
    return found


def record_rows(record: Requantization) -> list[tuple[str, str]]:
    """A record for people."""
    rows = [
        ("by the paper's rule", f"{record.paper_bits_per_weight:.3f} bits per weight"),
        ("kept exactly", f"{record.outliers:,} outliers and {record.significant:,} significant weights"),
        ("gradient evaluations", f"{record.gradient_evaluations} per sample"),
    ]
    for stage in record.stages:
        predicted = stage.predicted_loss_change
        rows.append(
            (
                f"  {stage.name}",
                f"measured {stage.measured_loss_change:+.6f} nats a token"
                + ("" if predicted is None else f", predicted {predicted:+.6f}"),
            )
        )
    return rows
