"""The programs under examples/, built against an installed core, print what Python prints."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import quantrature as qtr
from quantrature import checkpoint, ops
from quantrature.nn import quantized_layers
from quantrature.plan import Plan, PlanEntry

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("core")]  # one worker builds the core


def run(*command, cwd=None, **environment):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """An installed shared core with the reference kernels, so that every number is that of the reference."""
    if not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("needs cmake and a C++ compiler")
    work = tmp_path_factory.mktemp("core")
    options = ["-DQUANTRATURE_PYTHON=OFF", "-DQUANTRATURE_SIMD=OFF", "-DBUILD_SHARED_LIBS=ON"]
    run("cmake", "-S", ROOT, "-B", work / "build", *options)
    run("cmake", "--build", work / "build")
    run("cmake", "--install", work / "build", "--prefix", work / "prefix")
    return work / "prefix"


@pytest.fixture
def reference():
    before = qtr.target()
    qtr.set_target("reference")
    yield
    qtr.set_target(before)


@pytest.fixture(scope="module")
def c_program(prefix, tmp_path_factory):
    if not shutil.which("pkg-config") or subprocess.run(["pkg-config", "--exists", "libcjson"]).returncode != 0:
        pytest.skip("needs pkg-config and libcjson-dev")
    build = tmp_path_factory.mktemp("c")
    run("cmake", "-S", ROOT / "examples" / "c", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    return build / "matvec"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has every way of storing a grid."""
    from tiny_models import tiny_model

    model = tiny_model("llama")
    layer = "model.layers.0.mlp."
    plan = Plan(
        {
            "model.layers.0.self_attn.q_proj": PlanEntry(4, 16),
            "model.layers.0.self_attn.o_proj": PlanEntry(3, -1, sym=True),
            layer + "gate_proj": PlanEntry(2, 8, meta_bits=8, method="hqq"),
            layer + "down_proj": PlanEntry(3, 16, meta_bits=8, outlier_fraction=0.02),
            layer + "up_proj": PlanEntry(8, 64, outlier_fraction=0.01),
        }
    )
    model = qtr.quantize(model, plan=plan)
    target = tmp_path_factory.mktemp("checkpoint") / "out"
    checkpoint.save(model, target)
    return target, {name: layer.matrix for name, layer in quantized_layers(model).items()}


def test_c_runs_a_layer_of_a_checkpoint(c_program, folder, reference):
    path, matrices = folder
    assert len(matrices) == 5
    for name, matrix in matrices.items():
        printed = run(c_program, path, name).stdout.split()
        x = torch.tensor(np.cos(np.arange(matrix.dense.shape[1], dtype=np.float64)).astype(np.float32))
        expected = ops.matvec(matrix.dense, x, matrix.outliers)
        assert np.array(printed, np.float32).tolist() == expected.tolist(), name
        torch.testing.assert_close(expected, matrix.dequantize("float32") @ x, rtol=1e-4, atol=1e-4)


def test_c_refuses_what_is_not_there(c_program, folder, tmp_path):
    path, _ = folder
    missing = subprocess.run([c_program, path, "model.norm"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert missing.stderr == "there is no model.norm\n"
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"):
        done = subprocess.run([c_program, damaged, name], capture_output=True, text=True)
        assert done.returncode in (0, 1)
    (damaged / "model.safetensors").write_bytes(whole[:6])
    done = subprocess.run([c_program, damaged, name], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is no safetensors file" in done.stderr


def test_rust_gives_the_numbers_of_python(prefix, reference, tmp_path):
    if not shutil.which("cargo"):
        pytest.skip("needs cargo")
    environment = {"QUANTRATURE_PREFIX": str(prefix), "CARGO_TARGET_DIR": str(tmp_path), "CARGO_NET_OFFLINE": "true"}
    done = run("cargo", "run", "--quiet", cwd=ROOT / "examples" / "rust", **environment)
    rows, cols = 6, 80
    w = (((np.arange(rows * cols) * 37) % 101).astype(np.float32) / np.float32(50) - np.float32(1)).reshape(rows, cols)
    x = ((np.arange(cols) * 13) % 29).astype(np.float32) / np.float32(16) - np.float32(0.875)
    expected = ops.matvec(ops.quantize(w, bits=3, group_size=32, solver="mse", scale_dtype="float32"), x)
    *numbers, chosen = done.stdout.splitlines()
    assert np.array(numbers, np.float32).tolist() == expected.tolist()
    found = ops.multiple_choice_knapsack([[9.0, 3.0, 1.0], [5.0, 2.0, 0.5]], [[2, 3, 4], [2, 3, 4]], 6)
    assert [int(k) for k in chosen.split()] == list(found.chosen)
    assert "refuses 9 bits: [quantize] bits must be 1 to 8: got bits=9" in done.stderr
