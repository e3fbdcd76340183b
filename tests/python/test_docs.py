"""The documentation has a page for each method, and public names say what they are."""

import importlib
import inspect
from pathlib import Path

import pytest

import quantrature
from quantrature.allocation import ALLOCATORS
from quantrature.analysis import METRICS
from quantrature.methods import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PUBLIC = ("ops", "analysis", "allocation", "calibration", "requantization", "evaluate", "models", "methods", "storage")


@pytest.mark.parametrize("kind", ["host", "metric", "allocator"])
def test_every_method_has_a_page_and_every_page_a_method(kind):
    names = {"host": METHODS, "metric": METRICS, "allocator": ALLOCATORS}[kind]
    pages = {path.stem: path for path in (DOCS / "methods" / kind).glob("*.md")}
    assert set(pages) == set(names)
    for name, path in pages.items():
        title = path.read_text().splitlines()[0]
        assert title.startswith(f"# {name}"), path


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_have_docstrings(module):
    loaded = importlib.import_module(f"quantrature.{module}")
    assert loaded.__doc__
    for name in loaded.__all__:
        found = getattr(loaded, name)
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            continue
        assert inspect.getdoc(found), name
        if inspect.isclass(found) and found.__module__.startswith("quantrature"):
            attributes = getattr(found, "__dataclass_fields__", {})
            for member, value in vars(found).items():
                if (
                    not member.startswith("_")
                    and member not in attributes
                    and (inspect.isroutine(value) or isinstance(value, property))
                ):
                    assert inspect.getdoc(getattr(found, member)), f"{name}.{member}"


def test_the_package_itself():
    for name in quantrature.__all__:
        assert inspect.getdoc(getattr(quantrature, name)), name
    for name in PUBLIC:
        assert f"quantrature.{name}" in (DOCS / "api" / "python.md").read_text()
