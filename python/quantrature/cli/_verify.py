"""``quantrature verify``: check that a quantized or exported folder was made from a given model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .._C import QuantratureError
from ._options import Json, TrustRemoteCode
from ._output import print_json, print_table, stdout_kept_clean


def run(
    folder: Annotated[str, typer.Argument(help="Folder that quantrature quantize or export wrote.", metavar="DIR")],
    source: Annotated[
        str,
        typer.Option(
            help="The original model: folder or id. For an exported folder, the quantized folder is possible, too.",
            metavar="MODEL",
        ),
    ],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Dequantize every matrix of a quantized or exported folder and compare it with the original model."""
    with stdout_kept_clean(as_json):
        from .. import exports
        from ..checkpoint.verify import verify

        exported = exports.target_of(folder) is not None
        found = (exports.verify if exported else verify)(folder, source, trust_remote_code)
    if as_json:
        print_json(
            {
                "ok": not found.failures,
                "failures": list(found.failures),
                "modules": {name: asdict(matrix) for name, matrix in found.modules.items()},
                "changed": list(found.changed),
            }
        )
    else:
        rows = [
            (name, f"relative error {matrix.relative_error:.4f}, largest {matrix.largest_error:.4g}")
            for name, matrix in found.modules.items()
        ]
        print_table(f"{folder} against {source}", rows)
    if found.failures:
        raise QuantratureError(f"[verify] {folder} was not made from {source}: {', '.join(found.failures[:3])} differ")
