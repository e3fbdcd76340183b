"""``quantrature requant``: restore the original values of the most important weights in a quantized folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Loading, Quadrature, Resuming, Text
from ._input import check_fraction, size_in_bytes
from ._options import CALIBRATION, Json, MaxShardSize, Objective, Overwrite
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..requantization import Requantization


@dataclass(frozen=True)
class Budget:
    """How many weights to restore: as a fraction, as bits per weight or as bytes."""

    significant_fraction: Annotated[float | None, typer.Option(help="Fraction of all weights to restore, 0 to 1.")] = (
        None
    )
    avg_bits: Annotated[
        float | None, typer.Option(help="Instead: budget in bits per weight, scales and zero points included.")
    ] = None
    target_size: Annotated[
        str | None, typer.Option(help="Instead: size of all quantized matrices: 4.2GiB, 900MB, 123456 (bytes).")
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.requantization.requant_folder`.

        Raises:
            InvalidArgumentError: for none or several of the options, a fraction outside 0 to 1, or an invalid size.
        """
        if sum(given is not None for given in vars(self).values()) != 1:
            raise InvalidArgumentError(
                "[requant] a budget is needed: give exactly one of --significant-fraction, --avg-bits and --target-size"
            )
        check_fraction("requant", "--significant-fraction", self.significant_fraction)
        target = None if self.target_size is None else size_in_bytes("requant", self.target_size)
        return {
            "significant_fraction": self.significant_fraction,
            "avg_bits": self.avg_bits,
            "target_bytes": target,
        }


def run(
    folder: Annotated[str, typer.Argument(help="Folder that quantrature quantize wrote.", metavar="DIR")],
    *,
    source: Annotated[str, typer.Option(help="The original model: folder or id.", metavar="MODEL")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder to write; DIR itself with --overwrite.", metavar="OUT")
    ] = None,
    budget: Budget,
    steps: Annotated[
        int,
        typer.Option(
            help="Number of rounds; each recomputes PQI and restores an equal share of the weights.",
            rich_help_panel=CALIBRATION,
        ),
    ] = 2,
    objective: Objective = "nll",
    text: Text,
    integral: Quadrature,
    loading: Loading,
    resuming: Resuming,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Improve a quantized folder: restore the weights whose quantization costs most, within a size budget.

    On several processes (torchrun --no-python quantrature requant ...), each process takes a share of the windows.
    """
    if text.calibration is None:
        raise InvalidArgumentError("[requant] --calibration must name a calibration text, such as a .txt file")
    if output is None and not overwrite:
        raise InvalidArgumentError("[requant] -o must name a folder to write; to replace DIR itself, give --overwrite")
    amount, limits = budget.arguments, loading.limits("requant")
    with stdout_kept_clean(as_json), contextlib.ExitStack() as processes:
        from ..models.ranks import joined
        from ..requantization import requant_folder

        rank = processes.enter_context(joined())
        record = requant_folder(
            folder,
            source,
            text.calibration,
            output=output,
            steps=steps,
            objective=objective,
            batch_size=text.batch_size,
            dtype=loading.dtype,
            device_map=loading.device_map,
            max_memory=limits,
            trust_remote_code=loading.trust_remote_code,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=False if as_json or rank else None,
            **amount,
            **text.cut,
            **vars(integral),
            **resuming.beside(output or folder),
        )
    if rank:
        return  # the first process has written the same
    if as_json:
        print_json({"output": output or folder, **summary(record)})
        return
    rows = [
        ("bits per weight", f"{record.bits_per_weight:.3f}, scales, zero points and kept weights included"),
        ("bytes", f"{record.nbytes:,}"),
        *record_rows(record),
        ("written to", output or folder),
    ]
    print_table(f"{folder}, improved", rows)


def summary(record: Requantization) -> dict[str, Any]:
    """Return what --json prints of a record: all but the modules, which are in requant.json."""
    found = record.to_json()
    for name in ("format", "format_version", "modules"):
        del found[name]
    return found


def record_rows(record: Requantization) -> list[tuple[str, str]]:
    """Return a record as rows of a table."""
    rows = [
        ("as the paper counts", f"{record.paper_bits_per_weight:.3f} bits per weight"),
        ("kept exactly", f"{record.outliers:,} outliers and {record.significant:,} significant weights"),
        ("gradient evaluations", f"{record.gradient_evaluations} per sample"),
    ]
    if record.settings.get("objective") == "kl":
        rows.append(("measured", "KL divergence from the original model, on the calibration text"))
    for stage in record.stages:
        predicted = stage.predicted_loss_change
        rows.append(
            (
                f"  {stage.name}",
                f"measured {stage.measured_loss_change:+.6f} nats per token"
                + ("" if predicted is None else f", predicted {predicted:+.6f}"),
            )
        )
    return rows
