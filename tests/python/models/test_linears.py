import math

import pytest
import torch
from torch import nn

from quantrature import InvalidArgumentError
from quantrature.models import find_linears
from tiny_models import CONFIGS, tiny_config, tiny_model

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPERTS = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
SHARED_EXPERT = [f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]

# roles in a block, stacks, skipped outside the stacks, whether every layer has a bias (None: some have)
EXPECTED = {
    "llama": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "llama-tied": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "mistral": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "qwen2": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], None),
    "qwen3": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "gemma": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "gemma2": (ATTENTION + GATED, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "phi": (
        [*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"],
        ["model.layers"],
        ["model.embed_tokens", "lm_head"],
        True,
    ),
    "opt": (
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
        ["model.decoder.layers"],
        [f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions", "project_out", "project_in")]
        + ["lm_head"],
        True,
    ),
    "gpt2": (
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ["transformer.h"],
        ["transformer.wte", "transformer.wpe", "lm_head"],
        True,
    ),
    "gpt-neox": (
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ["gpt_neox.layers"],
        ["gpt_neox.embed_in", "lm_head"],
        True,
    ),
    "falcon": (
        ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ["transformer.h"],
        ["transformer.word_embeddings", "lm_head"],
        False,
    ),
    "mixtral": (ATTENTION + EXPERTS, ["model.layers"], ["model.embed_tokens", "lm_head"], False),
    "qwen2-moe": (ATTENTION + EXPERTS + SHARED_EXPERT, ["model.layers"], ["model.embed_tokens", "lm_head"], None),
    "bert": (
        [*BERT, "intermediate.dense", "output.dense"],
        ["bert.encoder.layer"],
        [f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")]
        + ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        True,
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_layout(name):
    roles, stacks, outside, bias = EXPECTED[name]
    model = tiny_model(name)
    found = find_linears(model)
    for block in (0, 1):
        in_block = [linear for linear in found if linear.block == block]
        assert list(dict.fromkeys(linear.role for linear in in_block)) == roles
        for linear in in_block:
            experts = f"{linear.role}.{linear.expert}" if linear.expert is not None else linear.role
            assert linear.name == f"{stacks[0]}.{block}.{experts}"
    assert list(found.stacks) == stacks
    assert [skipped.name for skipped in found.skipped if stacks[0] not in skipped.name] == outside
    assert bias is None or {linear.bias for linear in found} == {bias}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for linear in found:
        assert linear.weight.shape == (linear.out_features, linear.in_features)
        assert linear.numel == linear.weight.numel()
        path = f"{linear.name}.weight" if linear.expert is None else linear.name.rpartition(".")[0]
        assert linear.parameter is parameters[path]
    left = {s.name: math.prod(s.shape) for s in found.skipped if not s.reason.startswith("tied")}
    every = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(linear.numel for linear in found) + sum(left.values()) == every


@pytest.mark.parametrize("name", CONFIGS)
def test_the_meta_device_gives_the_same(name):
    def shape_of(found):
        return [(x.name, x.out_features, x.in_features, x.bias, x.aliases) for x in found], found.skipped, found.stacks

    on_meta = find_linears(tiny_model(name, "meta"))
    assert shape_of(on_meta) == shape_of(find_linears(tiny_model(name)))
    assert all(linear.weight.is_meta for linear in on_meta)


def test_a_conv1d_is_seen_as_a_linear_layer():
    found = find_linears(tiny_model("gpt2"))
    linear = found.find("transformer.h.0.attn.c_attn")
    assert (linear.out_features, linear.in_features, linear.transposed) == (96, 32, True)
    x = torch.randn(2, 32)
    torch.testing.assert_close(nn.functional.linear(x, linear.weight, linear.module.bias), linear.module(x))
    linear.weight.zero_()
    assert not linear.parameter.any()


@pytest.mark.parametrize(("name", "transposed"), [("mixtral", False), ("gpt-oss", True), ("llama4", True)])
def test_fused_experts_are_one_matrix_each(name, transposed):
    found = find_linears(tiny_model(name))
    experts = [linear for linear in found if linear.expert is not None]
    assert len(experts) == 2 * 2 * 3
    up, down = (next(x for x in experts if x.expert == 1 and role in x.role) for role in ("gate_up", "down"))
    assert (up.out_features, up.in_features) == (96, 32)
    assert (down.out_features, down.in_features) == (32, 48)
    assert {linear.transposed for linear in experts} == {transposed}
    assert {linear.bias for linear in experts} == {name == "gpt-oss"}
    up.weight.fill_(7)
    assert (up.parameter[1] == 7).all()
    assert not (up.parameter[0] == 7).any()
    gradient = torch.arange(up.parameter.numel()).view_as(up.parameter)
    assert torch.equal(up.view(gradient), gradient[1].T if transposed else gradient[1])


def test_fused_experts_can_be_left_alone():
    found = find_linears(tiny_model("mixtral"), experts=False)
    assert all(linear.expert is None for linear in found)
    assert [s.name for s in found.skipped if s.reason == "fused experts"] == [
        f"model.layers.{block}.mlp.experts.{name}" for block in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]


def test_routers_are_skipped_and_named():
    found = find_linears(tiny_model("qwen2-moe"))
    assert [s.name for s in found.skipped if s.reason == "router"] == [
        f"model.layers.{block}.mlp.{name}" for block in (0, 1) for name in ("gate", "shared_expert_gate")
    ]
    llama4 = find_linears(tiny_model("llama4"))
    assert [s.name for s in llama4.skipped if s.reason == "router"] == [
        f"model.layers.{block}.feed_forward.router" for block in (0, 1)
    ]


def test_a_gate_without_experts_is_a_linear_layer():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4)}) for _ in range(2))
    assert [linear.role for linear in find_linears(model)] == ["gate", "up"] * 2
    for layer in model.layers:
        layer["experts"] = nn.ModuleList([nn.ModuleDict({"gate_proj": nn.Linear(4, 4)})])
    found = find_linears(model)
    assert [linear.role for linear in found] == ["up", "experts.0.gate_proj"] * 2
    assert {skipped.reason for skipped in found.skipped} == {"router"}


def test_tied_weights_are_not_returned():
    for device in ("cpu", "meta"):
        found = find_linears(tiny_model("llama-tied", device))
        assert ("lm_head", "tied to model.embed_tokens") in [(s.name, s.reason) for s in found.skipped]
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight
    found = find_linears(model)
    assert ("model.layers.0.mlp.up_proj", "tied to model.embed_tokens") in [(s.name, s.reason) for s in found.skipped]


def test_a_shared_weight_is_returned_once():
    found = find_linears(tiny_model("zamba"))
    shared = found.find("model.layers.0.shared_transf.self_attn.q_proj")
    assert shared.aliases == ("model.layers.2.shared_transf.self_attn.q_proj",)
    assert found.find(shared.aliases[0]) is shared
    assert len({id(linear.parameter) for linear in found}) == len(found)
    ignored = find_linears(tiny_model("zamba"), ignore=["model.layers.2.shared_transf"])
    assert "ignored by model.layers.2.shared_transf" in [s.reason for s in ignored.skipped if s.name == shared.name]


@pytest.mark.parametrize("name", ["llama-tied", "zamba"])
def test_ties_that_loading_will_make_count_already(name):
    tied, untied = tiny_model(name, "meta"), tiny_model(name, "meta")
    for target in untied.all_tied_weights_keys:  # so from_pretrained hands a model to quantizers
        module, attribute = target.rsplit(".", 1)
        shape = untied.get_parameter(target).shape
        setattr(untied.get_submodule(module), attribute, nn.Parameter(torch.empty(shape, device="meta")))
    assert [(x.name, x.aliases) for x in find_linears(untied)] == [(x.name, x.aliases) for x in find_linears(tied)]
    assert find_linears(untied).skipped == find_linears(tied).skipped


def test_encoder_and_decoder_are_both_found():
    found = find_linears(tiny_model("t5"))
    assert found.stacks == ("encoder.block", "decoder.block")
    assert {linear.block for linear in found} == {0, 1}
    assert found.find("decoder.block.1.layer.1.EncDecAttention.q").role == "layer.1.EncDecAttention.q"
    reasons = {s.name: s.reason for s in found.skipped}
    assert reasons["encoder.block.0.layer.1.DenseReluDense.wo"].startswith("kept in float32 by the model")


def test_a_tower_that_reads_no_text_is_left_alone():
    import transformers

    config = transformers.LlavaConfig(
        text_config=tiny_config("llama"),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
    )
    with torch.device("meta"):
        found = find_linears(transformers.LlavaForConditionalGeneration(config))
    assert {linear.name.split(".layers.")[0] for linear in found} == {"model.language_model"}
    towers = {s.reason for s in found.skipped if "vision" in s.name and "layers" in s.name}
    assert towers == {"in model.vision_tower, which does not read text"}


def test_a_linear_layer_that_does_more_is_skipped():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Plain(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    block = nn.ModuleDict({"a": Scaled(4, 4), "b": Plain(4, 4), "c": nn.Linear(4, 4), "d": nn.Conv1d(4, 4, 1)})
    before = torch.get_rng_state()
    found = find_linears(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert torch.equal(torch.get_rng_state(), before)
    assert [linear.role for linear in found] == ["b", "c"]
    assert [(s.name, s.reason) for s in found.skipped] == [
        ("blocks.0.a", "Scaled is a linear layer with a forward of its own"),
        ("blocks.0.d", "Conv1d is not a linear layer"),
    ]


def test_ignore_takes_names_and_patterns():
    model = tiny_model("mixtral")
    found = find_linears(model, ignore=["model.layers.0.self_attn", "re:.*down_proj.[02]$", "lm_head"])
    assert [linear.name for linear in found if linear.block == 0] == [
        *(f"model.layers.0.mlp.experts.gate_up_proj.{i}" for i in range(3)),
        "model.layers.0.mlp.experts.down_proj.1",
    ]
    reasons = {s.name: s.reason for s in found.skipped}
    assert reasons["model.layers.0.self_attn.q_proj"] == "ignored by model.layers.0.self_attn"
    assert reasons["model.layers.1.mlp.experts.down_proj.2"] == "ignored by re:.*down_proj.[02]$"
    assert reasons["lm_head"] == "output embedding"
    assert len(find_linears(model, ignore="model.layers.1.mlp.experts.down_proj")) == len(find_linears(model)) - 3
    # as compressed-tensors matches: from the start of the full name, not anywhere in it
    with pytest.raises(InvalidArgumentError, match="got re:q_proj"):
        find_linears(model, ignore=["re:q_proj"])


@pytest.mark.parametrize("entry", ["model.layers.7", "model.layers.0.self_attn.q", "re:.*nothing", "q_proj"])
def test_an_ignore_entry_without_a_match_is_named(entry):
    with pytest.raises(
        InvalidArgumentError, match=r"an entry of ignore must match at least one matrix or module: got " + entry[:5]
    ):
        find_linears(tiny_model("llama"), ignore=["lm_head", entry])


def test_a_pattern_that_is_none_is_named():
    with pytest.raises(
        InvalidArgumentError,
        match=r"an entry of ignore must be the name of a matrix or module, or re: and a regular expression: got re:\(",
    ):
        find_linears(tiny_model("llama"), ignore=["re:("])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"needs blocks with linear layers in an nn.ModuleList: got Sequential"
    ):
        find_linears(nn.Sequential(nn.Linear(4, 4)))


def test_find_says_why_a_name_is_none():
    found = find_linears(tiny_model("llama"))
    with pytest.raises(InvalidArgumentError, match=r"got name=lm_head \(output embedding\)"):
        found.find("lm_head")
    with pytest.raises(InvalidArgumentError, match=r"got name=layers.9 \(the model has no such matrix\)"):
        found.find("layers.9")
    assert found[0].name == "model.layers.0.self_attn.q_proj"
    assert len(found[:2]) == 2
