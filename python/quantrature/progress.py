"""Progress on stderr: a bar if stderr is a terminal, else a line now and then for long work."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_SECONDS = 10.0
"""Work that takes less prints no line."""
NEXT_SECONDS = 30.0
"""Time from one line to the next."""

_shown = False


class Bar:
    """Progress of some work; its methods do nothing if none is shown."""

    _update: Callable[..., None] | None = None

    def advance(self, count: float = 1, note: str = "") -> None:
        """Report that ``count`` more units are done; ``note`` is shown beside the bar until the next call."""
        if self._update is not None:
            self._update(advance=count, note=note)


class _Lines:
    """Prints a line with the time left every 30 seconds, for logs and other readers that are no terminal."""

    def __init__(self, title: str, total: float) -> None:
        self._title, self._total = title, total
        self._done = 0.0
        self._begun = time.monotonic()
        self._next = self._begun + FIRST_SECONDS

    def update(self, advance: float, note: str) -> None:
        """Count what is done, and print a line if it is time."""
        self._done += advance
        now = time.monotonic()
        if now < self._next or not self._done:
            return
        self._next = now + NEXT_SECONDS
        spent = now - self._begun
        left = spent * max(0.0, self._total - self._done) / self._done
        percent = 100 * min(1.0, self._done / self._total)
        about = f", {note}" if note else ""
        line = f"{self._title}: {percent:.0f} % after {_duration(spent)}, about {_duration(left)} left{about}"
        print(line, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Print the time that the work took, if a line was printed before."""
        spent = time.monotonic() - self._begun
        if spent >= FIRST_SECONDS:
            print(f"{self._title}: done in {_duration(spent)}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Format a duration: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def progress(title: str, total: float, show: bool | None = None) -> Iterator[Bar]:
    """Show progress and the time left while the ``with`` block runs.

    Args:
        title: what is being done.
        total: number of units of work.
        show: true shows a bar, false shows nothing. By default, a terminal shows a bar; elsewhere, work that takes more
            than 10 seconds prints a line every 30 seconds. Inside other progress, none is shown.
    """
    global _shown
    if _shown or show is False:
        yield Bar()
        return
    bar = Bar()
    if show is None and not sys.stderr.isatty():
        lines = _Lines(title, total)
        bar._update = lines.update
        _shown = True
        try:
            yield bar
            lines.finish()
        finally:
            _shown = False
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
            bar._update = functools.partial(bars.update, bars.add_task(title, total=total, note=""))
            yield bar
    finally:
        _shown = False
