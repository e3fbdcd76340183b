"""Methods that minimize an error compare themselves with rtn by it, and say so where they lost."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantrature as qtr
from quantrature import methods
from quantrature.methods import METHODS, Comparison, Statistics, quantize_matrix
from quantrature.models import find_linears
from quantrature.plan import PlanEntry
from quantrature.quantization import calibrate
from tiny_models import tiny_model

WINDOWS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1))
ENTRIES = {
    "mse": PlanEntry(2, 16, method="mse", meta_bits=8),
    "hqq": PlanEntry(3, 16, method="hqq", outlier_fraction=0.01),
    "gptq": PlanEntry(3, 16, method="gptq", sym=True),
    "awq": PlanEntry(3, 16, method="awq", outlier_fraction=0.01),
    "squeezellm": PlanEntry(3, -1, method="squeezellm", outlier_fraction=0.01),
    "qtip": PlanEntry(2, -1, method="qtip"),
}


def made():
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=chance)
    x = torch.randn(96, 64, generator=chance) * torch.linspace(0.1, 3, 64)
    fisher = torch.rand(48, 64, generator=chance)
    fisher[5] = 0  # nothing is known of this row
    return weight, Statistics(hessian=x.T @ x / len(x), fisher=fisher, activations=x, tokens=len(x))


def by_hand(name, apart, given):
    """What each method minimizes, in wider arithmetic."""
    apart = apart.double()
    if name == "mse":
        return sum(float(e) ** 2 for e in apart.flatten())
    if name == "hqq":
        return sum(abs(float(e)) ** 0.7 for e in apart.flatten())
    if name == "squeezellm":
        importance = torch.where(given.fisher.any(1, keepdim=True), given.fisher, 1.0).double()
        return float((importance * apart**2).sum())
    return float(((given.activations.double() @ apart.T) ** 2).sum(1).mean())  # of outputs


@pytest.mark.parametrize("name", ENTRIES)
def test_both_errors_are_those_of_the_definition(name):
    weight, given = made()
    entry, comparison = ENTRIES[name], Comparison()
    found = quantize_matrix("m", weight, entry, statistics=given, comparison=comparison)
    again = quantize_matrix("m", weight, entry, statistics=given)
    assert torch.equal(found.dequantize("float32"), again.dequantize("float32"))
    kept = None if found.outliers is None else found.outliers.positions()
    plain = replace(entry, method="rtn", options={}, outlier_fraction=0.0)
    nearest = quantize_matrix("m", weight, plain, kept)
    (compared,) = comparison.of
    assert (compared.name, compared.method) == ("m", entry.method)
    assert compared.error == pytest.approx(by_hand(name, found.dequantize("float32") - weight, given), rel=1e-4)
    assert compared.rtn == pytest.approx(by_hand(name, nearest.dequantize("float32") - weight, given), rel=1e-4)
    assert not compared.lost


def test_methods_that_minimize_nothing_are_left_out():
    assert {name for name, method in METHODS.items() if method.objective is None} == {"rtn", "nf4", "fp4"}
    comparison = Comparison()
    for name in ("rtn", "nf4", "fp4"):
        quantize_matrix("m", made()[0], PlanEntry(4, 16, method=name), comparison=comparison)
    assert not comparison.of


def worse(monkeypatch, solver, names=("",)):
    """Let a method spoil some matrices: what it quantizes is three times too large."""
    method = METHODS[solver]

    def quantize(weight, entry, kept, given):
        factor = 3.0 if any(name in given.name for name in names) else 1.0
        return method.quantize(weight * factor, entry, kept, given)

    monkeypatch.setitem(methods.METHODS, solver, replace(method, quantize=quantize))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "rtn would have been better" in record.getMessage()]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_that_lost_says_so(name, monkeypatch, caplog):
    text = {"calibration": WINDOWS} if METHODS[name].needs else {}
    settings = {"bits": 2, "method": name, **({} if METHODS[name].group_size else {"group_size": 16})}
    worse(monkeypatch, name, ("layers.1.mlp.down_proj",))
    qtr.quantize(tiny_model("llama"), **settings, **text)
    (said,) = warnings_of(caplog)
    assert " of 14 matrices" in said
    assert f"minimize: model.layers.1.mlp.down_proj ({name} " in said.replace("minimizes", "minimize")
    assert ", rtn " in said


def test_many_matrices_that_lost_are_one_warning(monkeypatch, caplog):
    worse(monkeypatch, "mse")
    qtr.quantize(tiny_model("llama"), bits=3, group_size=16, method="mse")
    (said,) = warnings_of(caplog)
    assert "better for 14 of 14 matrices" in said
    assert said.count("(mse ") == 5
    assert said.endswith(" and 9 more")


def test_a_method_that_lost_while_a_checkpoint_was_read_says_so(monkeypatch, caplog, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    worse(monkeypatch, "hqq")
    config = qtr.QuantratureConfig(bits=3, group_size=16, method="hqq")
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(warnings_of(caplog)) == 1


def test_a_folded_scale_is_held_against_rtn_without_it(monkeypatch):
    """In the coordinates of the scaled weights, rtn has the error that it has on the weights as they were."""
    weight, given = made()
    scale = torch.linspace(0.5, 2, 64)
    entry = PlanEntry(3, 16, method="awq", options={"scale": False})
    scaled = replace(given, activations=given.activations / scale)
    comparison = Comparison()
    quantize_matrix("m", weight * scale, entry, statistics=scaled, comparison=comparison, scale=scale)
    nearest = quantize_matrix("m", weight, PlanEntry(3, 16)).dequantize("float32")
    assert comparison.of[0].rtn == pytest.approx(by_hand("awq", nearest - weight, given), rel=1e-3)

    model = tiny_model("llama")
    linears = find_linears(model)
    seen = []
    monkeypatch.setattr(Comparison, "report", lambda self: seen.extend(self.of))
    entries = {linear.name: replace(entry, options={}) for linear in linears}
    found = calibrate(model, linears, entries, WINDOWS)
    assert found.folds
    assert {compared.name for compared in seen} == set(entries)
    first = linears[0]
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(WINDOWS)).reshape(-1, 32)
    nearest = quantize_matrix("q", first.weight.contiguous(), PlanEntry(3, 16)).dequantize("float32")
    apart = ((x @ (nearest - first.weight).T) ** 2).sum(1).mean()
    (compared,) = [each for each in seen if each.name == first.name]
    assert compared.rtn == pytest.approx(float(apart), rel=1e-2)
