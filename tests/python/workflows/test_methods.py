"""The registry of host methods, and the one call that quantizes a matrix by any of them."""

import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry, checkpoint, methods, models
from quantrature.checkpoint.verify import verify
from quantrature.cli import main
from quantrature.methods import METHODS, Method, Statistics, quantize_matrix
from quantrature.nn import quantized_layers
from quantrature.packed import QuantizedMatrix
from tiny_models import byte_tokenizer, tiny_model

WEIGHT = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calibrated(monkeypatch):
    """A method that needs a Hessian and has options, registered for the while."""
    seen = []

    def quantize(weight, entry, kept, statistics):
        seen.append((METHODS["toy"].settings(entry), kept, statistics))
        return METHODS["rtn"].quantize(weight, PlanEntry(entry.bits, entry.group_size), kept, statistics)

    toy = Method("a toy", quantize, needs=("hessian",), options={"damp": 0.5, "ordered": False})
    monkeypatch.setitem(METHODS, "toy", toy)
    return seen


def test_a_plan_takes_every_method():
    for name, method in METHODS.items():
        assert PlanEntry(4, method.group_size or 128, method=name).method == name
        assert str(method).startswith(method.about)
        assert set(method.needs) <= set(methods.STATISTICS)


def test_a_method_gets_weight_kept_places_statistics_and_its_settings(calibrated):
    entry = PlanEntry(4, 16, method="toy", options={"damp": 1})
    kept = torch.tensor([3, 40])
    statistics = Statistics(hessian=torch.eye(32))
    matrix = quantize_matrix("w", WEIGHT, entry, kept, statistics)
    assert isinstance(matrix, QuantizedMatrix)
    assert torch.equal(matrix.outliers.positions(), kept)
    settings, places, given = calibrated[0]
    assert settings == {"damp": 1, "ordered": False}
    assert torch.equal(places, kept)
    assert given.hessian is statistics.hessian


@pytest.mark.parametrize("statistics", [None, Statistics(fisher=torch.ones(8, 32))])
def test_a_matrix_without_the_statistics_that_its_method_needs_is_named(calibrated, statistics):
    with pytest.raises(
        InvalidArgumentError, match=r"layers.0.q: method toy needs calibration text, to compute the hessian"
    ):
        quantize_matrix("layers.0.q", WEIGHT, PlanEntry(4, 16, method="toy"), statistics=statistics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampp": 1.0}, "options of toy must be one of damp, ordered: got 'dampp'"),
        ({"damp": "much"}, "option damp of toy must be float: got 'much'"),
        ({"ordered": 1}, "option ordered of toy must be bool: got 1"),
        ([1], r"options must be an object: got \[1\]"),
    ],
)
def test_options_are_checked_when_an_entry_is_made(calibrated, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PlanEntry(4, 16, method="toy", options=options)


def test_methods_without_options_say_so():
    with pytest.raises(InvalidArgumentError, match="options of rtn must be one of none: got 'damp'"):
        PlanEntry(4, 16, options={"damp": 1.0})


def test_options_are_part_of_a_plan(calibrated, tmp_path):
    entry = PlanEntry(4, 16, method="toy", options={"ordered": True})
    assert str(entry) == "b4g16 toy, ordered True"
    assert hash(entry) == hash(PlanEntry(4, 16, method="toy"))
    plan = Plan({"a": entry, "b": PlanEntry(4, 16)})
    plan.save(tmp_path / "plan.json")
    assert "options" not in plan.to_json()["entries"]["b"]
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.entries == plan.entries
    assert list(plan.diff(Plan({"a": PlanEntry(4, 16, method="toy"), "b": PlanEntry(4, 16)}))) == ["a"]


def test_quantize_passes_options_on_or_says_where_they_belong():
    model = tiny_model("llama")
    with pytest.raises(
        InvalidArgumentError, match=r"\[quantize\] damp is not an argument, and not an option of method rtn"
    ):
        qtr.quantize(model, bits=4, damp=0.5)
    plan = Plan({"model.layers.0.mlp.up_proj": PlanEntry(4, 16)})
    with pytest.raises(InvalidArgumentError, match="damp cannot be combined with a plan"):
        qtr.quantize(model, plan=plan, damp=0.5)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_model_in_a_named_table_goes_through_a_folder(name, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("llama").save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    arguments = ["--bits", "4", "--group-size", "16", "--method", name, "--outlier-fraction", "0.01"]
    assert main(["quantize", str(source), "-o", str(out), *arguments]) == 0
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16, method=name, outlier_fraction=0.01, progress=False)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, model.eval()(ids).logits)
    contents = checkpoint.inspect(out)
    assert {m["setting"] for m in contents.modules.values()} == {f"b4g16 {name}"}
    assert not verify(out, source).failures


def test_requant_keeps_weights_beside_a_named_table():
    model = tiny_model("llama")
    original = {linear.name: linear.weight.clone() for linear in models.find_linears(model)}
    tokens = torch.arange(48).view(2, 24)
    qtr.requant(
        model,
        tokens,
        bits=4,
        group_size=16,
        method="nf4",
        outlier_fraction=0.01,
        significant_fraction=0.005,
        nodes=2,
        progress=False,
    )
    kept = 0
    for name, layer in quantized_layers(model).items():
        outliers = layer.matrix.outliers
        if outliers is not None:
            kept += outliers.nnz
            places = outliers.positions()
            assert torch.equal(layer.dequantize().flatten()[places], original[name].flatten()[places])
    total = sum(w.numel() for w in original.values())
    assert kept == round(0.01 * total) + round(0.005 * total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits of nf4 must be 4: got 3"),
        ({"sym": True}, "sym must be false with nf4"),
    ],
)
def test_settings_a_named_table_has_not_are_refused(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PlanEntry(**{"bits": 4, "method": "nf4", **changes})


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-12, 2.0**9, 2.0**60, 3e-5])
@pytest.mark.parametrize("method", ["rtn", "mse", "hqq", "nf4", "fp4"])
@pytest.mark.parametrize("meta_bits", [None, 8])
def test_codes_do_not_depend_on_the_scale_of_the_weights(method, factor, meta_bits):
    """The published hqq limits inverse scales to 20000: weights with a standard deviation of 3e-5 lost 46 %."""
    torch.manual_seed(0)
    weight = torch.randn(40, 192)
    entry = PlanEntry(4, 64, method=method, meta_bits=meta_bits)
    expected, got = (quantize_matrix("w", w, entry).dense for w in (weight, weight * factor))
    apart = (expected.unpack() != got.unpack()).sum()
    assert apart == 0 if math.log2(factor).is_integer() else apart < 20
    error = (got.dequantize() - weight * factor).norm() / (weight * factor).norm()
    assert error < 0.15


def test_a_model_says_which_matrix_keeps_its_scales(caplog):
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(1e-4).add_(0.5)
    with caplog.at_level(logging.WARNING, "quantrature"):
        qtr.quantize(model, bits=4, group_size=8, meta_bits=8)
    (said,) = [record.getMessage() for record in caplog.records if "meta_bits" in record.getMessage()]
    assert "model.layers.1.mlp.down_proj" in said
    assert "layers.0" not in said
