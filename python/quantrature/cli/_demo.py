"""``quantrature demo``: analyze, plan, quantize and evaluate the small model that comes with the package."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import Json
from ._output import print_json, stdout_kept_clean

if TYPE_CHECKING:
    from ..demo.tour import Row


def run(
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Keep the quantized models in this folder.", metavar="OUT")
    ] = None,
    as_json: Json = False,
) -> None:
    """Analyze, plan, quantize, save, load and evaluate a small model that comes with the package."""
    with stdout_kept_clean(as_json):
        from pathlib import Path

        from ..demo.tour import tour
        from ..files.new_folder import check_new_folder

        if output is not None:
            check_new_folder(output)
        rows = list(tour(None if output is None else Path(output), progress=False if as_json else None))
    if as_json:
        print_json({row.name: {key: value for key, value in asdict(row).items() if key != "name"} for row in rows})
    else:
        _print(rows)


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1))
    table.add_column("plan", no_wrap=True)
    for title in ("bits", "KiB", "perplexity", "divergence", "predicted", "measured"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.3f}",
            f"{row.bytes / 1024:,.0f}",
            f"{row.perplexity:.3f}",
            f"{row.divergence:.4f}",
            f"{row.predicted_loss_change:+.4f}",
            f"{row.measured_loss_change:+.4f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "\nbits: bits per weight, with scales, zero points and outliers. predicted: loss change in nats per token, "
        "estimated on calibration text before quantizing. measured: loss change on held-out text. perplexity and "
        "divergence (mean KL divergence from the original model) are measured on the held-out text, too.",
        style="dim",
    )
