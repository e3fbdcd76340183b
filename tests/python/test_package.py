import quantrature
from helpers import run_python


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


def test_public_names_exist():
    for name in quantrature.__all__:
        assert getattr(quantrature, name) is not None
    assert sorted(quantrature.__all__) == dir(quantrature)
