"""Progress bars on stderr, shown only if stderr is a terminal."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_shown = False


class Bar:
    """A progress bar; its methods do nothing if no bar is shown."""

    _update: Callable[..., None] | None = None

    def advance(self, count: float = 1, note: str = "") -> None:
        """Report that ``count`` more units are done; ``note`` is shown beside the bar until the next call."""
        if self._update is not None:
            self._update(advance=count, note=note)


@contextmanager
def progress(title: str, total: float, show: bool | None = None) -> Iterator[Bar]:
    """Show a bar with the time left while the ``with`` block runs.

    Args:
        title: title of the bar.
        total: number of units of work.
        show: whether to show the bar; by default if stderr is a terminal. Inside another bar, none is shown.
    """
    global _shown
    if _shown or not (sys.stderr.isatty() if show is None else show):
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    _shown = True
    try:
        with Progress(*columns, console=Console(stderr=True)) as bars:
            bar = Bar()
            bar._update = functools.partial(bars.update, bars.add_task(title, total=total, note=""))
            yield bar
    finally:
        _shown = False
