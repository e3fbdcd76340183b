"""The first lines of a table: the command, the date and the machine."""

from __future__ import annotations

import shlex
import sys
from datetime import date

from .machine import machine


def command(module: str) -> str:
    """Return the command line that started this run of a module of the benches."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def heading(module: str, threads: int) -> str:
    """Return the command, the date and the machine, in Markdown."""
    return f"`{command(module)}`\n\n{date.today()}, {machine(threads)}"
