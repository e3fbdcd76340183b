"""Models whose own code reads the weight of a layer that is quantized."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import quantrature as qtr
from quantrature import UnsupportedError, checkpoint
from quantrature.models import find_linears
from quantrature.models.linears import IN_USE
from quantrature.nn import QuantEmbedding, TiedEmbedding, TiedLinear, quantized_layers
from quantrature.plan import Plan, PlanEntry
from tiny_configs import shrunk
from tiny_models import tiny_model

IDS = torch.arange(5, 29).view(2, 12)
SETTING = {"bits": 8, "group_size": 16}
SMALL = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MAMBA = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
BOTH = {**SMALL, "d_model": 32, "decoder_start_token_id": 0}
SWITCH = {**BOTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "num_experts": 2}
MARIAN = {**BOTH, "max_position_embeddings": 64}
for side in ("encoder", "decoder"):
    SWITCH[f"num_sparse_{side}_layers"] = 1
    MARIAN |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}

MODELS = {
    "MambaConfig": MAMBA,
    "FalconMambaConfig": MAMBA,
    "JambaConfig": HYBRID,
    "RwkvConfig": {**SMALL, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2},
    "SwitchTransformersConfig": SWITCH,
    "MarianConfig": MARIAN,
}


def built(kind):
    config = getattr(transformers, kind)(**MODELS[kind])
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def logits(model):
    more = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        return model(IDS, **more).logits


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "disabled", True)


@pytest.mark.parametrize("embedding_bits", [None, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_whatever_is_quantized_runs_in_memory_and_loaded(kind, embedding_bits, tmp_path):
    dense = built(kind)
    dense.save_pretrained(tmp_path / "dense")
    model = qtr.quantize(dense, **SETTING, embedding_bits=embedding_bits)
    model.save_pretrained(tmp_path / "quantized")
    before = logits(model)  # afterwards: Rwkv's changes its weights
    torch.testing.assert_close(before, logits(built(kind)), rtol=0.2, atol=0.2)
    loaded = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(loaded), before)
    config = qtr.QuantratureConfig(**SETTING, embedding_bits=embedding_bits)
    read = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert torch.equal(logits(read), before)
    names = set(quantized_layers(model))
    assert names == set(quantized_layers(loaded)) == set(quantized_layers(read))


def test_layers_that_a_model_multiplies_with_itself_stay_dense_and_are_named(caplog):
    model = built("MambaConfig")
    skipped = {s.name: s.reason for s in find_linears(model).skipped}
    assert skipped["backbone.layers.1.mixer.dt_proj"] == IN_USE
    qtr.quantize(model, **SETTING)
    assert f"2 backbone.layers.*.mixer.dt_proj ({IN_USE})" in caplog.text
    with pytest.raises(qtr.InvalidArgumentError, match="dt_proj' cannot be quantized: the model's code uses"):
        qtr.quantize(built("MambaConfig"), plan=Plan({"backbone.layers.0.mixer.dt_proj": PlanEntry(8, 16)}))


class Functional(nn.Module):
    """A model of two blocks that are given to F.linear, looked up by a list, cast to, and fused by PyTorch."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)
            self.stacked = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            x = self.called(x.to(self.called.weight.device, self.called.weight.dtype))
            x = linear(x, getattr(self, "read").weight, self.read.bias)  # noqa: B009
            x = x @ torch.cat([layer.weight for layer in self.stacked]).mT[:, :32]
            return self.attention(x, x, x)[0]

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_is_seen_however_a_weight_is_read_and_without_the_values(device):
    with torch.device(device):
        model = Functional().eval()
    assert [linear.name for linear in find_linears(model)] == ["blocks.0.called", "blocks.1.called"]
    assert len(find_linears(model, watch=False)) == 10


def test_watching_leaves_model_hooks_and_random_numbers_alone():
    model = Functional().eval()
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("hook"))
    random, state = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_linears(model)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_wants_other_inputs_is_quantized_as_ever():
    class Strange(Functional):
        def forward(self, pixels):
            raise AssertionError

    assert len(find_linears(Strange())) == 10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_weight_of_a_quantized_layer_is_like_that_of_a_dense_one(name):
    dense = tiny_model(name).to(torch.bfloat16)
    model = qtr.quantize(copy.deepcopy(dense), **SETTING, outlier_fraction=0.01, embedding_bits=8)
    for path, layer in quantized_layers(model).items():
        weight, original = layer.weight, dense.get_submodule(path).weight
        assert (weight.shape, weight.dtype, weight.device) == (original.shape, original.dtype, original.device)
        image = layer.to_dense(torch.bfloat16).weight
        assert torch.equal(weight + 0, image)
        assert torch.equal(weight[3], image[3])
        assert torch.equal(weight[-1], image[-1])
        assert torch.equal(weight.data.T, image.T)
        assert weight.to(torch.float32).dtype == torch.float32
        assert torch.zeros_like(weight).shape == weight.shape
        x = torch.randn(3, original.shape[-1], dtype=torch.bfloat16)
        assert torch.equal(linear(x, weight), linear(x, image))
        for change in (lambda w=weight: w.zero_(), lambda w=weight: w.data.copy_(w), lambda w=weight: w.mul_(2)):
            with pytest.raises(
                UnsupportedError, match=r"cannot change the weight of a quantized layer: call model.deq"
            ):
                change()
        for given in (original, nn.Parameter(torch.ones(2))):
            with pytest.raises(UnsupportedError, match="an assignment cannot change the weight"):
                layer.weight = given
    model.to(torch.float32)
    assert {layer.weight.dtype for layer in quantized_layers(model).values()} == {torch.float32}


