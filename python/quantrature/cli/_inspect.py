"""``quantrature inspect``: show the matrices, bits and sizes in a model folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import Json, TrustRemoteCode
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..checkpoint import Contents
    from ..quantization.dense_folder import DenseContents


def run(
    folder: Annotated[str, typer.Argument(help="Folder with a model, quantized or not.", metavar="DIR")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show how each matrix of a model folder is stored, and sizes, without loading the weights.

    For a folder that is not quantized: its size, and how many weights can be quantized.
    """
    with stdout_kept_clean(as_json):
        from ..checkpoint import inspect, is_quantized

        found: Contents | DenseContents
        if is_quantized(folder):
            found = inspect(folder)
            said = {
                "quantized": True,
                "bits_per_weight": found.bits_per_weight,
                "bytes": found.bytes,
                "other_bytes": found.other_bytes,
                "modules": found.modules,
            }
            rows = _quantized_rows(found)
        else:
            from ..quantization.dense_folder import describe_dense

            found = describe_dense(folder, trust_remote_code)
            said = {"quantized": False, "parameters": found.parameters, **asdict(found)}
            rows = _dense_rows(found)
    if as_json:
        print_json(said)
    else:
        print_table(folder, rows)


def _quantized_rows(found: Contents) -> list[tuple[str, str]]:
    rows = [
        (
            name,
            f"{m['bits_per_weight']:.3f} bits per weight: {m['setting']}"
            + (f", {m['outliers']:,} outliers" if m["outliers"] else ""),
        )
        for name, m in found.modules.items()
    ]
    return [
        *rows,
        ("all matrices", f"{found.bits_per_weight:.3f} bits per weight, {found.bytes:,} bytes"),
        ("other tensors", f"{found.other_bytes:,} bytes"),
    ]


def _dense_rows(found: DenseContents) -> list[tuple[str, str]]:
    return [
        ("model", f"{found.model_class}, not quantized, {found.blocks} blocks"),
        ("size", f"{found.bytes:,} bytes, {found.parameters:,} parameters"),
        *(("", f"{count:,} parameters in {dtype}") for dtype, count in found.dtypes.items()),
        (
            "can be quantized",
            f"{found.matrices} matrices, {found.matrix_parameters:,} weights, {found.matrix_bytes:,} bytes",
        ),
        *(("stays as it is", f"{count:,} weights: {reason}") for reason, count in found.kept.items()),
        ("at 4 bits", f"{found.quantized_bytes:,} bytes in all, with groups of 64"),
    ]
