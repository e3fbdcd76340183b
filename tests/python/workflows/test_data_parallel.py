"""Calibration samples divided between processes, against one process that has them all."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from quantrature.models import load_model
from quantrature.nn import quantized_layers
from tiny_models import byte_tokenizer, tiny_model

RANKS = 2


def run_ranks(arguments, ranks=RANKS, fails=""):
    """The command line, or other code after -c, in as many processes as torchrun would start."""
    command = arguments if arguments[0] == "-c" else ["-m", "quantrature", *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    done = [process.communicate(timeout=300) for process in started]
    for process, (_, err) in zip(started, done, strict=True):
        assert (process.returncode == 0) == (not fails), err
    assert any(fails in err for _, err in done)
    return [out for out, _ in done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with some curvature, and a text."""
    root = tmp_path_factory.mktemp("ranks")
    model = tiny_model("llama")
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.data *= 5
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("It was the season of Light, it was the season of Darkness. " * 20)
    return root


@pytest.mark.parametrize("mode", ["after_mean", pytest.param("per_sample", marks=pytest.mark.slow)])
def test_two_ranks_find_what_one_finds(folder, tmp_path, mode):
    arguments = ["analyze", folder / "model", "--calibration", folder / "text.txt", "--json"]
    arguments += ["--metrics", "pqi,first_order,fisher,activation_error"]
    arguments += ["--bits", 2, "--group-size", 16, "--nodes", 2, "--nsamples", 5, "--seqlen", 32, "--abs-mode", mode]
    (one,) = run_ranks([*arguments, "-o", tmp_path / "one"], 1)
    mapped = ["--map-folder", tmp_path / "maps", "--resume-folder", tmp_path / "state"]
    (tmp_path / "maps").mkdir()
    several = run_ranks([*arguments, *mapped, "-o", tmp_path / "two"])
    assert several[1] == ""
    found, expected = json.loads(several[0]), json.loads(one)
    assert found["predicted_loss_change"] == pytest.approx(expected["predicted_loss_change"], rel=1e-6)
    assert found["measured_loss_change"] == pytest.approx(expected["measured_loss_change"], rel=1e-6)
    for one_matrix, matrix in zip(expected["modules"], found["modules"], strict=True):
        assert matrix["scores"] == pytest.approx(one_matrix["scores"], rel=1e-5, abs=1e-8)
    for metric in ("pqi", "first_order", "fisher"):
        maps, expected_maps = (load_file(tmp_path / name / f"maps-{metric}.safetensors") for name in ("two", "one"))
        for name, values in expected_maps.items():
            apart = torch.linalg.vector_norm((maps[name] - values).double())
            assert apart <= 1e-6 * torch.linalg.vector_norm(values.double())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", "one", "two"]
    assert len(list((tmp_path / "maps").iterdir())) == RANKS * len(expected_maps)


@pytest.mark.slow
def test_two_ranks_keep_what_one_keeps(folder, tmp_path):
    arguments = ["quantize", folder / "model", "--calibration", folder / "text.txt", "--requant", "--json"]
    arguments += ["--bits", 2, "--group-size", 16, "--nodes", 2, "--nsamples", 5, "--seqlen", 32]
    arguments += ["--outlier-fraction", 0.02, "--significant-fraction", 0.01]
    (one,) = run_ranks([*arguments, "-o", tmp_path / "one"], 1)
    several = run_ranks([*arguments, "-o", tmp_path / "two", "--map-folder", tmp_path / "maps"])
    assert several[1] == ""
    found, expected = json.loads(several[0]), json.loads(one)
    assert found["predicted_loss_change"] == pytest.approx(expected["predicted_loss_change"], rel=1e-4)
    assert found["measured_loss_change"] == pytest.approx(expected["measured_loss_change"], rel=1e-4)
    assert found["bytes"] == expected["bytes"]
    assert kept(tmp_path / "two").symmetric_difference(kept(tmp_path / "one")) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", "one", "two"]

    arguments = ["requant", tmp_path / "one", "--source", folder / "model", "--calibration", folder / "text.txt"]
    arguments += ["--json", "--significant-fraction", 0.01, "--nodes", 2, "--nsamples", 5, "--seqlen", 32]
    (one,) = run_ranks([*arguments, "-o", tmp_path / "more"], 1)
    several = run_ranks([*arguments, "-o", tmp_path / "more of two"])
    assert several[1] == ""
    assert json.loads(several[0])["significant"] == json.loads(one)["significant"]
    assert kept(tmp_path / "more of two") == kept(tmp_path / "more") > kept(tmp_path / "one")
    assert len(list(tmp_path.iterdir())) == 5


def kept(folder):
    """Matrix and place of every weight that is kept."""
    layers = quantized_layers(load_model(folder))
    sparse = {name: layer.matrix.outliers for name, layer in layers.items() if layer.matrix.outliers is not None}
    return {(name, place) for name, matrix in sparse.items() for place in matrix.positions().tolist()}


@pytest.mark.slow
def test_ranks_go_on_where_they_were(folder, tmp_path):
    arguments = ["quantize", folder / "model", "--calibration", folder / "text.txt", "--requant"]
    arguments += ["--bits", 2, "--group-size", 16, "--nodes", 2, "--nsamples", 5, "--seqlen", 32]
    run_ranks([*arguments, "-o", tmp_path / "whole"])
    journal = tmp_path / "parts.resume"
    run_ranks(["-c", _INTERRUPTED, *arguments, "-o", tmp_path / "parts"], fails="interrupted on purpose")
    assert sorted(path.name for path in journal.iterdir()) == [
        *(f"integral.rank-{rank}-of-{RANKS}.safetensors" for rank in range(RANKS)),
        "journal.safetensors",
    ]
    run_ranks([*arguments, "-o", tmp_path / "parts", "--resume", "required"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


_INTERRUPTED = """
import sys

import torch
from quantrature.analysis import objective
from quantrature.cli import main

nll, passes = objective.next_token_nll, []

def failing(model, tokens):
    passes.extend([1] * torch.is_grad_enabled())  # those of integrals
    if len(passes) > 10:
        raise ValueError("interrupted on purpose")
    return nll(model, tokens)

objective.next_token_nll = failing
sys.exit(main(sys.argv[1:]))
"""
