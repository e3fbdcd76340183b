"""Fused experts of mixtures: split into layers, quantized, run, saved, loaded and fused again."""

import copy
import io
import logging

import pytest
import torch
from safetensors.torch import load_file

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry, models
from quantrature.checkpoint.verify import verify
from quantrature.nn import QuantLinear, quantized_layers
from quantrature.nn.experts import SplitExperts, fuse, part_with_memory, split
from tiny_models import tiny_model

MIXTURES = ["mixtral", "qwen2-moe", "gpt-oss"]
TOKENS = torch.arange(2 * 24).view(2, 24)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def experts_of(model):
    return [linear for linear in models.find_linears(model) if linear.expert is not None]


@pytest.mark.parametrize("layout", MIXTURES)
def test_split_experts_compute_the_same_and_can_be_fused(layout):
    model = tiny_model(layout)
    expected, kinds = logits(model), [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for linear in experts_of(model):
        split(linear)
    assert any(isinstance(module, SplitExperts) for module in model.modules())
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-6)
    part_with_memory(model)
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-6)
    fuse(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("layout", MIXTURES)
def test_gradients_flow_through_split_experts(layout):
    model = qtr.quantize(tiny_model(layout), bits=8, group_size=16)
    model(TOKENS).logits.sum().backward()
    quantized = model.get_input_embeddings().weight.grad
    dense = tiny_model(layout)
    dense(TOKENS).logits.sum().backward()
    expected = dense.get_input_embeddings().weight.grad
    assert torch.nn.functional.cosine_similarity(quantized.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("layout", MIXTURES)
def test_some_experts_of_a_parameter_may_stay_dense(layout, tmp_path):
    model = tiny_model(layout)
    kind = type(model)
    model.save_pretrained(tmp_path / "source")
    experts = experts_of(model)
    plan = Plan({linear.name: PlanEntry(2 + i % 4, 16) for i, linear in enumerate(experts) if i % 3})
    sources = {linear.name: linear.weight.clone() for linear in experts}
    qtr.quantize(model, plan=plan)
    assert set(quantized_layers(model)) == {name for name, _ in plan}
    for name, weight in sources.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear) == bool(name in quantized_layers(model))
        if type(layer) is torch.nn.Linear:
            assert torch.equal(layer.weight, weight)
            assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "out")), expected)
    wish = qtr.QuantratureConfig(plan=plan)
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "source", quantization_config=wish)), expected)
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = kind.from_pretrained(tmp_path / "out", quantization_config=qtr.QuantratureConfig(dequantize=True))
    assert torch.allclose(logits(dense), expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == set(
        load_file(tmp_path / "source" / "model.safetensors")
    )
    assert verify(tmp_path / "out", tmp_path / "source").failures == ()


def test_copies_and_pickles_run():
    model = qtr.quantize(tiny_model("mixtral"), bits=4, group_size=16)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    block = model.model.layers[0].mlp.experts
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x, chosen, weights = torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    assert torch.equal(again(x, chosen, weights), block(x, chosen, weights))
    assert block(x[:0], chosen[:0], weights[:0]).shape == (0, 32)


def test_experts_with_a_forward_of_their_own_stay_and_are_named(caplog):
    model = tiny_model("llama4")
    with caplog.at_level(logging.WARNING):
        qtr.quantize(model, bits=4, group_size=16)
    assert not any("experts" in name for name in quantized_layers(model))
    assert "weights stay unquantized" in caplog.text
    assert (
        "6 model.layers.*.feed_forward.experts.gate_up_proj.* (fused experts of a module with a forward of its own)"
        in caplog.text
    )
    logits(model)
    name = "model.layers.0.feed_forward.experts.gate_up_proj.0"
    with pytest.raises(InvalidArgumentError, match=f"entry '{name}' cannot be quantized: fused experts of"):
        qtr.quantize(tiny_model("llama4"), plan=Plan({name: PlanEntry(4)}))
