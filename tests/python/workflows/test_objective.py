"""The divergence as what an analysis integrates: the same proof, and the same number as an evaluation gives."""

import json

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, evaluate, models
from quantrature.allocation import measured_loss_changes, validate
from quantrature.analysis import objective
from quantrature.cli import main
from tiny_models import byte_tokenizer, tiny_model

TOKENS = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))
SETTINGS = {"bits": [2], "group_size": 16, "metrics": ["pqi"], "nodes": 4}


@pytest.mark.parametrize("layout", ["llama", "gemma2", "gpt2"])
def test_the_divergence_is_predicted_and_is_that_of_an_evaluation(layout):
    model = tiny_model(layout)
    found = qtr.analyze(model, TOKENS, objective="kl", **SETTINGS)
    (proof,) = found.proofs
    quantized = qtr.quantize(tiny_model(layout), bits=2, group_size=16)
    measured = evaluate.divergence(quantized, model, TOKENS).mean
    assert proof.measured_loss_change == pytest.approx(measured, rel=1e-4)
    assert proof.predicted_loss_change == pytest.approx(measured, rel=1e-2)
    assert found.objective == found.settings["objective"] == "kl"
    assert qtr.analyze(model, TOKENS, **SETTINGS).proofs[0].measured_loss_change != pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("layout", ["llama", "gemma2"])
def test_logits_are_kept_where_it_is_not_known_how_they_are_made(layout, monkeypatch):
    model = tiny_model(layout)
    kept = objective.Divergence(model, TOKENS, 2)
    assert next(iter(kept._kept.values())).shape[-1] == model.config.hidden_size
    monkeypatch.setattr(objective, "_known_endings", lambda model: [])
    whole = objective.Divergence(model, TOKENS, 2)
    assert next(iter(whole._kept.values())).shape[-1] == model.config.vocab_size
    moved = tiny_model(layout)
    with torch.no_grad():
        for parameter in moved.model.layers.parameters():
            parameter.mul_(1.1)
        one, other = (each(moved, TOKENS[2:4], range(2, 4)) for each in (kept, whole))
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert float(one) > 0


def test_plans_say_what_they_predict_and_are_measured_by_it():
    model = tiny_model("llama")
    found = qtr.analyze(model, TOKENS, objective="kl", **{**SETTINGS, "bits": [2, 3, 4]})
    plan = qtr.allocate(found, avg_bits=5.5, group_sizes=[16])
    assert plan.allocation["predicts"] == "kl"
    assert qtr.allocate(qtr.analyze(model, TOKENS, **SETTINGS), avg_bits=5.5).allocation["predicts"] == "nll"
    (measured,) = measured_loss_changes(model, TOKENS, [plan], objective="kl")
    assert plan.predicted_loss_change == pytest.approx(measured, rel=0.3)
    compared = validate(model, TOKENS, found, count=3)
    assert min(compared.measured) > 0
    assert compared.median_relative_error < 0.5


def test_requant_measures_and_ranks_by_the_divergence(tmp_path):
    model = tiny_model("llama")
    settings = {"bits": 2, "group_size": 16, "outlier_fraction": 0.01, "significant_fraction": 0.01}
    quantized, record = qtr.requant(tiny_model("llama"), TOKENS, objective="kl", **settings)
    measured = evaluate.divergence(quantized, model, TOKENS).mean
    assert record.settings["objective"] == "kl"
    assert record.measured_loss_change == pytest.approx(measured, rel=1e-4)
    assert record.predicted_loss_change == pytest.approx(measured, rel=0.02)
    assert min(stage.measured_loss_change for stage in record.stages) > 0
    _, by_loss = qtr.requant(tiny_model("llama"), TOKENS, **settings)
    assert by_loss.settings["objective"] == "nll"
    assert [m.mean_pqi for m in record.matrices] != [m.mean_pqi for m in by_loss.matrices]

    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    plain = qtr.quantize(tiny_model("llama"), bits=2, group_size=16)
    plain.save_pretrained(tmp_path / "plain")
    folder, source = tmp_path / "plain", tmp_path / "model"
    improved = qtr.requantization.requant_folder(
        folder, source, TOKENS, significant_fraction=0.05, objective="kl", output=tmp_path / "improved"
    )
    assert improved.stages[0].measured_loss_change > improved.measured_loss_change > 0
    after = evaluate.divergence(models.load_model(tmp_path / "improved"), model, TOKENS).mean
    assert improved.measured_loss_change == pytest.approx(after, rel=1e-3)
    with pytest.raises(InvalidArgumentError, match=r"\[requant\] objective must be one of nll, kl: got 'loss'"):
        qtr.requant(tiny_model("llama"), TOKENS, objective="loss", **settings)


def test_the_verbs(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 12)
    text = ["--calibration", str(tmp_path / "text.txt"), "--nsamples", "4", "--seqlen", "24"]
    analysis = ["analyze", str(tmp_path / "model"), "-o", str(tmp_path / "sens"), "--objective", "kl"]
    assert main([*analysis, "--bits", "2", "--group-size", "16", *text]) == 0
    assert "predicted divergence" in capsys.readouterr().out
    assert json.loads((tmp_path / "sens" / "sensitivity.json").read_text())["settings"]["objective"] == "kl"
    plan = str(tmp_path / "plan.json")
    assert main(["plan", str(tmp_path / "sens"), "--avg-bits", "5.5", "--group-sizes", "16", "-o", plan]) == 0
    assert "predicted divergence" in capsys.readouterr().out
    assert main(["plan", "validate", plan, str(tmp_path / "model"), "--json", *text]) == 0
    assert json.loads(capsys.readouterr().out)["measured_loss_change"] > 0
    quantize = ["quantize", str(tmp_path / "model"), "--bits", "2", "--group-size", "16", "--objective", "kl"]
    out = str(tmp_path / "out")
    assert main([*quantize, "-o", out, *text]) == 1
    assert "[quantize] --objective needs --requant" in capsys.readouterr().err
    assert main([*quantize, "--requant", "-o", out, *text]) == 0
    assert "KL divergence from the original model" in capsys.readouterr().out
    requant = ["requant", out, "--source", str(tmp_path / "model"), "--significant-fraction", "0.01", *text]
    assert main([*requant, "--objective", "kl", "-o", str(tmp_path / "better"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["objective"] == "kl"


def test_other_objectives_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"^\[analyze\] objective must be one of nll, kl: got 'loss'"):
        qtr.analyze(tiny_model("llama"), TOKENS, objective="loss", **SETTINGS)
