"""``quantrature inspect``: what a quantized folder holds."""

from __future__ import annotations

from typing import Annotated

import typer

from ._options import Json
from ._output import print_json, print_table, stdout_kept_clean


def run(
    folder: Annotated[str, typer.Argument(help="What quantrature quantize wrote.", metavar="DIR")],
    as_json: Json = False,
) -> None:
    """Show the grids and sizes in a quantized folder, without loading it."""
    with stdout_kept_clean(as_json):
        from ..checkpoint import inspect

        found = inspect(folder)
    if as_json:
        print_json(
            {
                "bits_per_weight": found.bits_per_weight,
                "bytes": found.bytes,
                "other_bytes": found.other_bytes,
                "modules": found.modules,
            }
        )
        return
    rows = [
        (
            name,
            f"{m['bits_per_weight']:.3f} bits per weight: {m['setting']}"
            + (f", {m['outliers']:,} outliers" if m["outliers"] else ""),
        )
        for name, m in found.modules.items()
    ]
    rows += [
        ("all matrices", f"{found.bits_per_weight:.3f} bits per weight, {found.bytes:,} bytes"),
        ("other tensors", f"{found.other_bytes:,} bytes"),
    ]
    print_table(folder, rows)