def test_gradients_go_through_the_weight_of_a_quantized_layer():
    layer = quantized_layers(qtr.quantize(tiny_model("llama"), **SETTING))["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32, requires_grad=True)
    y = x.detach().requires_grad_()
    linear(x, layer.weight).square().sum().backward()
    linear(y, layer.dequantize()).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_files_keep_the_name_and_the_shape_that_stop_other_readers(tmp_path):
    model = qtr.quantize(tiny_model("llama"), **SETTING)
    model.save_pretrained(tmp_path)
    stored = checkpoint.stored_tensors(tmp_path.glob("*.safetensors"))
    codes = stored["model.layers.0.mlp.up_proj.weight"]
    assert (codes.dtype, len(codes.shape)) == ("U8", 1)
    assert not any("codes" in name for name in stored)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_with_the_names_of_files_is_taken():
    model = qtr.quantize(tiny_model("llama"), **SETTING)
    other = qtr.quantize(tiny_model("llama", seed=1), **SETTING)
    state = {
        name.removesuffix("codes") + "weight" if name.endswith(".codes") else name: tensor
        for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


def test_names_that_the_patterns_of_a_model_would_hit_are_left_alone(tmp_path):
    model = AutoModelForCausalLM.from_config(shrunk(transformers.LagunaConfig())).eval()
    model = qtr.quantize(model, **SETTING)
    assert any("shared_experts" in name for name in quantized_layers(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["CamembertConfig", "XLMRobertaConfig"])
def test_an_output_embedding_that_stands_before_the_table_shares_it(kind, tmp_path):
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    config = getattr(transformers, kind)(**SMALL, **settings, max_position_embeddings=64, is_decoder=True)
    model = qtr.quantize(AutoModelForCausalLM.from_config(config).eval(), **SETTING, embedding_bits=8)
    assert isinstance(model.get_output_embeddings(), TiedLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_every_place_that_looks_up_in_one_table_shares_the_quantized_one():
    model = qtr.quantize(built("MarianConfig"), **SETTING, embedding_bits=8)
    places = [model.model.shared, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens]
    assert [type(place) for place in places] == [QuantEmbedding, TiedEmbedding, TiedEmbedding]
    assert not any(type(module) is nn.Embedding for module in model.modules())


OLMO = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def olmo(**settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.OlmoConfig(**OLMO, max_position_embeddings=64, **settings))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_any_floating_point_parameter_has_dtype_and_device(tied, tmp_path):
    model = qtr.quantize(olmo(tie_word_embeddings=tied).eval(), **SETTING, embedding_bits=8)
    before = logits(model)
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert (loaded.dtype, loaded.device.type) == (torch.bfloat16, "cpu")
    assert logits(loaded).dtype == torch.bfloat16
    assert set(loaded.state_dict()) == names
    assert torch.equal(logits(loaded.to(torch.float32)), before)
    assert loaded.generate(IDS[:, :4], max_new_tokens=2, min_new_tokens=2).shape == (2, 6)
    dense = loaded.dequantize(torch.float32)
    assert not any("dtype_and_device" in name for name, _ in dense.named_parameters())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "t5"])
def test_quantized_embeddings_move_and_cast_in_memory(name):
    model = qtr.quantize(tiny_model(name), **SETTING, embedding_bits=8)
    before = logits(model)
    assert not any(tensor.is_meta for tensor in (*model.buffers(), *model.parameters()))
    for moved in (
        model.to("cpu"),
        model.to("cpu", torch.bfloat16),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert logits(moved).dtype == moved.dtype
    torch.testing.assert_close(logits(model.to(torch.float32)), before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "quantized"),
    [
        ("llama", "model.embed_tokens and lm_head"),
        ("llama-tied", "model.embed_tokens and lm_head"),
        ("t5", "shared and lm_head"),
    ],
)
@pytest.mark.parametrize("way", ["memory", "loaded", "copied"])
def test_a_quantized_table_is_not_resized(name, quantized, way, tmp_path):
    model = qtr.quantize(tiny_model(name), **SETTING, embedding_bits=8)
    if way == "loaded":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    elif way == "copied":
        model = copy.deepcopy(model)
    before = logits(model)
    for settings in ({"new_num_tokens": 260}, {"new_num_tokens": 10}, {"pad_to_multiple_of": 64}):
        with pytest.raises(
            UnsupportedError, match=rf"\[embedding\] .*{quantized.split(' and ')[0]}.* cannot be resized"
        ):
            model.resize_token_embeddings(**settings)
    assert torch.equal(logits(model), before)
    assert model.config.vocab_size == 258
    assert model.resize_token_embeddings(258) is model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    dense = model.dequantize()
    dense.resize_token_embeddings(260)
    assert logits(dense).shape[-1] == 260


def test_a_quantized_output_embedding_alone_is_not_resized_either():
    model = qtr.quantize(tiny_model("llama"), plan=Plan({"lm_head": PlanEntry(8, 16)}))
    with pytest.raises(
        UnsupportedError, match=r"\[embedding\] lm_head cannot be resized, because it is quantized: .*=260"
    ):
        model.resize_token_embeddings(260)
    untouched = qtr.quantize(tiny_model("llama"), **SETTING)
    untouched.resize_token_embeddings(260)
    assert logits(untouched).shape[-1] == 260


def test_in_memory_and_loaded_models_say_the_same_of_themselves(tmp_path):
    model = qtr.quantize(tiny_model("llama"), **SETTING)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert each.is_quantized
        assert all(part.config._is_quantized for part in (each, each.model))
        assert each.quantization_method == "quantrature"
    assert not hasattr(model.dequantize().config, "_is_quantized")
