"""The threads of torch's OpenMP runtime run the core, too, once both are there."""

from pathlib import Path

import numpy as np
import torch

from fresh_python import run_python
from quantrature import ops
from quantrature._C import run_on_openmp_of

CHECK = """
import os, torch
import quantrature as qtr
from quantrature import ops
from quantrature.packed import product
qtr.set_num_threads(3)
w = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
packed = ops.PackedMatrix.of(ops.quantize(w, 4, 64))
x = torch.ones(512)
expected = packed.matvec(x)
assert qtr.num_threads() == 3
threads = len(os.listdir("/proc/self/task"))
"""


def test_only_a_library_that_is_loaded_has_threads():
    assert run_on_openmp_of("/no/such/library.so") is False
    assert run_on_openmp_of(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")) is True


def test_torchs_threads_run_the_core():
    done = run_python(
        "import os, torch\n"
        "torch.set_num_threads(3)\n"
        "torch.ones(4000000).sum()\n"  # torch starts its threads
        "before = len(os.listdir('/proc/self/task'))\n"
        + CHECK
        + "print(threads - before)\n"
        + "qtr.set_num_threads(1)\n"
        + "print(qtr.num_threads(), torch.equal(packed.matvec(x), expected))",
        OMP_NUM_THREADS="3",
    )
    assert done.stdout == "0\n1 True\n", done.stderr


def test_a_forked_child_runs_on_threads_of_its_own():
    done = run_python(
        CHECK
        + "child = os.fork()\n"
        + "if child == 0:\n"
        + "    os._exit(0 if torch.equal(packed.matvec(x), expected) and qtr.num_threads() == 3 else 1)\n"
        + "print(os.waitpid(child, 0)[1])"
    )
    assert done.stdout == "0\n", done.stderr


def test_products_in_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    w = np.random.default_rng(0).normal(size=(300, 512)).astype(np.float32)
    packed, x = ops.PackedMatrix.of(ops.quantize(w, 4, 64)), torch.ones(512)
    expected = packed.matvec(x)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: packed.matvec(x), range(64)):
            assert torch.equal(found, expected)
