import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import quantrature
from fresh_python import run_python


def test_import_needs_numpy_alone():
    done = run_python(
        "import sys\n"
        "for name in ('torch', 'transformers', 'scipy', 'typer', 'rich', 'safetensors'): sys.modules[name] = None\n"
        "import numpy as np, quantrature\n"
        "from quantrature import ops\n"
        "print(ops.kurtosis(np.arange(9, dtype=np.float32), fisher=False))"
    )
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 1.77) < 1e-12


def test_the_kernel_set_can_be_forced():
    code = "import quantrature; print(quantrature.target())"
    assert run_python(code, QUANTRATURE_TARGET="reference").stdout.strip() == "reference"
    refused = run_python(code, QUANTRATURE_TARGET="AVX99")
    assert refused.returncode != 0
    assert "QUANTRATURE_TARGET=AVX99" in refused.stderr


def test_threads_come_from_the_environment():
    code = "import quantrature; print(quantrature.num_threads())"
    assert run_python(code, QUANTRATURE_NUM_THREADS="3").stdout.strip() == "3"
    assert run_python(code, QUANTRATURE_NUM_THREADS="", OMP_NUM_THREADS="2").stdout.strip() == "2"


def test_a_forked_child_has_threads_of_its_own():
    done = run_python(
        "import os, sys, numpy as np\n"
        "from quantrature import ops\n"
        "w = np.random.default_rng(0).standard_normal((300, 1000), np.float32)\n"
        "codes = ops.quantize(w, 4).codes\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if (ops.quantize(w, 4).codes == codes).all() else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        QUANTRATURE_NUM_THREADS="3",
    )
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    pytest.importorskip("transformers")  # environments of wheels have what the ops need
    for name in quantrature.__all__:
        assert getattr(quantrature, name) is not None
    assert sorted(quantrature.__all__) == dir(quantrature)


def test_the_page_on_an_index_has_no_links_into_the_repository():
    try:
        description = importlib.metadata.metadata("quantrature")["Description"]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("quantrature is not installed")
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


ELSEWHERE = {"_allocation": "test_knapsack.py", "_hessian": "test_gptq.py"}
"""Ops whose tests are in a file of another name."""


def test_wheels_are_tested_with_the_tests_of_every_op():
    from quantrature import ops

    root = Path(__file__).resolve().parents[3]
    command = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["test-command"]
    sources = [path for path in sorted(Path(ops.__file__).parent.glob("_[a-z]*.py")) if path.stem != "_arrays"]
    assert len(sources) >= 10
    assert set(ELSEWHERE) <= {path.stem for path in sources}
    for source in sources:
        tests = root / "tests/python/core" / ELSEWHERE.get(source.stem, f"test{source.stem}.py")
        assert tests.is_file(), f"{source.name} has no tests: {tests.name} is not there"
        public = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source.read_text(), re.MULTILINE)
        used = [name for name in public if re.search(rf"\b{name}\b", tests.read_text())]
        assert used or source.stem not in ELSEWHERE, f"{tests.name} calls nothing of {source.name}"
    named = re.findall(r"tests/python/(\S+)", command)
    assert "core" in named
    assert [name for name in named if not (root / "tests/python" / name).exists()] == []
