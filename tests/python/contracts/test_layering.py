"""The arrows of CONTRIBUTING.md: what may import and include what."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "python" / "quantrature"

WITHOUT_TORCH = (
    "__init__",
    *(f"checkpoint/{name}" for name in ("__init__", "card", "contents", "declaration", "save", "tensors")),
    "exports/plans",
    *(f"files/{name}" for name in ("__init__", "json_files", "new_folder", "remote_code")),
    "integrations/_import_hook",
    *(f"methods/{path.name}" for path in sorted((PACKAGE / "methods").glob("*.py"))),
    "ops/_arrays",
    *(f"packed/{path.name}" for path in sorted((PACKAGE / "packed").glob("*.py")) if path.stem != "product"),
    *(f"plan/{path.name}" for path in sorted((PACKAGE / "plan").glob("*.py"))),
    "progress",
)
"""Modules that are imported without torch and transformers; they may import both inside functions."""


def at_the_head(path):
    """What a module imports when it is imported itself: full names, those of the package from its root."""
    package = ["quantrature", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()

    def walk(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found.add(module)
                found.update(f"{module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                walk(ast.iter_child_nodes(node))

    walk(ast.parse(path.read_text()).body)
    return found


def of(names, *packages):
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in packages))


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_ops_know_numpy_and_the_core_alone(path):
    allowed = ("quantrature.ops", "quantrature._C", "quantrature.ops._arrays", "numpy")
    ours = of(at_the_head(path), "quantrature", "torch", "transformers", "scipy", "numpy")
    assert [n for n in ours if n != "quantrature" and not of([n], *allowed)] == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_loads_early_loads_without_torch(name):
    assert of(at_the_head((PACKAGE / name).with_suffix(".py")), "torch", "transformers", "accelerate") == []


VERBS = [path for path in sorted((PACKAGE / "cli").glob("*.py")) if path.stem != "_estimate"]
"""Modules that every call of the program loads; what a dry run computes with is loaded by the verbs that offer it."""


@pytest.mark.parametrize("path", VERBS, ids=lambda path: path.stem)
def test_the_command_line_imports_the_rest_inside_functions(path):
    names = at_the_head(path)
    assert of(names, "torch", "transformers", "numpy", "rich") == []
    ours = {n for n in of(names, "quantrature") if not n.startswith(("quantrature.cli", "quantrature._C"))}
    assert ours <= {"quantrature", "quantrature.__version__"} | {n for n in ours if "target" in n or "threads" in n}


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder):
    return [path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".hpp", ".cc", ".cpp", ".inc")]


def test_the_core_knows_no_python_torch_or_cuda():
    assert sources("cpp")
    for path in sources("cpp"):
        for header in includes(path):
            assert not re.match(r"Python\.h|nanobind|torch|ATen|c10|cuda", header), (path, header)


def test_public_headers_include_public_headers_alone():
    for path in sources("cpp/include"):
        for header in includes(path):
            assert "/" not in header or header.startswith("quantrature/"), (path, header)


def test_highway_is_for_vector_code_alone():
    for path in sources("cpp"):
        if any(header.startswith("hwy/") for header in includes(path)):
            assert "simd" in path.name, path


def test_bindings_see_public_headers_alone():
    for path in sources("python/bindings"):
        for header in includes(path):
            assert header.split("/")[0] in ("quantrature", "bindings", "nanobind") or "/" not in header, (path, header)


def test_there_is_no_drawer_for_everything():
    for folder in ("cpp", "cuda", "python", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            assert path.stem not in ("utils", "util", "misc", "common_utils"), path


def test_every_function_of_the_c_interface_is_given_bad_arguments():
    declared = re.findall(
        r"QTR_API qtr_status (qtr_\w+)\(const qtr_\w+_args\*", (ROOT / "cpp/include/quantrature/c_api.h").read_text()
    )
    assert len(declared) >= 27
    cases = (ROOT / "tests/cpp/test_c_api.cc").read_text()
    fuzzed = "".join(path.read_text() for path in (ROOT / "tests/fuzz").glob("fuzz_*.cc"))
    for name in declared:
        for place, text in ((r"expect_sound\(", cases), (r"REFUSED\(", cases), (r"call\(", fuzzed)):
            assert re.search(rf"{place}\s*{name},", text), (place, name)


def test_messages_outside_cli_do_not_speak_of_options_of_the_command_line():
    for path in sorted(PACKAGE.rglob("*.py")):
        if {"cli", "demo"} & set(path.relative_to(PACKAGE).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called and (called.endswith("Error") or called.startswith(("_log.", "warnings."))):
                said = "".join(
                    n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                )
                assert not re.search(r"--[a-z]", said), (path, said)
