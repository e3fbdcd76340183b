"""``quantrature plan export``: a plan in the words of another tool."""

from __future__ import annotations

from typing import Annotated

import typer

from .._C import InvalidArgumentError
from ._output import print_table


def run(
    plan: Annotated[str, typer.Argument(help="What quantrature plan wrote.", metavar="PLAN")],
    to: Annotated[str, typer.Argument(help="One of 'quantrature list formats'.", metavar="FORMAT")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="File to write, in place of printing it.", metavar="FILE")
    ] = None,
) -> None:
    """Express a plan as the options of GPTQModel, compressed-tensors, AutoRound or llama.cpp."""
    from ..export.plans import export, to_text
    from ..plan import Plan

    text = to_text(export(Plan.load(plan), to))
    if output is None:
        print(text, end="")
        return
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InvalidArgumentError(f"[plan export] cannot write {output}: {error.strerror}") from None
    print_table(f"{plan} for {to}", [("written to", output)])
