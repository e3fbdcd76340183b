"""``quantrature plan export``: convert a plan to the options of another tool."""

from __future__ import annotations

from typing import Annotated

import typer

from .._C import InvalidArgumentError
from ._output import print_table


def run(
    plan: Annotated[str, typer.Argument(help="A plan.json that quantrature plan wrote.", metavar="PLAN")],
    to: Annotated[str, typer.Argument(help="Format; 'quantrature list formats' shows all.", metavar="FORMAT")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="File to write; printed on stdout by default.", metavar="FILE")
    ] = None,
) -> None:
    """Convert a plan to the options of GPTQModel, compressed-tensors, AutoRound or llama.cpp."""
    from ..exports.plans import export_plan, to_text
    from ..plan import Plan

    text = to_text(export_plan(Plan.load(plan), to))
    if output is None:
        print(text, end="")
        return
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InvalidArgumentError(f"[plan export] cannot write {output}: {error.strerror}") from None
    print_table(f"{plan} for {to}", [("written to", output)])
