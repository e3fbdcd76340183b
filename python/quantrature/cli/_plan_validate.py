"""``quantrature plan validate``: compare the loss change that a plan predicts with the measured one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._C import InvalidArgumentError
from ._groups import Loading, Text
from ._options import CALIBRATION, Json
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class TextToMeasureOn(Text):
    """The text to measure loss changes on."""

    seed: Annotated[
        int, typer.Option(help="Random seed for drawing windows and random plans.", rich_help_panel=CALIBRATION)
    ] = 0
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", rich_help_panel=CALIBRATION)] = 8


def run(
    plan: Annotated[str, typer.Argument(help="A plan.json that quantrature plan wrote.", metavar="PLAN")],
    model: Annotated[str, typer.Argument(help="The model of the plan: folder or id.", metavar="MODEL")],
    *,
    sensitivity: Annotated[
        str | None,
        typer.Option(help="The analysis of the plan; also measure random plans made from it.", metavar="SENS"),
    ] = None,
    count: Annotated[int, typer.Option(help="Number of random plans to measure; needs --sensitivity.")] = 20,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="File for the plan with its validation added.", metavar="PLAN")
    ] = None,
    text: TextToMeasureOn,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Measure the loss change of a plan, and of random plans, and compare it with the prediction."""
    if text.calibration is None:
        raise InvalidArgumentError("[plan validate] --calibration must name a text to measure on, such as a .txt file")
    with stdout_kept_clean(as_json):
        from ..plan import Plan

        given = Plan.load(plan)
        if given.predicted_loss_change is None:
            raise InvalidArgumentError(
                f"[plan validate] {plan} must predict the loss change of every entry, as pqi plans do: got one without"
            )
        found = _measured(given, model, sensitivity, count, text, loading, False if as_json else None)
        if output is not None:
            from ._plan import write_plan

            write_plan(replace(given, allocation={**given.allocation, "validation": found}), output)
    if as_json:
        print_json(found)
        return
    rows = [(name.replace("_", " "), f"{found[name]:+.6f} nats per token") for name in list(found)[:2]]
    if sensitivity is not None:
        error = f"median relative error {found['median_relative_error']:.1%}"
        rows.append((f"{found['plans']} random plans", f"Spearman {found['spearman']:.3f}, {error}"))
    print_table(plan, rows)


def _measured(
    plan: Plan, model: str, sensitivity: str | None, count: int, text: Text, loading: Loading, progress: bool | None
) -> dict[str, Any]:
    """Return the predicted and measured loss change of the plan, and with an analysis those of random plans."""
    from ..allocation import measured_loss_changes, validate
    from ..analysis import Sensitivity

    analysis = None if sensitivity is None else Sensitivity.load(sensitivity)
    config = loading.config(model, "plan validate")
    tokens = text.read_with(loading.tokenizer(model)).windows(config)
    loaded = loading.load(model, "plan validate")
    objective = str(plan.allocation.get("predicts", "nll"))
    how: dict[str, Any] = {"batch_size": text.batch_size, "progress": progress}
    found: dict[str, Any] = {
        "predicted_loss_change": plan.predicted_loss_change,
        "measured_loss_change": measured_loss_changes(loaded, tokens, [plan], objective=objective, **how)[0],
    }
    if analysis is not None:
        found |= validate(loaded, tokens, analysis, count=count, seed=text.seed, **how).to_json()
    return found
