"""``quantrature quantize``: write a quantized copy of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._input import check_fraction, memory_limits, resume_folder_of
from ._options import (
    CALIBRATION,
    MEMORY,
    METHOD,
    OUTPUT,
    REQUANT,
    RESUMING,
    BatchSize,
    Bos,
    Checkpointing,
    DeviceMap,
    GroupSize,
    Ignore,
    Json,
    MapFolder,
    MaxMemory,
    MaxShardSize,
    Method,
    ModelArgument,
    OverwriteOutput,
    Resume,
    Seed,
    Sym,
    TextColumn,
    TrustRemoteCode,
)
from ._output import print_cost, print_json, print_table, stdout_kept_clean
from ._requant import record_rows, summary

if TYPE_CHECKING:
    from ..models import Linears
    from ..plan import Plan
    from ..requantization import Requantization
    from ._estimate import Cost


def run(
    model: ModelArgument,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")] = None,
    plan: Annotated[str | None, typer.Option(help="A plan.json, in place of the grid options.")] = None,
    bits: Annotated[int | None, typer.Option(help="1 to 8, the same everywhere.")] = None,
    group_size: GroupSize = 64,
    method: Method = "rtn",
    sym: Sym = False,
    meta_bits: Annotated[int | None, typer.Option(help="Bits of quantized scales and zero points.")] = None,
    outlier_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the weights, 0 to 1, kept exactly for their magnitude.",
            show_default="0; 0.0045 with --requant",
        ),
    ] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="Quantize the token and the output embedding, too; 8 loses next to nothing.")
    ] = None,
    requant: Annotated[
        bool,
        typer.Option(
            "--requant",
            help="Share outliers out by PQI, and keep the most significant weights, too.",
            rich_help_panel=REQUANT,
        ),
    ] = False,
    significant_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the weights, 0 to 1, kept exactly for their PQI.",
            show_default="0.0005 with --requant",
            rich_help_panel=REQUANT,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Integrals over which the significant weights are spread.", rich_help_panel=REQUANT)
    ] = 2,
    selection: Annotated[
        str, typer.Option(help="How outliers are shared out: temperature or greedy.", rich_help_panel=REQUANT)
    ] = "temperature",
    ignore: Ignore = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text for --requant and for methods that need it: .txt, .jsonl, .json or a data set, "
            "NAME[:CONFIGURATION[:SPLIT]].",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option(
            help="Windows of calibration text.", show_default="128; 100 for squeezellm", rich_help_panel=CALIBRATION
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window.",
            show_default="2048, 512 for awq and squeezellm; or what the model was built for",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    text_column: TextColumn = None,
    batch_size: BatchSize = 1,
    damp_percent: Annotated[
        float | None,
        typer.Option(
            help="Of gptq: added to the Hessian's diagonal, a share of its mean.",
            show_default="0.01",
            rich_help_panel=METHOD,
        ),
    ] = None,
    desc_act: Annotated[
        bool | None,
        typer.Option(
            "--desc-act/--no-desc-act",
            help="Of gptq: columns by falling activations.",
            show_default="desc-act",
            rich_help_panel=METHOD,
        ),
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help="Of gptq: grids of the weights as they are, or found on the way.",
            show_default="static-groups",
            rich_help_panel=METHOD,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Any other setting of the method, NAME=VALUE; repeatable.", rich_help_panel=METHOD),
    ] = None,
    true_sequential: Annotated[
        bool,
        typer.Option(
            "--true-sequential/--no-true-sequential",
            help="Calibrate on quantized matrices within a block, too.",
            rich_help_panel=CALIBRATION,
        ),
    ] = True,
    resume: Resume = "auto",
    resume_folder: Annotated[
        str | None,
        typer.Option(
            help="Where to keep what an interrupted run goes on from.",
            show_default="OUT.resume",
            rich_help_panel=RESUMING,
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(help="Gradient evaluations for each window and integral.", rich_help_panel=CALIBRATION)
    ] = 4,
    compute_dtype: Annotated[
        str, typer.Option(help="What --requant runs the model in: float32, bfloat16.", rich_help_panel=MEMORY)
    ] = "float32",
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    checkpointing: Checkpointing = False,
    map_folder: MapFolder = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of all that is not quantized: auto, float32, bfloat16, float16.", rich_help_panel=OUTPUT),
    ] = "auto",
    max_shard_size: MaxShardSize = "5GB",
    auto_map: Annotated[
        bool,
        typer.Option(
            "--auto-map",
            help="Write code, too, that opens the folder with trust_remote_code, not importing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    overwrite: OverwriteOutput = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how large and how long.", rich_help_panel=OUTPUT)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write it to a folder.

    Processes that torchrun starts (torchrun --no-python quantrature quantize --requant ...) divide the windows of
    calibration text among them.
    """
    if output is None and not dry_run:
        raise InvalidArgumentError("[quantize] -o must name a folder to write")
    if requant and calibration is None:
        raise InvalidArgumentError("[quantize] --requant needs --calibration, a text to integrate on")
    if significant_fraction is not None and not requant:
        raise InvalidArgumentError(
            "[quantize] --significant-fraction goes with --requant, which finds the significant weights"
        )
    check_fraction("quantize", "--outlier-fraction", outlier_fraction)
    check_fraction("quantize", "--significant-fraction", significant_fraction)
    if compute_dtype not in ("float32", "bfloat16", "float16"):
        raise InvalidArgumentError(
            f"[quantize] --compute-dtype must be float32, bfloat16 or float16: got {compute_dtype}"
        )
    if output is not None:
        resume_folder = resume_folder_of(output, resume_folder)
    if outlier_fraction is None:
        outlier_fraction = 0.0045 if requant else 0.0
    limits = memory_limits("quantize", max_memory, device_map)
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        import logging
        import sys
        from dataclasses import replace
        from pathlib import Path

        from .. import checkpoint, models
        from ..files.new_folder import check_new_folder
        from ..methods import SOLVERS
        from ..models.ranks import joined
        from ..plan import Plan
        from ..quantization.model import plan_for, quantize, text_settings
        from ..text import bos_of, token_windows
        from ._estimate import quantizing

        rank = processes.enter_context(joined())
        if output is not None:
            check_new_folder(output, overwrite)
        chosen = None if plan is None else Plan.load(plan)
        models.check_dense("quantize", models.load_config(model, trust_remote_code))
        loaded = models.load_model(model, dtype, device_map, trust_remote_code, limits)
        host: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "method": method,
            "sym": sym,
            "meta_bits": meta_bits,
            "embedding_bits": embedding_bits,
            "ignore": ignore or (),
            "options": method_options(
                method, option or (), damp_percent=damp_percent, desc_act=desc_act, static_groups=static_groups
            ),
        }
        record = None
        linears, made = plan_for(
            loaded, **host, plan=chosen, outlier_fraction=0.0 if requant else outlier_fraction, experts=not requant
        )
        needy = [entry.solver for _, entry in made if not entry.keeps and SOLVERS[entry.solver].needs]
        if needy and calibration is None:
            raise InvalidArgumentError(f"[quantize] method {needy[0]} needs --calibration, a text")
        if calibration is not None and not requant and not needy:
            logging.getLogger(__name__).warning("method %s reads no calibration text", method)
        tokenizer = None if dry_run and not requant and not needy else models.load_tokenizer(model, trust_remote_code)
        cost = None
        windows = None
        if requant or needy:
            wanted = text_settings(made, "auto" if nsamples is None else nsamples)
            windows = token_windows(
                calibration,
                tokenizer,
                **wanted,
                seqlen=seqlen,
                seed=seed,
                bos=bos,
                text_column=text_column,
                model=loaded,
            )
            about = {"nsamples": len(windows), "seqlen": windows.shape[1], "bos": bos_of(windows, tokenizer, loaded)}
            made = replace(made, allocation={**made.allocation, "quantized_on": {**about, "seed": seed}})
        if requant:
            record, cost = _requant(
                loaded,
                linears,
                made,
                windows,
                {
                    "outlier_fraction": outlier_fraction,
                    "significant_fraction": 0.0005 if significant_fraction is None else significant_fraction,
                    "steps": steps,
                    "selection": selection,
                    "batch_size": batch_size,
                    "nodes": nodes,
                    "seed": seed,
                    "tokenizer": tokenizer,
                    "checkpointing": checkpointing,
                    "map_folder": map_folder,
                    "resume_folder": resume_folder,
                    "resume": resume,
                    "progress": False if as_json or rank else None,
                },
                compute_dtype,
                dry_run,
            )
        elif dry_run:
            cost = quantizing(loaded, linears, made, windows)
        elif not rank:
            if needy:
                peak = quantizing(loaded, linears, made, windows).memory_bytes
                print(f"memory at the peak: about {peak / 2**20:,.0f} MiB and the program's own", file=sys.stderr)
            try:
                quantize(
                    loaded,
                    plan=made,
                    calibration=windows,
                    nsamples=None,
                    batch_size=batch_size,
                    true_sequential=true_sequential,
                    resume_folder=resume_folder,
                    resume=resume,
                    progress=False if as_json else None,
                )
            except KeyboardInterrupt:
                if needy and Path(str(resume_folder)).is_dir():
                    print(
                        f"finished blocks are in {resume_folder}; the same command goes on from there", file=sys.stderr
                    )
                raise
        if rank:
            return  # the first process has the same
        if cost is None:
            assert output is not None
            checkpoint.save(
                loaded,
                output,
                tokenizer=tokenizer,
                processor=models.processor_files(model),
                plan=None if requant else made,
                requant=record,
                source=model,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                auto_map=auto_map,
            )
            found = checkpoint.inspect(output)
    if cost is not None:
        print_cost(f"quantizing {model}", cost, as_json)
        return
    if as_json:
        said = {
            "output": output,
            "bits_per_weight": found.bits_per_weight,
            "bytes": found.bytes,
            "other_bytes": found.other_bytes,
            "modules": len(found.modules),
            "predicted_loss_change": made.predicted_loss_change,
        }
        print_json(said if record is None else {**said, **summary(record)})
        return
    rows = [
        ("matrices", str(len(found.modules))),
        ("bits per weight", f"{found.bits_per_weight:.3f}, scales, zeros and outliers included"),
        ("bytes", f"{found.bytes:,} and {found.other_bytes:,} of other tensors"),
        *(record_rows(record) if record is not None else ()),
        ("written to", str(output)),
    ]
    print_table(f"{model}, quantized", rows)


