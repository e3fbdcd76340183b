"""The documentation has a page for each method, and public names say what they are."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import quantrature
from quantrature.allocation import STRATEGIES
from quantrature.analysis import METRICS
from quantrature.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HEADERS = ROOT / "cpp" / "include" / "quantrature"
PUBLIC = (
    *("ops", "packed", "methods", "plan", "models", "nn", "checkpoint", "quantization", "analysis", "allocation"),
    *("requantization", "export", "evaluate"),
)


@pytest.mark.parametrize(
    ("folder", "names"),
    [("howto/methods", METHODS), ("concepts/metrics", METRICS), ("concepts/strategies", STRATEGIES)],
    ids=["methods", "metrics", "strategies"],
)
def test_every_method_has_a_page_and_every_page_a_method(folder, names):
    pages = {path.stem: path for path in (DOCS / folder).glob("*.md") if path.stem != "index"}
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
        assert f"quantrature.{name}" in (DOCS / "reference" / "python.md").read_text()


def test_every_argument_struct_has_a_header_with_its_contract():
    interface = (HEADERS / "c_api.h").read_text()
    structs = re.findall(r"^} (qtr_\w+_args);", interface, re.M)
    assert len(structs) > 20
    contracts = {path.name: path.read_text() for path in HEADERS.glob("*.hpp")}
    for struct in set(structs) - {"qtr_check_csr_args"}:  # whose C++ function takes the matrix itself
        (header,) = [name for name, text in contracts.items() if re.search(rf"using \w+ = {struct};", text)]
        text = contracts[header]
        (alias,) = re.findall(rf"using (\w+) = {struct};", text)
        assert f"(const {alias}& args);" in text, struct
        said = re.sub(r"\s*\n// ?", " ", text)
        assert re.search(r"\b([Nn]umeric c|[Cc])lass [ELB]\b", said), header
        assert "Throws InvalidArgument" in said, header
        assert header == "packing.hpp" or re.search(r"NaN|finite", said), header
