"""Sphinx: python -m sphinx -W -b html docs build/docs."""

import inspect
import re
import shutil
import subprocess
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path

from sphinx.util.inspect import stringify_signature

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from sphinx import addnodes  # noqa: E402
from sphinx.errors import ExtensionError  # noqa: E402
from sphinx.util import logging  # noqa: E402

import quantrature  # noqa: E402

project = "quantrature"
author = "the authors of quantrature"
release = quantrature.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
extensions += ["breathe", "every_verb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
smartquotes = False  # which would make dashes of the hyphens of options
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
breathe_projects = {"quantrature": str(ROOT / "build" / "doxygen" / "xml")}
breathe_default_project = "quantrature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # results are told of in sentences
napoleon_use_ivar = True  # attributes in the text of their class, once


def xml_of_the_headers(app):
    """Run Doxygen over the public headers, and warn if a name has no comment or a reference leads nowhere."""
    if shutil.which("doxygen") is None:
        raise ExtensionError("The reference of the headers needs doxygen: apt-get install doxygen")
    (ROOT / "build").mkdir(exist_ok=True)
    done = subprocess.run(["doxygen", "docs/Doxyfile"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        logging.getLogger(__name__).warning("Doxygen: %s", done.stderr)


def operations_alone_in_contents(app, doctree):
    """Leave fields and enumerators out of the contents beside the page of the headers: there are hundreds."""
    for entry in doctree.findall(addnodes.desc):
        if entry["domain"] == "cpp" and entry["objtype"] in ("member", "var", "enumerator"):
            for signature in entry.findall(addnodes.desc_signature):
                signature["_toc_name"] = ""


def each_name_by_itself(app, what, name, obj, options, lines):
    """Split an entry for several names, "bits, group_size: ...": Sphinx takes the first one for a type."""
    told = []
    i = 0
    while i < len(lines):
        field = re.match(r":(param|ivar) ((?:[*\\]*\w+, )+[*\\]*\w+):(.*)", lines[i])
        block = [lines[i]]
        i += 1
        while field and i < len(lines) and lines[i].startswith("  "):
            block.append(lines[i])
            i += 1
        if field:
            kind, names, text = field.groups()
            for each in names.split(", "):
                told += [f":{kind} {each}:{text}", *block[1:]]
        else:
            told += block
    lines[:] = told


def types_without_rules(app, what, name, obj, options, signature, result):
    """Show the types of a dataclass's fields without their annotations for pydantic."""
    if what != "class" or not is_dataclass(obj):
        return None
    try:
        types = typing.get_type_hints(obj)
    except NameError:  # a type that is imported for type checkers alone
        return None
    found = inspect.signature(obj)
    parameters = [p.replace(annotation=types.get(p.name, p.annotation)) for p in found.parameters.values()]
    shown = found.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return stringify_signature(shown, unqualified_typehints=True), result


def files_of_the_repository(app, name, content):
    """Turn links to Markdown files outside of docs, which work in the repository, into downloads."""
    content[0] = re.sub(
        r"\[([^\]]+)\]\(((?:\.\./)+(?:bench|examples)/[\w./-]+\.md)\)", r"{download}`\1 <\2>`", content[0]
    )


def setup(app):
    """Connect the functions above; each_name_by_itself after napoleon, which has made fields of the sections."""
    app.connect("builder-inited", xml_of_the_headers)
    app.connect("doctree-read", operations_alone_in_contents, priority=400)  # before Sphinx collects the contents
    app.connect("source-read", files_of_the_repository)
    app.connect("autodoc-process-signature", types_without_rules)
    app.connect("autodoc-process-docstring", each_name_by_itself, priority=900)