def method_options(method: str, pairs: Iterable[str], **known: Any) -> dict[str, Any]:
    """The settings of a method from options of the command line: those that were given, and NAME=VALUE pairs.

    Raises:
        InvalidArgumentError: for a pair that is none, or a value of another type than the default's.
    """
    from ..methods import METHODS, solver_of

    solver_of(method)
    found = {name: value for name, value in known.items() if value is not None}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        default = METHODS[method].options.get(name)
        try:
            if not equals:
                raise ValueError
            if isinstance(default, bool):
                found[name] = {"true": True, "false": False}[text.lower()]
            else:
                found[name] = text if default is None else type(default)(text)
        except (KeyError, ValueError):
            raise InvalidArgumentError(f"[quantize] --option must be NAME=VALUE: got {pair!r}") from None
    return found


def _requant(
    model: Any,
    linears: Linears,
    plan: Plan,
    windows: Any,
    settings: dict[str, Any],
    compute_dtype: str,
    dry_run: bool,
) -> tuple[Requantization | None, Cost | None]:
    """The record of what was done to the model, or what it would take."""
    import torch

    from ..models.gradients import computing_in
    from ..requantization import requant
    from ._estimate import requantizing

    if dry_run:
        return None, requantizing(model, windows, linears, plan, settings)
    with computing_in(model, getattr(torch, compute_dtype)):
        _, record = requant(model, windows, plan=plan, **settings)
    return record, None
