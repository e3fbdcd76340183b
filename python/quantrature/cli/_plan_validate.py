"""``quantrature plan validate``: how well the loss change that a plan predicts is the one that is measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._options import CALIBRATION, MEMORY, BatchSize, Bos, Json, Seqlen, TextColumn, TrustRemoteCode
from ._output import print_json, print_table, stdout_kept_clean


def run(
    plan: Annotated[str, typer.Argument(help="What quantrature plan wrote.", metavar="PLAN")],
    model: Annotated[str, typer.Argument(help="The model it is for: folder or id.", metavar="MODEL")],
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to measure on: a .txt, .jsonl or .json file, or a data set: NAME[:CONFIGURATION[:SPLIT]]."
        ),
    ],
    sensitivity: Annotated[
        str | None, typer.Option(help="The analysis, to measure random plans from it as well.", metavar="SENS")
    ] = None,
    count: Annotated[int, typer.Option(help="Random plans to measure.")] = 20,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Write the plan with its validation.", metavar="PLAN")
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Windows of text.", rich_help_panel=CALIBRATION)] = 128,
    seqlen: Seqlen = None,
    seed: Annotated[
        int, typer.Option(help="For the choice of windows, and of random plans.", rich_help_panel=CALIBRATION)
    ] = 0,
    bos: Bos = "auto",
    text_column: TextColumn = None,
    batch_size: BatchSize = 8,
    dtype: Annotated[
        str, typer.Option(help="What to measure in: auto, float32, bfloat16.", rich_help_panel=MEMORY)
    ] = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the loss change of a plan, and of random ones, beside what was predicted."""
    with stdout_kept_clean(as_json):
        from dataclasses import replace

        from .. import models
        from ..plan import Plan

        given = Plan.load(plan)
        if given.predicted_loss_change is None:
            raise InvalidArgumentError(
                f"[plan validate] {plan} must predict the loss change of every entry: got one without"
            )
        from ..allocation import measured_loss_changes, validate
        from ..analysis import Sensitivity
        from ..text import token_windows

        analysis = None if sensitivity is None else Sensitivity.load(sensitivity)
        config = models.load_config(model, trust_remote_code)
        models.check_dense("plan validate", config)
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
        loaded = models.load_model(model, dtype, trust_remote_code=trust_remote_code)
        progress = False if as_json else None
        measured = measured_loss_changes(loaded, tokens, [given], batch_size=batch_size, progress=progress)[0]
        found: dict[str, Any] = {
            "predicted_loss_change": given.predicted_loss_change,
            "measured_loss_change": measured,
        }
        if analysis is not None:
            more = validate(loaded, tokens, analysis, count=count, seed=seed, batch_size=batch_size, progress=progress)
            found |= more.to_json()
        if output is not None:
            from ._plan import _write

            _write(replace(given, allocation={**given.allocation, "validation": found}), output)
    if as_json:
        print_json(found)
        return
    rows = [(name.replace("_", " "), f"{found[name]:+.6f} nats a token") for name in list(found)[:2]]
    if analysis is not None:
        error = f"median relative error {found['median_relative_error']:.1%}"
        rows.append((f"{found['plans']} random plans", f"Spearman {found['spearman']:.3f}, {error}"))
    print_table(plan, rows)
