"""Calibration samples divided between processes, against one process that has them all."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import byte_tokenizer, tiny_model

RANKS = 2


def run_ranks(arguments, ranks=RANKS):
    """The command line in as many processes as torchrun would start."""
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
            [sys.executable, "-m", "quantrature", *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    done = [process.communicate(timeout=300) for process in started]
    for process, (_, err) in zip(started, done, strict=True):
        assert process.returncode == 0, err
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


@pytest.mark.parametrize("mode", ["after_mean", "per_sample"])
def test_two_ranks_find_what_one_finds(folder, tmp_path, mode):
    arguments = ["analyze", folder / "model", "--calibration", folder / "text.txt", "--metrics", "pqi", "--json"]
    arguments += ["--bits", 2, "--group-size", 16, "--nodes", 2, "--nsamples", 5, "--seqlen", 32, "--abs-mode", mode]
    (one,) = run_ranks([*arguments, "-o", tmp_path / "one"], 1)
    mapped = ["--map-folder", tmp_path / "maps", "--state-file", tmp_path / "state"]
    (tmp_path / "maps").mkdir()
    several = run_ranks([*arguments, *mapped, "-o", tmp_path / "two"])
    assert several[1] == ""
    found, expected = json.loads(several[0]), json.loads(one)
    assert found["predicted_loss_change"] == pytest.approx(expected["predicted_loss_change"], rel=1e-6)
    assert found["measured_loss_change"] == expected["measured_loss_change"]
    maps, expected_maps = (load_file(tmp_path / name / "maps-pqi.safetensors") for name in ("two", "one"))
    for name, values in expected_maps.items():
        apart = torch.linalg.vector_norm((maps[name] - values).double())
        assert apart <= 1e-6 * torch.linalg.vector_norm(values.double())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", "one", "two"]
    assert len(list((tmp_path / "maps").iterdir())) == RANKS * len(expected_maps)
