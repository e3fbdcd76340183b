"""What commands print: a small table, or with ``--json`` one JSON object."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._estimate import Cost


@contextlib.contextmanager
def stdout_kept_clean(as_json: bool) -> Iterator[None]:
    """With ``--json``, redirect everything that libraries print from stdout to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object. Values that are not finite, such as the standard error of one window, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(entry) for key, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(finite(values), allow_nan=False))


def print_cost(title: str, cost: Cost, as_json: bool) -> None:
    """Print the estimate that --dry-run asks for."""
    if as_json:
        print_json(cost.to_json())
    else:
        print_table(title, cost.rows())


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a title and a table of names and values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console = Console()
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)
