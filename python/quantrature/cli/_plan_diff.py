"""``quantrature plan diff``: show the matrices that two plans store differently."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import Json
from ._output import print_json, print_table, stdout_kept_clean

if TYPE_CHECKING:
    from ..plan import Plan


def run(
    one: Annotated[str, typer.Argument(help="The first plan.json.", metavar="A")],
    other: Annotated[str, typer.Argument(help="The second plan.json.", metavar="B")],
    as_json: Json = False,
) -> None:
    """Show the matrices that two plans store differently."""
    with stdout_kept_clean(as_json):
        from dataclasses import asdict

        from ..plan import Plan

        a, b = Plan.load(one), Plan.load(other)
        differing = a.diff(b)
    figures = {name: (_figure(a, name), _figure(b, name)) for name in ("bytes", "bits_per_weight", "loss_change")}
    if as_json:
        entries = {
            name: {"a": ours and asdict(ours), "b": theirs and asdict(theirs)}
            for name, (ours, theirs) in differing.items()
        }
        totals = {name: {"a": ours, "b": theirs} for name, (ours, theirs) in figures.items()}
        print_json({"entries": entries, **totals})
        return
    rows = [(name, f"{ours or 'missing'} → {theirs or 'missing'}") for name, (ours, theirs) in differing.items()]
    rows += [
        (name.replace("_", " "), f"{ours:{form}} → {theirs:{form}}")
        for (name, (ours, theirs)), form in zip(figures.items(), (",", ".4f", "+.6f"), strict=True)
        if ours is not None and theirs is not None
    ]
    print_table(f"{one} → {other}: {len(differing)} of {len(a)} matrices differ", rows)


def _figure(plan: Plan, name: str) -> Any:
    """Return a total of a plan: its bytes, bits per weight or predicted loss change; ``None`` if it has none."""
    return plan.predicted_loss_change if name == "loss_change" else plan.allocation.get(name)
