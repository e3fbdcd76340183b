"""The command line: ``quantrature VERB MODEL [options]``, a file for each verb.

A verb is a function ``run`` in ``_<verb>.py`` whose docstring is its help, and its name in VERBS. Options that go
together come in groups, which are values (``_groups.py``). A verb imports what it needs inside ``run``, so that help
comes without torch. A verb of two words, in ``_<first>_<second>.py``, goes before one of the first word alone:
``quantrature plan diff`` compares plans, and a model in a folder of that name is ./diff.
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
    "eval",
    "inspect",
    "verify",
    "demo",
    "doctor",
    "list",
)
"""In the order of the help text."""


class _Verbs(TyperGroup):
    """Commands of one word or two."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first words name, its name, and the words after it."""
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
    """The verb of the command line, of one word or two."""
    return max((verb for verb in VERBS if given[: verb.count(" ") + 1] == verb.split()), key=len, default="quantrature")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    A failure is one line on stderr, without a traceback unless the environment variable QUANTRATURE_DEBUG is set.

    Args:
        arguments: in place of those of the process.

    Returns:
        The exit status: 0, 1 after a failure, 2 after wrong usage, 130 after an interrupt.
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
            text = f"this needs {error.name}, which is not installed: pip install 'quantrature[hf]'"
        elif isinstance(error, QuantratureError):  # it names the function that a verb called
            text = re.sub(r"^\[[\w.]+\]", f"[{_verb_of(given)}]", text)
        elif not usage:
            text = f"{type(error).__name__}: {text} (QUANTRATURE_DEBUG=1 shows where)"
        print(f"quantrature: error: {text}", file=sys.stderr)
        return 2 if usage else 1
    finally:
        logging.getLogger("quantrature").removeHandler(notes)
