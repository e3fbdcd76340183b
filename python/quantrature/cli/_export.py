"""``quantrature export``: write a quantized model as another engine loads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ._options import Json
from ._output import print_json, print_table, stdout_kept_clean


def run(
    folder: Annotated[str, typer.Argument(help="Folder that quantrature quantize wrote.", metavar="OUT")],
    *,
    to: Annotated[str, typer.Option("--to", help="Target; 'quantrature list targets' shows all.", metavar="TARGET")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.", metavar="DIR")],
    allow_refit: Annotated[
        bool,
        typer.Option(
            "--allow-refit",
            help="Quantize a matrix again if the target cannot hold its grid; by default this is an error.",
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            help="The original model, whose weights --allow-refit quantizes.",
            show_default="the dequantized weights",
            metavar="MODEL",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a quantized model to a folder that MLX, vLLM or another engine loads.

    Codes, scales and zero points are kept, so that the weights stay the same. The table lists the other matrices.
    """
    with stdout_kept_clean(as_json):
        from .. import exports

        found = exports.export(folder, to, output, allow_refit=allow_refit, source=source)
    if as_json:
        matrices = {matrix.name: _without_name(asdict(matrix)) for matrix in found.matrices}
        print_json(
            {"target": to, "output": output, "bytes": found.bytes, "other_bytes": found.other_bytes}
            | {"matrices": matrices}
        )
        return
    counts = [f"{found.count(result)} {result}" for result in ("exact", "rounded", "refit") if found.count(result)]
    rows = [
        ("matrices", f"{len(found.matrices)}: {', '.join(counts)}"),
        ("bytes", f"{found.bytes:,}, and {found.other_bytes:,} for other tensors"),
        *((matrix.name, f"{matrix.result}, relative squared error {matrix.error:+.2g}") for matrix in found.inexact),
        ("written to", output),
    ]
    print_table(f"{folder} for {to}", rows)


def _without_name(values: dict[str, object]) -> dict[str, object]:
    del values["name"]
    return values
