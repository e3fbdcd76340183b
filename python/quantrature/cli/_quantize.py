"""``quantrature quantize``: write a quantized copy of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from .._C import InvalidArgumentError
from ._output import Json, print_cost, print_json, print_table, stdout_kept_clean


def run(
    model: Annotated[str, typer.Argument(help="Folder, or id on the Hugging Face Hub.", metavar="MODEL")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")] = None,
    plan: Annotated[str | None, typer.Option(help="A plan.json, in place of the grid options.")] = None,
    bits: Annotated[int | None, typer.Option(help="1 to 8, the same everywhere.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1 for one group a row.")] = 64,
    method: Annotated[str, typer.Option(help="One of 'quantrature list methods'.")] = "rtn",
    sym: Annotated[bool, typer.Option("--sym", help="Grids symmetric around zero.")] = False,
    meta_bits: Annotated[int | None, typer.Option(help="Quantize scales and zeros to so many bits.")] = None,
    outliers: Annotated[float, typer.Option(help="Share of the weights kept exactly.")] = 0.0,
    ignore: Annotated[list[str] | None, typer.Option(help="Matrix to leave alone, or re:PATTERN; repeatable.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Text for methods that read one; none does yet.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of all that is not quantized: auto, float32, bfloat16, float16.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one safetensors file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how large and how long.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and write it to a folder."""
    if output is None and not dry_run:
        raise InvalidArgumentError("[quantize] -o must name a folder to write")
    with stdout_kept_clean(as_json):
        import logging

        from .. import checkpoint, models
        from .._quantize import plan_for, quantize
        from ..plan import Plan

        if calibration is not None:
            logging.getLogger(__name__).warning("method %s reads no calibration text", method)
        if output is not None:
            checkpoint.check_new_folder(output, overwrite)
        chosen = None if plan is None else Plan.load(plan)
        loaded = models.load_model(model, dtype, trust_remote_code=trust_remote_code)
        linears, chosen = plan_for(
            loaded,
            bits=bits,
            group_size=group_size,
            method=method,
            sym=sym,
            meta_bits=meta_bits,
            outliers=outliers,
            plan=chosen,
            ignore=ignore or (),
        )
        cost = None
        if dry_run:
            from .._estimate import quantizing

            cost = quantizing(loaded, linears, chosen)
        else:
            assert output is not None
            tokenizer = models.load_tokenizer(model, trust_remote_code)
            quantize(loaded, plan=chosen, progress=False if as_json else None)
            checkpoint.save(
                loaded,
                output,
                tokenizer=tokenizer,
                plan=chosen,
                source=model,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
            )
            found = checkpoint.inspect(output)
    if cost is not None:
        print_cost(f"quantizing {model}", cost, as_json)
        return
    if as_json:
        print_json(
            {
                "output": output,
                "bits_per_weight": found.bits_per_weight,
                "bytes": found.bytes,
                "other_bytes": found.other_bytes,
                "modules": len(found.modules),
                "predicted_loss_change": chosen.predicted_loss_change,
            }
        )
        return
    rows = [
        ("matrices", str(len(found.modules))),
        ("bits per weight", f"{found.bits_per_weight:.3f}, scales, zeros and outliers included"),
        ("bytes", f"{found.bytes:,} and {found.other_bytes:,} of other tensors"),
        ("written to", str(output)),
    ]
    print_table(f"{model}, quantized", rows)
