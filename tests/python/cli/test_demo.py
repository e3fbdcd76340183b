import sysconfig
from pathlib import Path

import pytest
import torch

from quantrature import QuantratureError, models
from quantrature.demo import text, tour
from quantrature.text import token_windows


def test_the_package_ships_its_model():
    files = [path for path in tour.MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3 * 2**20
    model = models.load_model(tour.MODEL)
    assert model.dtype == torch.bfloat16
    assert (
        models.load_tokenizer(tour.MODEL).decode(
            models.load_tokenizer(tour.MODEL)("def f(x):\n    return x")["input_ids"]
        )
        == "def f(x):\n    return x"
    )


def test_no_text_is_in_two_parts_and_all_is_in_one():
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = [text.training_text(), text.calibration_text(), text.evaluation_text()]
    module = (root / "argparse.py").read_text(encoding="utf-8")
    assert sum(module in part for part in parts) == 1
    assert len(parts[0]) > 4 * max(len(part) for part in parts[1:])
    assert min(len(part) for part in parts) > 100_000


def test_the_model_has_learned_its_language():
    from quantrature.evaluate import perplexity

    tokenizer = models.load_tokenizer(tour.MODEL)
    windows = token_windows([text.evaluation_text()], tokenizer, seqlen=256, max_tokens=2048)
    assert perplexity(models.load_model(tour.MODEL, "float32"), windows).perplexity < 20


def test_the_tour(monkeypatch, tmp_path):
    monkeypatch.setattr(tour, "CALIBRATION_WINDOWS", 2)
    monkeypatch.setattr(tour, "EVALUATION_TOKENS", 1024)
    monkeypatch.setattr(tour, "BITS", (3, 2))
    rows = list(tour.tour(tmp_path / "kept"))
    assert len(rows) == 5
    original, *quantized = rows
    assert original.measured_loss_change == 0
    for uniform, planned in zip(quantized[::2], quantized[1::2], strict=True):
        assert planned.bytes <= uniform.bytes
        assert planned.bytes > 0.98 * uniform.bytes
        assert planned.predicted_loss_change < uniform.predicted_loss_change
        assert planned.divergence > 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"uniform-3", "pqi-3", "uniform-2", "pqi-2"}


def test_a_package_without_its_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tour, "MODEL", tmp_path)
    with pytest.raises(QuantratureError, match="installed without its model"):
        next(tour.tour())
