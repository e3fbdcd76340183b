"""The directive every-verb: the help of each verb of the command line, taken from the program when Sphinx runs."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

FIRST_PANELS = ("Arguments", "Options")


def panels(command: Any) -> dict[str, list[Any]]:
    """Parameters by the panel of ``--help`` that has them, in its order."""
    found: dict[str, list[Any]] = {name: [] for name in FIRST_PANELS}
    for parameter in command.params:
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = getattr(parameter, "rich_help_panel", None) or default
        found.setdefault(panel, []).append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def names_of(parameter: Any) -> list[str]:
    """What a parameter is called on the command line."""
    if parameter.param_type_name == "argument":
        return [str(parameter.metavar or parameter.human_readable_name)]
    return [*parameter.opts, *parameter.secondary_opts]


def default_of(parameter: Any) -> str:
    """The default as ``--help`` shows it."""
    if getattr(parameter, "required", False):
        return "required"
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return shown
    default = parameter.default
    if default is None or default is False or callable(default) or default in ((), []):
        return ""
    if default is True and parameter.secondary_opts:
        return parameter.opts[0].lstrip("-")
    return str(default)


def cell(*content: nodes.Node) -> nodes.entry:
    """A cell of a table."""
    paragraph = nodes.paragraph()
    paragraph += list(content)
    return nodes.entry("", paragraph)


def table(parameters: list[Any]) -> nodes.table:
    """Names, help and default of parameters."""
    widths = (30, 55, 15)
    group = nodes.tgroup(cols=3)
    group += [nodes.colspec(colwidth=width) for width in widths]
    head = nodes.row()
    head += [cell(nodes.Text(title)) for title in ("name", "meaning", "default")]
    body = nodes.tbody()
    for parameter in parameters:
        names: list[nodes.Node] = []
        for name in names_of(parameter):
            names += [nodes.Text(", ")] if names else []
            names.append(nodes.literal(text=name))
        row = nodes.row()
        row += [cell(*names), cell(nodes.Text(parameter.help or "")), cell(nodes.Text(default_of(parameter)))]
        body += row
    group += [nodes.thead("", head), body]
    return nodes.table("", group)


def sections() -> list[nodes.section]:
    """A section for each verb, in the order of ``quantrature --help``: its help, and a table for each panel."""
    import typer.main

    from quantrature.cli import VERBS, app

    program = typer.main.get_command(app)
    found = []
    for verb in VERBS:
        command = program.commands[verb]  # type: ignore[attr-defined]
        title = f"quantrature {verb}"
        section = nodes.section(ids=[nodes.make_id(title)], names=[title])
        section += nodes.title(text=title)
        usage = [f"{title} [OPTIONS]", *(names_of(p)[0] for p in panels(command).get("Arguments", []))]
        section += nodes.literal_block(text=" ".join(usage), language="text")
        for text in re.split(r"\n\s*\n", command.help or ""):
            section += nodes.paragraph(text=" ".join(text.split()))
        for panel, parameters in panels(command).items():
            section += [nodes.rubric(text=panel), table(parameters)]
        found.append(section)
    return found


class EveryVerb(Directive):
    """The sections of all verbs."""

    def run(self) -> list[nodes.Node]:
        """Make the sections."""
        return list(sections())


def setup(app):  # noqa: D103
    app.add_directive("every-verb", EveryVerb)
    return {"parallel_read_safe": True}
