"""Fused experts in calibrated methods: each on what is routed to it, few tokens filled up, resumed."""

import logging
from dataclasses import replace

import pytest
import torch

import quantrature as qtr
from interruptions import limited_to
from model_state import same, state_of
from quantrature import InvalidArgumentError, Plan, PlanEntry, models
from quantrature.methods import Statistics, quantize_matrix
from quantrature.nn import quantized_layers
from quantrature.quantization import calibrate, collect, sequential
from quantrature.quantization.statistics import SAMPLED, Gatherer, filled_up
from tiny_models import tiny_model

MIXTURES = ["mixtral", "qwen2-moe", "gpt-oss"]
WINDOWS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))
ENTRIES = {
    "gptq": PlanEntry(3, 16, method="gptq"),
    "awq": PlanEntry(3, 16, method="awq"),
    "squeezellm": PlanEntry(3, -1, method="squeezellm"),
    "qtip": PlanEntry(3, -1, method="qtip", options={"state_bits": 8}),
}


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


def experts_of(model, block=None):
    found = [linear for linear in models.find_linears(model) if linear.expert is not None]
    return [linear for linear in found if block in (None, linear.block)]


def inputs_by_hand(model, block):
    """What each expert reads: rows picked from the inputs of the experts module by the router's choice."""
    experts = experts_of(model, block)
    module = experts[0].module
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(model)
    hook.remove()
    ((hidden, chosen, _),) = seen
    found = {}
    for linear in experts:
        x = hidden[(chosen == linear.expert).any(dim=1)]
        if linear.attribute == "down_proj":
            first = models.find_linears(model).find(linear.name.replace("down_proj", "gate_up_proj")).weight
            both = x @ first.T
            if module.has_bias:
                both = both + module.gate_up_proj_bias[linear.expert].detach()
            if type(module).__name__ == "GptOssExperts":
                gate, up = both[:, ::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
                x = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
            else:
                gate, up = both.chunk(2, dim=1)
                x = torch.nn.functional.silu(gate) * up
        found[linear.name] = x
    return found


def fisher_by_hand(model):
    """Squared gradients of each window's mean loss, summed."""
    found = {linear.name: torch.zeros(linear.out_features, linear.in_features) for linear in experts_of(model)}
    for window in WINDOWS:
        model.zero_grad()
        model(window[None], labels=window[None]).loss.backward()
        for linear in experts_of(model):
            found[linear.name] += linear.view(linear.parameter.grad) ** 2
    model.zero_grad(set_to_none=True)
    return found


def only(model, indices):
    """Make the routers of a model choose these experts for every token."""

    def choose(module, args, output):
        *before, weights, chosen = output
        if chosen.is_floating_point():  # another order of outputs
            raise AssertionError(output)
        return (*before, weights, torch.tensor(indices).expand_as(chosen))

    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(choose)
    return model


@pytest.mark.parametrize("layout", MIXTURES)
def test_every_expert_has_the_statistics_of_what_is_routed_to_it(layout):
    model = tiny_model(layout)
    linears = models.find_linears(model)
    needs = {linear.name: ("hessian", "activations", "fisher") for linear in experts_of(model)}
    before = state_of(model)
    found = collect(model, linears, needs, WINDOWS, batch_size=3)
    assert same(state_of(model), before)
    expected = inputs_by_hand(model, 0) | inputs_by_hand(model, 1)
    fisher = fisher_by_hand(model)
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].tokens == len(x) >= linears.find(name).in_features, name
        hessian = torch.tril(found[name].hessian)
        assert torch.allclose(hessian, torch.tril(x.mT @ x / len(x)), rtol=1e-3, atol=1e-6), name
        assert torch.allclose(found[name].activations, x, rtol=1e-3, atol=1e-5), name  # fewer than are sampled
        assert torch.allclose(found[name].fisher, fisher[name], rtol=1e-2, atol=1e-3 * fisher[name].max()), name


@pytest.mark.parametrize("solver", ENTRIES)
@pytest.mark.parametrize("layout", MIXTURES)
def test_experts_are_quantized_by_these_statistics(layout, solver):
    model, entry = tiny_model(layout), ENTRIES[solver]
    if solver == "awq":
        entry = replace(entry, options={"fold": False})  # what is folded is another matrix
    linears = models.find_linears(model)
    chosen = experts_of(model, 0)
    parameters = dict(model.named_parameters())
    kinds, names, before = [type(module) for module in model.modules()], list(parameters), state_of(model)
    found = calibrate(model, linears, {linear.name: entry for linear in chosen}, WINDOWS, batch_size=4)
    assert same(state_of(model), before)
    assert [type(module) for module in model.modules()] == kinds
    assert list(dict(model.named_parameters())) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())

    other = tiny_model(layout)
    fisher = fisher_by_hand(other)
    for attribute in ("gate_up_proj", "down_proj"):
        inputs = inputs_by_hand(other, 0)
        for linear in (linear for linear in experts_of(other, 0) if linear.attribute == attribute):
            x = inputs[linear.name]
            statistics = Statistics(hessian=x.mT @ x / len(x), activations=x, fisher=fisher[linear.name])
            weight = linear.weight.contiguous()
            image = quantize_matrix(linear.name, weight, entry, statistics=statistics).dequantize()
            got = found.matrices[linear.name].dequantize()
            assert torch.nn.functional.cosine_similarity(got.flatten(), image.flatten(), dim=0) > 0.98, linear.name
            if solver in ("gptq", "awq"):  # sums in another order may turn single codes
                assert torch.isclose(got, image, rtol=1e-3, atol=1e-6).float().mean() > 0.95, linear.name
            with torch.no_grad():
                linear.weight.copy_(got)


