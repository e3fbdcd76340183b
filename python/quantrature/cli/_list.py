"""``quantrature list``: the names that other verbs take."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from .._C import InvalidArgumentError
from ._options import Json
from ._output import print_json, print_table, stdout_kept_clean

KINDS = {
    "methods": ("quantrature.methods", "METHODS"),
    "strategies": ("quantrature.allocation", "STRATEGIES"),
    "metrics": ("quantrature.analysis", "METRICS"),
    "objectives": ("quantrature.analysis", "OBJECTIVES"),
    "solvers": ("quantrature.methods", "SOLVERS"),
    "formats": ("quantrature.export", "FORMATS"),
}
"""Where each kind is kept, as a mapping from names to a line about each."""


def run(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(KINDS)}.", metavar="KIND", show_default="all")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, strategies, metrics, objectives, solvers and formats there are."""
    if kind is not None and kind not in KINDS:
        raise InvalidArgumentError(f"[list] kind must be one of {', '.join(KINDS)}: got {kind}")
    with stdout_kept_clean(as_json):
        found = {name: _entries(*KINDS[name]) for name in KINDS if kind in (None, name)}
    if as_json:
        print_json(found)
        return
    for name, entries in found.items():
        print_table(name, entries.items())


def _entries(module: str, attribute: str) -> dict[str, str]:
    """The names that are kept there, and a line about each."""
    return {name: str(about) for name, about in getattr(importlib.import_module(module), attribute).items()}
