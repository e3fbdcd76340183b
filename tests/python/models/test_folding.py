"""Scales folded into what makes a matrix's inputs: found by trial, sound, kept with the checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantrature as qtr
from interruptions import limited_to
from model_state import same, state_of
from quantrature import InvalidArgumentError, PlanEntry, QuantratureError, checkpoint, models
from quantrature.checkpoint.verify import verify
from quantrature.models.folding import NORM, ROWS, SHIFTED_NORM, Fold, fold, folded, folds_of
from quantrature.nn import quantized_layers
from quantrature.quantization import calibrate, sequential
from quantrature.requantization import requant_folder
from tiny_models import byte_tokenizer, tiny_model

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
AWQ = {"bits": 3, "group_size": 16, "method": "awq", "calibration": WINDOWS, "batch_size": 4}

LLAMA = {
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj": (NORM, "input_layernorm"),
    "self_attn.o_proj": (ROWS, "self_attn.v_proj"),
    "mlp.gate_proj mlp.up_proj": (NORM, "post_attention_layernorm"),
    "mlp.down_proj": (ROWS, "mlp.up_proj"),
}
SHIFTED = {name: (SHIFTED_NORM if kind == NORM else kind, producer) for name, (kind, producer) in LLAMA.items()}
PAIRS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": SHIFTED,
    "gemma2": SHIFTED | {"mlp.gate_proj mlp.up_proj": (SHIFTED_NORM, "pre_feedforward_layernorm")},
    # A norm that attention and the rest read: one scale for both. No scale passes a GELU.
    "phi": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1": (NORM, "input_layernorm"),
        "self_attn.dense": (ROWS, "self_attn.v_proj"),
        "mlp.fc2": None,
    },
    "falcon": {
        "self_attention.query_key_value mlp.dense_h_to_4h": (NORM, "input_layernorm"),
        "self_attention.dense": None,
        "mlp.dense_4h_to_h": None,
    },
    # A scale passes a ReLU.
    "opt": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": (NORM, "self_attn_layer_norm"),
        "self_attn.out_proj": (ROWS, "self_attn.v_proj"),
        "fc1": (NORM, "final_layer_norm"),
        "fc2": (ROWS, "fc1"),
    },
    "gpt2": {
        "attn.c_attn": (NORM, "ln_1"),
        "attn.c_proj": (ROWS, "attn.c_attn"),
        "mlp.c_fc": (NORM, "ln_2"),
        "mlp.c_proj": None,
    },
    # Queries, keys and values are interleaved head by head, so that the values are not the last rows.
    "gpt-neox": {
        "attention.query_key_value": (NORM, "input_layernorm"),
        "attention.dense": None,
        "mlp.dense_h_to_4h": (NORM, "post_attention_layernorm"),
        "mlp.dense_4h_to_h": None,
    },
    # All experts read the second norm, and so does the router, which is not quantized.
    "mixtral": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": (NORM, "input_layernorm"),
        "self_attn.o_proj": (ROWS, "self_attn.v_proj"),
        "mlp.experts.down_proj.0": (ROWS, "mlp.experts.gate_up_proj.0"),
        "mlp.experts.down_proj.1": (ROWS, "mlp.experts.gate_up_proj.1"),
        "mlp.experts.down_proj.2": (ROWS, "mlp.experts.gate_up_proj.2"),
    },
    "qwen2-moe": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": (NORM, "input_layernorm"),
        "self_attn.o_proj": (ROWS, "self_attn.v_proj"),
        "mlp.experts.down_proj.0": (ROWS, "mlp.experts.gate_up_proj.0"),
        "mlp.experts.down_proj.1": (ROWS, "mlp.experts.gate_up_proj.1"),
        "mlp.experts.down_proj.2": (ROWS, "mlp.experts.gate_up_proj.2"),
        "mlp.shared_expert.down_proj": (ROWS, "mlp.shared_expert.up_proj"),
    },
    # What is up lies between what is gate, is clamped, and has 1 added.
    "gpt-oss": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": (NORM, "input_layernorm"),
        "self_attn.o_proj": (ROWS, "self_attn.v_proj"),
    },
}


def randomized(layout):
    """A tiny model whose norms and biases are not all ones and zeros."""
    model = tiny_model(layout)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return model


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


def found_in(model, **settings):
    linears = models.find_linears(model)
    entries = {linear.name: PlanEntry(3, 16, method="awq", options=settings) for linear in linears}
    return linears, calibrate(model, linears, entries, WINDOWS, batch_size=4)


@pytest.mark.parametrize("layout", PAIRS)
def test_folds_are_those_that_the_layout_allows_and_change_nothing(layout):
    model = randomized(layout)
    before, exact = state_of(model), logits(model)
    linears, found = found_in(model)
    assert same(state_of(model), before)
    prefixes = {f"{stack}.{linear.block}." for linear in linears for stack in linears.stacks}
    expected = {key: pair for key, pair in PAIRS[layout].items() if pair is not None}
    for prefix in prefixes:
        of_block = [f for f in found.folds if f.producer.startswith(prefix)]
        assert {
            " ".join(name.removeprefix(prefix) for name in f.consumers): (f.kind, f.producer.removeprefix(prefix))
            for f in of_block
        } == expected
    consumers = {name for f in found.folds for name in f.consumers}
    assert all((matrix.input_scale is None) == (name in consumers) for name, matrix in found.matrices.items())
    assert any(not torch.equal(f.scale, torch.ones_like(f.scale)) for f in found.folds)
    with torch.no_grad():
        fold(model, linears, found.folds)
    assert not same(state_of(model), before)
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-5)


def test_a_second_reader_of_a_norm_forbids_the_fold():
    model = tiny_model("llama")
    linears = models.find_linears(model, ["re:.*q_proj"])
    entries = {linear.name: PlanEntry(3, 16, method="awq") for linear in linears}
    found = calibrate(model, linears, entries, WINDOWS)
    assert {f.producer.rpartition(".")[2] for f in found.folds} == {"v_proj", "post_attention_layernorm", "up_proj"}
    assert found.matrices["model.layers.0.self_attn.k_proj"].input_scale is not None


def test_experts_that_the_trial_does_not_reach_keep_their_scale():
    model = tiny_model("mixtral")

    def choose(module, args, output):
        *before, chosen = output
        return (*before, torch.tensor([0, 2] if len(chosen) == 4 * 24 else [0, 1]).expand_as(chosen))

    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(choose)
    names = [f"model.layers.{i}.mlp.experts.down_proj.1" for i in range(2)]
    entries = {name: PlanEntry(3, 16, method="awq") for name in names}
    found = calibrate(model, models.find_linears(model), entries, WINDOWS, batch_size=4)
    assert found.folds == ()
    entries = {name: PlanEntry(3, 16, method="awq") for name in [*names, *(n[:-1] + "0" for n in names)]}
    found = calibrate(model, models.find_linears(model), entries, WINDOWS, batch_size=4)
    assert len(found.folds) == 4


def test_the_output_of_a_block_is_that_of_the_original_in_16_bits():
    model = randomized("llama").to(torch.bfloat16)
    exact = logits(model).float()
    linears, found = found_in(model)
    assert len(found.folds) == 8
    with torch.no_grad():
        fold(model, linears, found.folds)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    assert float((logits(model).float() - exact).norm() / exact.norm()) < 0.02


def test_numbers_that_16_bits_hold_stay_such():
    model = randomized("gemma").to(torch.bfloat16).float()
    linears, found = found_in(model)
    with torch.no_grad():
        fold(model, linears, found.folds)
    for f in found.folds:
        for parameter in (model.get_submodule(f.producer).weight, *(linears.find(c).weight for c in f.consumers)):
            assert torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_a_folded_matrix_takes_no_more_bits_than_its_grid(group_size):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=258,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    qtr.quantize(model, **{**AWQ, "bits": 2, "group_size": group_size})
    for layer in quantized_layers(model).values():
        assert layer.spec.input_scale is None
        assert 8 * layer.spec.nbytes / layer.spec.dense.numel == 2 + 32 / group_size


@pytest.mark.parametrize("layout", ["llama", "gemma2", "opt", "gpt2", "mixtral", "qwen2-moe"])
def test_checkpoints_keep_what_was_folded(layout, tmp_path):
    source = randomized(layout)
    source.save_pretrained(tmp_path / "source")
    model = qtr.quantize(randomized(layout), **AWQ)
    assert folds_of(model)
    after = logits(model)
    checkpoint.save(model, tmp_path / "out")
    loaded = models.load_model(tmp_path / "out")
    assert torch.equal(logits(loaded), after)
    assert same({f.producer: f.scale for f in folds_of(loaded)}, {f.producer: f.scale for f in folds_of(model)})
    loaded.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "out/model.safetensors"))
    found = verify(tmp_path / "out", tmp_path / "source")
    assert found.failures == ()
    assert max(m.relative_error for m in found.modules.values()) < 0.5


def test_a_dense_model_made_of_it_needs_no_record(tmp_path):
    model = qtr.quantize(randomized("llama"), **AWQ)
    after = logits(model)
    model.save_pretrained(tmp_path / "out")
    dense = models.load_model(tmp_path / "out")
    dense.dequantize()
    torch.testing.assert_close(logits(dense), after)
    dense.save_pretrained(tmp_path / "dense")
    assert not any("folded_scale" in name for name in load_file(tmp_path / "dense/model.safetensors"))
    torch.testing.assert_close(logits(models.load_model(tmp_path / "dense")), after)


def test_requant_keeps_weights_of_the_folded_model(tmp_path):
    randomized("llama").save_pretrained(tmp_path / "source")
    model = models.load_model(tmp_path / "source")
    _, record = qtr.requant(
        model,
        WINDOWS,
        bits=3,
        group_size=16,
        method="awq",
        outlier_fraction=0.01,
        significant_fraction=0.005,
        nodes=2,
        progress=False,
    )
    assert folds_of(model)
    assert record.stages[-1].measured_loss_change == pytest.approx(
        float(loss(model) - loss(models.load_model(tmp_path / "source"))), abs=1e-4
    )
    checkpoint.save(model, tmp_path / "out", requant=record)
    found = verify(tmp_path / "out", tmp_path / "source")
    assert found.failures == ()
    requant_folder(
        tmp_path / "out",
        tmp_path / "source",
        WINDOWS,
        significant_fraction=0.01,
        nodes=2,
        output=tmp_path / "better",
        tokenizer=byte_tokenizer(),
        progress=False,
    )
    better = verify(tmp_path / "better", tmp_path / "source")
    assert better.failures == ()
    errors = [sum(m.relative_error**2 for m in each.modules.values()) for each in (found, better)]
    assert errors[1] < errors[0]
    assert len(folds_of(models.load_model(tmp_path / "better"))) == 8


def loss(model):
    with torch.no_grad():
        return sum(model(w[None], labels=w[None]).loss for w in WINDOWS) / len(WINDOWS)


def test_requant_that_fails_leaves_the_model_as_it_was(monkeypatch):
    from quantrature.requantization.matrices import Matrices

    def fail(*args, **named):
        raise QuantratureError("no")

    monkeypatch.setattr(Matrices, "detach_stepwise", fail)
    model = randomized("llama")
    before = state_of(model)
    with pytest.raises(QuantratureError, match="no"):
        qtr.requant(model, WINDOWS, bits=3, group_size=16, method="awq", outlier_fraction=0.0, nodes=2, progress=False)
    assert same(state_of(model), before)


def test_resuming_takes_up_folds_too(monkeypatch, tmp_path):
    whole = state_of(qtr.quantize(randomized("llama"), **AWQ))
    limited = limited_to(9, sequential.quantize_matrix, KeyboardInterrupt)
    model = randomized("llama")
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "quantize_matrix", limited)
        with pytest.raises(KeyboardInterrupt):
            qtr.quantize(model, **AWQ, resume_folder=tmp_path / "state")
    assert same(state_of(model), before)
    resumed = qtr.quantize(randomized("llama"), **AWQ, resume_folder=tmp_path / "state", resume="required")
    assert same(state_of(resumed), whole)
    assert len(folds_of(resumed)) == 8


def test_a_checkpoint_without_its_scales_is_refused(tmp_path):
    model = qtr.quantize(randomized("llama"), **AWQ)
    model.save_pretrained(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.input_layernorm.folded_scale"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(QuantratureError, match=f"lacks the tensor {name}"):
        models.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("kind", "sideways", "kind of a fold must be norm, shifted norm or rows"),
        ("consumers", "q_proj", "consumers of a fold must be names"),
        ("repeats", [1], "repeats of a fold must be two counts"),
        ("repeats", [0, 0], "repeats of a fold must be two counts"),
        ("producer", 3, "lacks the tensor 3.folded_scale"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(field, value, says, tmp_path):
    model = qtr.quantize(randomized("llama"), **AWQ)
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["folds"][0][field] = value
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(qtr.QuantratureError, match=says):
        models.load_model(tmp_path / "out")


def test_a_fold_that_does_not_fit_the_model_is_refused():
    model = tiny_model("llama")
    linears = models.find_linears(model)
    name = "model.layers.0.self_attn.o_proj"
    with pytest.raises(InvalidArgumentError, match="no module model.norms"):
        fold(model, linears, [Fold(NORM, "model.norms", (name,), torch.ones(32))])
    with pytest.raises(InvalidArgumentError, match="model.norm does not have 31 outputs"):
        fold(model, linears, [Fold(NORM, "model.norm", (name,), torch.ones(31))])
    with pytest.raises(InvalidArgumentError, match="o_proj does not take scales of shape"):
        fold(model, linears, [Fold(ROWS, linears[0].name, (name,), torch.ones(16))])


def test_what_fails_inside_is_taken_back():
    model = randomized("llama")
    linears, found = found_in(model)
    before = state_of(model)

    def fail():
        with torch.no_grad(), folded(model, linears, found.folds):
            assert not same(state_of(model), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert same(state_of(model), before)
