"""``quantrature list``: names of methods, strategies, metrics, plan formats and export targets."""

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
    "formats": ("quantrature.exports", "FORMATS"),
    "targets": ("quantrature.exports", "TARGETS"),
}
"""The module and the attribute that hold each kind, as a mapping from names to one-line descriptions."""


def run(
    kind: Annotated[
        str | None, typer.Argument(help=f"What to list: {', '.join(KINDS)}.", metavar="KIND", show_default="all")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the available methods, strategies, metrics, objectives, plan formats and export targets."""
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
    """Return the names in a module's mapping, each with its one-line description."""
    return {name: str(about) for name, about in getattr(importlib.import_module(module), attribute).items()}
