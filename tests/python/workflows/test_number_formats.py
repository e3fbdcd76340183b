"""Grids whose zero points are integers and whose scales have a given dtype, through all that uses grids."""

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry
from quantrature.methods import Statistics, quantize_matrix
from quantrature.nn import quantized_layers
from tiny_models import tiny_model

ENGINE = {"zero": "integer", "scale_dtype": "bfloat16"}


def statistics_of(weight, tokens=200):
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1))
    return Statistics(hessian=x.T @ x / tokens, activations=x)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {}),
        ("mse", {}),
        ("hqq", {}),
        ("gptq", {}),
        ("gptq", {"grid": "hqq"}),
        ("gptq", {"static_groups": False}),
        ("gptq", {"static_groups": False, "grid": "mse"}),
        ("awq", {}),
    ],
)
@pytest.mark.parametrize("scale_dtype", ["auto", "float16", "bfloat16", "float32", "e8m0"])
def test_every_method_with_a_grid_fits_it(method, options, scale_dtype):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    weight[3] += 5  # a range without zero
    entry = PlanEntry(4, 32, method=method, options=options, zero="integer", scale_dtype=scale_dtype)
    dense = quantize_matrix("a", weight, entry, None, statistics_of(weight)).dense
    zero, scale = dense.zero.float(), dense.scale.float()
    assert torch.equal(zero, zero.round().clamp(0, 15))
    if scale_dtype == "e8m0":
        assert (torch.frexp(scale).mantissa == 0.5).all()
    else:
        kind = torch.float16 if scale_dtype == "auto" else getattr(torch, scale_dtype)
        assert dense.scale.dtype == kind
    if method != "awq":  # which stores scaled weights
        values = dense.dequantize("float32")
        assert (values - weight).abs().amax() < 4 * scale.amax()


@pytest.mark.parametrize("method", ["squeezellm", "qtip", "nf4"])
def test_methods_without_a_grid_refuse(method):
    entry = {"squeezellm": (4, -1), "qtip": (2, -1), "nf4": (4, 64)}[method]
    with pytest.raises(InvalidArgumentError, match=f"zero and scale_dtype of {method} must be float and auto"):
        PlanEntry(*entry, method=method, zero="integer")


def test_a_plan_says_so_and_the_checkpoint_holds_it(tmp_path):
    names = [f"model.layers.{i}.mlp.{leaf}" for i in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")]
    plan = Plan.uniform(names, PlanEntry(3, 32, method="mse", **ENGINE))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert '"zero": "integer"' in (tmp_path / "plan.json").read_text()
    assert "zero integer, scale_dtype bfloat16" in str(plan.entries[names[0]])
    model = qtr.quantize(tiny_model("llama").bfloat16(), plan=plan)
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16)
    before = quantized_layers(model)
    for name, layer in quantized_layers(again).items():
        assert (layer.spec.dense.scale, layer.spec.dense.zero) == ("bfloat16", "bfloat16")
        assert torch.equal(layer.dequantize(), before[name].dequantize())


def test_an_analysis_predicts_it_and_plans_take_it_over():
    model = tiny_model("llama")
    tokens = torch.randint(0, model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    found = qtr.analyze(model, tokens, bits=[3, 4], group_size=32, nodes=2, **ENGINE)
    assert (found.settings["zero"], found.settings["scale_dtype"]) == ("integer", "bfloat16")
    assert (
        found.predicted_loss_change
        != qtr.analyze(model, tokens, bits=[3, 4], group_size=32, nodes=2).predicted_loss_change
    )
    entries = qtr.allocate(found, avg_bits=4.5).entries.values()
    assert {(entry.zero, entry.scale_dtype) for entry in entries if not entry.keeps} == {("integer", "bfloat16")}
    entries = qtr.allocate(found, avg_bits=4.5, zero="float", scale_dtype="auto").entries.values()
    assert {(entry.zero, entry.scale_dtype) for entry in entries if not entry.keeps} == {("float", "auto")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": "int"}, "zero must be float or integer: got .int."),
        ({"scale_dtype": "half"}, "scale_dtype must be auto, float32, float16, bfloat16 or e8m0: got 'half'"),
        ({"zero": "integer", "sym": True}, "zero must be float with sym, which stores no zero points"),
        ({"zero": "integer", "meta_bits": 8}, "meta_bits must be None with zero integer"),
        ({"scale_dtype": "e8m0"}, "scale_dtype e8m0 needs sym or zero integer"),
    ],
)
def test_what_does_not_go_together_is_named(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PlanEntry(4, **changes)
    with pytest.raises(InvalidArgumentError, match=r"^\[quantize\] .*" + message):
        qtr.quantize(tiny_model("llama"), bits=4, **changes)
