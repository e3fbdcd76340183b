"""The options of ``quantrature quantize`` for a size or a divergence, and what it then does and prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Grid, Loading, Resuming, Text
from ._input import size_in_bytes
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..checkpoint import Contents
    from ..to_budget import Budgeted

BUDGET = "The best model for a budget"


@dataclass(frozen=True)
class WithinBudget:
    """A size or a divergence, for which bits and group size of each matrix are chosen."""

    avg_bits: Annotated[
        float | None,
        typer.Option(
            help="Choose bits and group size of each matrix, for this many bits per weight, scales included. Needs "
            "--calibration.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(help="The same for a size of all quantized matrices: 90MB, 4.2GiB.", rich_help_panel=BUDGET),
    ] = None
    max_divergence: Annotated[
        float | None,
        typer.Option(
            help="The smallest model whose predicted KL divergence from the original is at most this, in nats per "
            "token.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    effort: Annotated[str, typer.Option(help="How much is tried: fast, default or best.", rich_help_panel=BUDGET)] = (
        "default"
    )

    @property
    def given(self) -> bool:
        """Whether there is a budget."""
        return any(value is not None for value in (self.avg_bits, self.target_size, self.max_divergence))

    @property
    def arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`quantrature.quantize_to_budget`."""
        target = None if self.target_size is None else size_in_bytes("quantize", self.target_size)
        return {
            "avg_bits": self.avg_bits,
            "target_bytes": target,
            "max_divergence": self.max_divergence,
            "effort": self.effort,
        }

    def check(self, others: Mapping[str, Any]) -> None:
        """Refuse options that do not go with a budget.

        Raises:
            InvalidArgumentError: for the first of ``others`` that is given, and for more than one budget.
        """
        budgets = {"--avg-bits": self.avg_bits, "--target-size": self.target_size}
        budgets["--max-divergence"] = self.max_divergence
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise InvalidArgumentError(f"[quantize] give one budget: got {' and '.join(given)}")
        for name, value in others.items():
            if value is not None:
                raise InvalidArgumentError(f"[quantize] {name} does not go with {given[0]}: remove one of them")


def quantize_within(
    budget: WithinBudget,
    model: str,
    output: str,
    grid: Grid,
    text: Text,
    loading: Loading,
    resuming: Resuming,
    writing: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Quantize a model to a budget, write it and print what it cost."""
    if text.calibration is None:
        raise InvalidArgumentError("[quantize] a budget needs a calibration text: give --calibration")
    with stdout_kept_clean(as_json):
        from .. import checkpoint, models
        from ..files.new_folder import check_new_folder
        from ..to_budget import quantize_to_budget

        check_new_folder(output, writing["overwrite"])
        loading.config(model, "quantize")
        tokenizer = loading.tokenizer(model)
        found = quantize_to_budget(
            loading.load(model, "quantize"),
            text.calibration,
            **budget.arguments,
            **grid.arguments,
            tokenizer=tokenizer,
            seqlen=text.seqlen,
            seed=text.seed,
            bos=text.bos,
            text_column=text.text_column,
            batch_size=text.batch_size,
            **resuming.beside(output),
            progress=False if as_json else None,
        )
        checkpoint.save(
            found.model,
            output,
            tokenizer=tokenizer,
            processor=models.processor_files(model),
            plan=found.plan,
            source=model,
            **writing,
        )
        contents = checkpoint.inspect(output)
    if as_json:
        print_json(_summary(found, contents, output))
    else:
        print_table(f"{model}, quantized by {grid.method}", _rows(found, contents, output))


def _summary(found: Budgeted, contents: Contents, output: str) -> dict[str, Any]:
    return {
        "output": output,
        "bits_per_weight": contents.bits_per_weight,
        "bytes": contents.bytes,
        "other_bytes": contents.other_bytes,
        "modules": len(contents.modules),
        "predicted_divergence": found.plan.predicted_loss_change,
        "held_out_divergence": found.held_out.divergence,
        "held_out_standard_error": None if math.isnan(found.held_out.standard_error) else found.held_out.standard_error,
        "held_out_windows": found.held_out.windows,
    }


def _rows(found: Budgeted, contents: Contents, output: str) -> list[tuple[str, str]]:
    held_out = found.held_out
    uncertainty = "" if math.isnan(held_out.standard_error) else f" +- {held_out.standard_error:.4f}"
    settings = Counter(entry.setting for _, entry in found.plan)
    return [
        ("bits per weight", f"{contents.bits_per_weight:.3f}, scales and zero points included"),
        ("bytes", f"{contents.bytes:,}, and {contents.other_bytes:,} for other tensors"),
        ("settings", ", ".join(f"{count} x {key}" for key, count in sorted(settings.items()))),
        ("predicted divergence", f"{found.plan.predicted_loss_change:.4f} nats per token"),
        ("measured divergence", f"{held_out.divergence:.4f}{uncertainty}, on {held_out.windows} windows held out"),
        ("written to", output),
    ]
