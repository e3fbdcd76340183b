"""The documentation has a page for each method, and public names say what they are."""

import importlib
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import quantrature
from quantrature.allocation import STRATEGIES
from quantrature.analysis import METRICS
from quantrature.analysis.sensitivity import MatrixSensitivity, Proof
from quantrature.methods import METHODS
from quantrature.plan import Plan, PlanEntry

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
HEADERS = ROOT / "cpp" / "include" / "quantrature"
PUBLIC = (
    *("ops", "packed", "methods", "plan", "models", "nn", "checkpoint", "quantization", "analysis", "allocation"),
    *("requantization", "exports", "evaluate"),
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
        said = re.sub(r"\s*\n/// ?", " ", text)
        assert re.search(r"\b([Nn]umeric c|[Cc])lass [ELB]\b", said), header
        assert "Throws InvalidArgument" in said, header
        assert header == "packing.hpp" or re.search(r"NaN|finite", said), header


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def tables(page):
    """The rows of the tables of a page by the heading above them: the names in the first cell, and the other cells."""
    found = {}
    heading = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            first, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            for name in re.findall(r"`([^`]+)`", first):
                found.setdefault(heading, {})[name] = rest
    return found


@pytest.fixture(scope="module")
def analysis():
    from tiny_models import tiny_model

    model = tiny_model("llama")
    tokens = [[(7 * i + j) % 60 for j in range(16)] for i in range(4)]
    return model, quantrature.analyze(model, tokens, bits=[2, 4], group_size=16)


def test_the_page_of_plan_json_has_the_fields_that_are_read():
    page = tables(DOCS / "reference" / "plan-json.md")
    assert list(page["The file"]) == list(Plan({"a": PlanEntry(4)}).to_json())
    entry = page["An entry"]
    assert list(entry) == [f.name for f in fields(PlanEntry)]
    for f in fields(PlanEntry):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        said = entry[f.name][1].strip("`").strip('"')
        shown = {True: "true", False: "false", None: "null", MISSING: "required"}
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        expected = f"{default:g}" if is_number else str(default) if isinstance(default, (str, dict)) else shown[default]
        assert said == expected, f.name


def test_the_page_of_plan_json_has_what_allocations_say(analysis):
    model, sens = analysis
    known = set(tables(DOCS / "reference" / "plan-json.md")["allocation"])
    seen = {"quantized_on", "validation"}  # which the command line adds
    for strategy in STRATEGIES:
        scores = {m.name: 1.0 for m in sens.matrices} if strategy == "sensiboost" else None
        source = sens if strategy == "pqi" else model
        limits = {"group_sizes": [16]} if strategy in ("pqi", "uniform") else {}
        seen |= set(
            quantrature.allocate(source, strategy=strategy, avg_bits=6.5, sensitivity=scores, **limits).allocation
        )
    assert seen == known


def test_the_page_of_sensitivity_json_has_the_fields_that_are_written(analysis):
    _, sens = analysis
    page = tables(DOCS / "reference" / "sensitivity-json.md")
    written = sens.to_json()
    assert list(page["The file"]) == list(written)
    assert set(page["settings"]) == set(written["settings"])
    assert list(page["An object of proofs"]) == [f.name for f in fields(Proof)] == list(written["proofs"][0])
    assert list(page["An object of modules"]) == [f.name for f in fields(MatrixSensitivity)]


def test_the_reference_of_headers_has_every_header():
    page = (DOCS / "reference" / "headers.md").read_text()
    headers = [path for path in HEADERS.iterdir() if path.name != "export.h"]
    assert set(re.findall(r"^## (\S+\.h(?:pp)?)$", page, re.MULTILINE)) == {path.name for path in headers}
    shown = re.findall(r"^```\{doxygengroup\} (\w+)$", page, re.MULTILINE)
    for path in headers:
        assert re.match(r"/// \\defgroup (\w+) ", path.read_text())[1] == path.stem
        assert path.stem in shown


def test_the_json_schemas_are_those_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    json_schemas = importlib.import_module("json_schemas")
    for name, kind in json_schemas.FILES.items():
        written = (DOCS / "reference" / f"{name}.schema.json").read_text()
        assert written == json_schemas.schema_of(kind), "run: python docs/json_schemas.py"


def test_the_command_line_reference_has_every_verb_and_option(monkeypatch):
    pytest.importorskip("docutils")
    import typer.main

    from quantrature.cli import VERBS, app

    monkeypatch.syspath_prepend(DOCS)
    every_verb = importlib.import_module("every_verb")
    sections = every_verb.sections()
    assert [section["names"][0] for section in sections] == [f"quantrature {verb}" for verb in VERBS]
    program = typer.main.get_command(app)
    for verb, section in zip(VERBS, sections, strict=True):
        text = section.astext()
        for parameter in program.commands[verb].params:
            assert all(name in text for name in every_verb.names_of(parameter)), (verb, parameter.name)
