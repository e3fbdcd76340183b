"""The command line: ``quantrature VERB MODEL [options]``, one file per verb.

A verb is a function ``run`` in ``_<verb>.py`` and a name in VERBS. The docstring of ``run`` is the help text. Options
that belong together form a group (``_groups.py``). A verb imports what it needs inside ``run``, so that ``--help`` does
not import torch. A verb of two words is in ``_<first>_<second>.py`` and takes precedence over the first word alone:
``quantrature plan diff`` compares plans. For a model in a folder named ``diff``, write ``./diff``.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .._C import QuantratureError
from ._groups import as_command

VERBS = (
    "analyze",
    "plan",
    "plan diff",
    "plan validate",
    "plan export",
    "quantize",
    "requant",
    "export",
    "eval",
    "inspect",
    "verify",
    "demo",
    "doctor",
    "list",
)
"""Names of all verbs, in the order of the help text."""


class _Verbs(TyperGroup):
    """A group of commands whose names have one or two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the name of the command, the command, and the remaining arguments."""
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


@app.callback(invoke_without_command=True)
def quantrature(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Post-training weight quantization for language models that knows what each weight costs."""
    if version:
        typer.echo(f"quantrature {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _verb in VERBS:
    app.command(_verb)(as_command(importlib.import_module(f"._{_verb.replace(' ', '_')}", __name__).run))


def _verb_of(given: Sequence[str]) -> str:
    """Return the verb, of one or two words, that the command line begins with."""
    return max((verb for verb in VERBS if given[: verb.count(" ") + 1] == verb.split()), key=len, default="quantrature")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    An error is printed as one line on stderr. To get the traceback, set the environment variable QUANTRATURE_DEBUG.

    Args:
        arguments: command-line arguments; ``sys.argv[1:]`` by default.

    Returns:
        The exit status: 0 for success, 1 for an error, 2 for wrong usage, 130 after an interrupt.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter("quantrature: note: %(message)s"))
    logging.getLogger("quantrature").addHandler(notes)
    try:
        status = app(given, prog_name="quantrature", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if os.environ.get("QUANTRATURE_DEBUG"):
            raise
        usage = getattr(error, "format_message", None)  # Typer's own errors, whichever click it comes with
        text = " ".join((usage() if usage else str(error)).split())
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "transformers"):
            text = f"this command needs {error.name}, which is not installed: pip install 'quantrature[hf]'"
        elif isinstance(error, QuantratureError):  # it names the function that a verb called
            text = re.sub(r"^\[[\w.]+\]", f"[{_verb_of(given)}]", text)
        elif not usage:
            text = f"{type(error).__name__}: {text} (set QUANTRATURE_DEBUG=1 for the traceback)"
        print(f"quantrature: error: {text}", file=sys.stderr)
        return 2 if usage else 1
    finally:
        logging.getLogger("quantrature").removeHandler(notes)
