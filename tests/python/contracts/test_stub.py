import subprocess
import sys
from pathlib import Path

import pytest

import quantrature._C

STUB = Path(__file__).resolve().parents[3] / "python" / "quantrature" / "_C.pyi"

# The extension alone, under the name the build gives it, without the package around it.
GENERATE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv.pop(1))
sys.modules["_C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from nanobind.stubgen import main
main()
"""


def test_the_committed_stub_is_what_the_extension_has(tmp_path):
    pytest.importorskip("nanobind")
    made = tmp_path / "_C.pyi"
    command = [sys.executable, "-c", GENERATE, quantrature._C.__file__, "-m", "_C", "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    assert made.read_text() == STUB.read_text(), "copy build/dev/python/bindings/_C.pyi over the committed stub"