@pytest.mark.parametrize("solver", ENTRIES)
def test_an_expert_that_no_text_reaches_is_named_and_takes_the_mean_of_all(solver, caplog):
    model = only(tiny_model("mixtral"), [0, 2])
    entries = {linear.name: ENTRIES[solver] for linear in experts_of(model)}
    with caplog.at_level(logging.WARNING):
        found = calibrate(model, models.find_linears(model), entries, WINDOWS, batch_size=8, keep_statistics=True)
    assert "model.layers.1.mlp.experts.down_proj.1" in caplog.text
    assert "down_proj.0" not in caplog.text
    for attribute in ("gate_up_proj", "down_proj"):
        a, idle, b = (found.statistics[f"model.layers.1.mlp.experts.{attribute}.{i}"] for i in range(3))
        assert (a.tokens, idle.tokens, b.tokens) == (192, 0, 192) or solver == "squeezellm"
        if solver in ("gptq", "qtip"):
            assert torch.allclose(idle.hessian, (a.hessian + b.hessian) / 2, rtol=1e-5, atol=1e-9)
        elif solver == "awq":
            both = torch.cat([a.activations, b.activations])
            assert torch.equal(
                idle.activations, both[torch.arange(idle.activations.shape[1]) * len(both) // both.shape[1]]
            )
        else:
            assert torch.allclose(idle.fisher, (a.fisher + b.fisher) / 3, rtol=1e-5, atol=0)


def test_few_tokens_are_filled_up_to_as_many_as_there_are_inputs():
    linears = [linear for linear in experts_of(tiny_model("mixtral"), 0) if linear.attribute == "gate_up_proj"]
    rows = [torch.randn(count, 32, generator=torch.Generator().manual_seed(count)) for count in (40, 8, 32)]
    own = [Statistics(hessian=x.mT @ x / len(x), activations=x, tokens=len(x)) for x in rows]
    first, few, last = filled_up(linears, own)
    assert first is own[0]
    assert last is own[2]
    every = torch.cat(rows)
    expected = (rows[1].mT @ rows[1] + 24 * (every.mT @ every) / 80) / 32
    assert torch.allclose(few.hessian, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(few.activations, torch.cat([rows[1], every[[i * 80 // 24 for i in range(24)]]]))
    assert few.tokens == 8
    with pytest.raises(InvalidArgumentError, match=r"no calibration text reaches the experts of model.*gate_up_proj$"):
        filled_up(linears, [Statistics()] * 3)


def test_activations_of_unknown_number_are_spread_evenly():
    gatherer = Gatherer(["activations"], None)
    rows = torch.arange(5000.0)[:, None]
    for part in rows.split(700):
        gatherer.take(part)
    kept = gatherer.statistics().activations[:, 0]
    assert SAMPLED <= len(kept) < 2 * SAMPLED
    assert torch.equal(kept, torch.arange(0, 5000.0, 8))


@pytest.mark.parametrize("solver", ENTRIES)
@pytest.mark.parametrize("layout", ["mixtral", "qwen2-moe"])
def test_resuming_gives_the_same_bytes(layout, solver, monkeypatch, tmp_path):
    names = [linear.name for linear in models.find_linears(tiny_model(layout))]
    plan = Plan({name: ENTRIES[solver] for name in names})

    def quantized(folder, resume="auto"):
        return qtr.quantize(
            tiny_model(layout), plan=plan, calibration=WINDOWS, batch_size=4, resume_folder=folder, resume=resume
        )

    whole = state_of(quantized(None))
    with monkeypatch.context() as patch:
        limited = limited_to(len(names) // 2 + 6, sequential.quantize_matrix, KeyboardInterrupt)
        patch.setattr(sequential, "quantize_matrix", limited)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path / "state")
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["block-00000.safetensors"]
    resumed = quantized(tmp_path / "state", "required")
    assert set(quantized_layers(resumed)) == set(names)
    assert same(state_of(resumed), whole)


def test_scales_of_what_the_router_reads_too_stay_with_the_experts():
    model = tiny_model("mixtral")
    before = logits(model)
    qtr.quantize(model, bits=8, group_size=16, method="awq", calibration=WINDOWS)
    layers = quantized_layers(model)
    scaled = {name for name, layer in layers.items() if "input_scale" in dict(layer.named_buffers())}
    assert any("gate_up_proj" in name for name in scaled)
    assert not any("down_proj" in name for name in scaled)
    assert torch.nn.functional.cosine_similarity(logits(model).flatten(), before.flatten(), dim=0) > 0.999


def test_peak_memory_counts_the_statistics_of_all_experts():
    linears = [linear for linear in experts_of(tiny_model("mixtral"), 0) if linear.attribute == "down_proj"]
    found = models.find_linears(tiny_model("mixtral"))
    by_name = {linear.name: ENTRIES["gptq"] for linear in linears}
    one = dict([*by_name.items()][:1])
    few, all_three = (sequential.peak_bytes(found, entries, 10, 24) for entries in (one, by_name))
    assert all_three - few >= 2 * 4 * 48**2
