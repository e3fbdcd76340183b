import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import quantrature as qtr
from quantrature import InvalidArgumentError, checkpoint
from quantrature.cli import main
from quantrature.models import find_linears
from quantrature.nn import QuantEmbedding, QuantLinear, TiedLinear, quantized_layers
from quantrature.plan import Plan, PlanEntry
from tiny_models import CONFIGS, byte_tokenizer, tiny_config, tiny_model

IDS = torch.arange(5, 29).view(2, 12)


def auto_class(name):
    return {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(name, AutoModelForCausalLM)


def logits(model, name="", **more):
    if name == "t5":
        more["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(IDS, **more).logits


def table_of(model):
    """The quantized embedding of a model and what it stands for."""
    layer = model.get_input_embeddings()
    assert isinstance(layer, QuantEmbedding)
    return layer, layer.dequantize()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_what_it_would_with_the_dequantized_tables(name, bits):
    model = tiny_model(name)
    tied = model.config.tie_word_embeddings
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    quantized = qtr.quantize(copy.deepcopy(model), bits=8, group_size=16, embedding_bits=bits)
    layer, table = table_of(quantized)
    assert layer.spec.dense.setting == ("b8g-1" if bits == 8 else "b4g16")
    quantized_head = quantized.get_output_embeddings()
    assert isinstance(quantized_head, TiedLinear if tied else QuantLinear)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
        rows = model.get_input_embeddings()(IDS)
        assert torch.equal(layer(IDS), rows)
        x = torch.randn(3, layer.embedding_dim)
        if tied:
            expected = linear(x, table, model.get_output_embeddings().bias)
        else:
            expected = linear(x, quantized_head.dequantize(), quantized_head.bias)
        torch.testing.assert_close(quantized_head(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_holds_one_table_and_gives_the_same_logits(name, tmp_path):
    model = tiny_model(name)
    tied = model.config.tie_word_embeddings
    model = qtr.quantize(model, bits=4, group_size=16, embedding_bits=8)
    before = logits(model, name)
    model.save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, name), before)
    assert isinstance(loaded.get_output_embeddings(), TiedLinear if tied else QuantLinear)
    stored = checkpoint.stored_tensors(tmp_path.glob("*.safetensors"))
    whole = 258 * model.get_input_embeddings().embedding_dim
    assert sum(tensor.nbytes == whole and tensor.dtype == "U8" for tensor in stored.values()) == (1 if tied else 2)
    loaded.save_pretrained(tmp_path / "again")
    assert checkpoint.stored_tensors((tmp_path / "again").glob("*.safetensors")) == stored


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "gpt2", "opt", "zamba", "bert", "t5"])
def test_dense_again_it_is_what_it_was_made_from(name, tmp_path):
    original = tiny_model(name)
    model = qtr.quantize(copy.deepcopy(original), bits=8, group_size=16, embedding_bits=8)
    _, table = table_of(model)
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = auto_class(name).from_pretrained(tmp_path, quantization_config=qtr.QuantratureConfig(dequantize=True))
    assert not quantized_layers(dense)
    assert type(dense.get_input_embeddings()) is type(original.get_input_embeddings())
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert torch.equal(dense.get_input_embeddings().weight, table)
    assert dense.get_input_embeddings().padding_idx == original.get_input_embeddings().padding_idx
    torch.testing.assert_close(logits(dense, name), expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    again = auto_class(name).from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, name), logits(dense, name))


def test_a_bias_that_two_modules_have_stays_one():
    for tied in (True, False):
        config = tiny_config("bert")
        config.tie_word_embeddings = tied
        model = AutoModelForMaskedLM.from_config(config)
        count = model.num_parameters()
        qtr.quantize(model, bits=8, group_size=16, embedding_bits=8)
        model.to(torch.bfloat16).to(torch.float32)
        assert model.num_parameters() == count
        for dtype in (None, torch.bfloat16):
            dense = copy.deepcopy(model).dequantize(dtype)
            head = dense.cls.predictions
            assert (head.decoder.bias is head.bias) == tied
            assert dense.num_parameters() == count
            assert {parameter.dtype for parameter in dense.parameters()} == {dtype or torch.float32}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_quantizing_while_reading_is_the_same(name, device_map, tmp_path):
    original = tiny_model(name)
    original.save_pretrained(tmp_path, max_shard_size="20kB")
    expected = qtr.quantize(original, bits=4, group_size=16, embedding_bits=8)
    config = qtr.QuantratureConfig(bits=4, group_size=16, embedding_bits=8)
    read, info = auto_class(name).from_pretrained(
        tmp_path, quantization_config=config, device_map=device_map, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(read), logits(expected))
    assert {n: s.spec for n, s in quantized_layers(read).items()} == {
        n: s.spec for n, s in quantized_layers(expected).items()
    }


def test_the_dtype_follows_casts_and_loading(tmp_path):
    model = qtr.quantize(tiny_model("llama-tied"), bits=4, group_size=16, embedding_bits=8)
    layer, table = table_of(model)
    codes = layer.codes.clone()
    model.to(torch.bfloat16)
    assert layer(IDS).dtype == torch.bfloat16
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer(IDS), embedding(IDS, table.bfloat16()))
    assert logits(model).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings()(IDS).dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(wide.get_input_embeddings()(IDS), embedding(IDS, table))


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_an_embedding_that_multiplies_by_a_constant_is_known_in_bfloat16_as_well(name, tmp_path):
    model = qtr.quantize(tiny_model(name).to(torch.bfloat16), bits=4, group_size=16, embedding_bits=8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.get_input_embeddings()(IDS), model.get_input_embeddings()(IDS))


def test_a_copy_has_a_table_of_its_own():
    model = qtr.quantize(tiny_model("llama-tied"), bits=4, group_size=16, embedding_bits=8)
    before = logits(model)
    other = copy.deepcopy(model)
    other.get_input_embeddings().codes.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(other), before)


def test_tying_again_changes_nothing():
    for name in ("llama-tied", "bert"):
        model = qtr.quantize(tiny_model(name), bits=4, group_size=16, embedding_bits=8)
        before = logits(model)
        model.tie_weights()
        assert torch.equal(logits(model), before)


def test_it_compiles_and_generates():
    model = qtr.quantize(tiny_model("gemma"), bits=4, group_size=16, embedding_bits=8)
    expected = logits(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits, expected)
    found = model.generate(IDS[:1, :4], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert found.shape == (1, 9)


def test_the_operator_keeps_what_it_promises():
    layer, _ = table_of(qtr.quantize(tiny_model("llama"), bits=4, group_size=16, embedding_bits=4))
    arguments = (IDS, layer._in_order(), layer._description, torch.float32)
    torch.library.opcheck(torch.ops.quantrature.embedding.default, arguments)
    assert layer(IDS[:0]).shape == (0, 12, 32)
    assert torch.equal(layer(IDS.int()), layer(IDS))
    with pytest.raises(IndexError):
        layer(torch.tensor([258]))
    with pytest.raises(InvalidArgumentError, match=r"\[embedding\] ids must be integers: got dtype=torch.float32"):
        layer(torch.ones(3))


def test_a_padding_token_is_remembered():
    model = tiny_model("llama")
    model.set_input_embeddings(nn.Embedding(258, 32, padding_idx=3))
    dense = table_of(qtr.quantize(model, bits=4, group_size=16, embedding_bits=8))[0].to_dense(torch.float32)
    assert (dense.padding_idx, dense.num_embeddings, dense.embedding_dim) == (3, 258, 32)


def test_gradients_flow_through_a_tied_output_embedding():
    model = qtr.quantize(tiny_model("llama-tied"), bits=4, group_size=16, embedding_bits=8)
    _, table = table_of(model)
    x = torch.randn(2, 32, requires_grad=True)
    model.get_output_embeddings()(x).square().sum().backward()
    y = x.detach().requires_grad_()
    linear(y, table).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_without_the_wish_embeddings_stay_as_they_are():
    model = qtr.quantize(tiny_model("llama-tied"), bits=4, group_size=16)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert type(model.get_output_embeddings()) is nn.Linear
    assert not any(matrix.name.startswith(("lm_head", "model.embed")) for matrix in find_linears(tiny_model("llama")))


def test_a_plan_can_name_an_embedding():
    plan = Plan({"model.embed_tokens": PlanEntry(6, 16, sym=True), "lm_head": PlanEntry(5, 16)})
    model = qtr.quantize(tiny_model("llama"), plan=plan)
    assert {n: m.spec.dense.setting for n, m in quantized_layers(model).items()} == {
        "model.embed_tokens": "b6g16 sym",
        "lm_head": "b5g16",
    }
    for entry in (PlanEntry(4, 16, outlier_fraction=0.01), PlanEntry(4, 16, method="gptq")):
        with pytest.raises(InvalidArgumentError, match=r"model.embed_tokens: an embedding cannot have outliers"):
            qtr.quantize(tiny_model("llama"), plan=Plan({"model.embed_tokens": entry}), calibration="text")


def test_scales_of_scales_and_ignored_heads():
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16, meta_bits=8, embedding_bits=4, ignore="lm_head")
    layer, table = table_of(model)
    assert torch.equal(layer(IDS), embedding(IDS, table))
    assert type(model.lm_head) is nn.Linear


def test_calibrated_methods_leave_it_to_rounding():
    windows = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    settings = {"bits": 4, "group_size": 16, "method": "gptq", "calibration": windows}
    alone = qtr.quantize(tiny_model("llama-tied"), **settings)
    model = qtr.quantize(tiny_model("llama-tied"), **settings, embedding_bits=8)
    rounded = qtr.quantize(tiny_model("llama-tied"), bits=4, group_size=16, embedding_bits=8)
    assert table_of(model)[0].spec == table_of(rounded)[0].spec
    for name, layer in quantized_layers(alone).items():
        assert quantized_layers(model)[name].spec == layer.spec


class Odd(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).cumsum(-1)


class Patched(nn.Embedding):
    """Multiplies by a constant, but for one token, which has a row of its own, as T5Gemma 2's has."""

    def __init__(self, rows, columns, padding_idx=None, embed_scale=2.0):
        super().__init__(rows, columns, padding_idx)
        self.embed_scale, self.row = embed_scale, nn.Parameter(torch.zeros(columns))

    def forward(self, ids):
        return torch.where(ids[..., None] == 7, self.row, super().forward(ids) * self.embed_scale)


@pytest.mark.parametrize("kind", [Odd, Patched])
def test_what_cannot_be_quantized_is_named(kind):
    model = tiny_model("llama")
    odd = kind(258, 32)
    model.set_input_embeddings(odd)
    with pytest.raises(
        InvalidArgumentError,
        match=rf"embedding_bits: .* no embedding .* model.embed_tokens is {kind.__name__} is an embedding with",
    ):
        qtr.quantize(model, bits=4, group_size=16, embedding_bits=8, ignore="lm_head")
    with pytest.raises(InvalidArgumentError, match=r"embedding_bits: bits must be 1 to 8"):
        qtr.quantize(tiny_model("llama"), bits=4, group_size=16, embedding_bits=9)
    with pytest.raises(InvalidArgumentError, match=r"embedding_bits cannot be combined with a plan"):
        qtr.quantize(tiny_model("llama"), plan=Plan({}), embedding_bits=8)


def test_descriptions_that_no_embedding_can_have_are_refused(tmp_path):
    model = qtr.quantize(tiny_model("llama-tied"), bits=4, group_size=16, embedding_bits=8)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["model.embed_tokens"]["outliers"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match=r"\[load\] model.embed_tokens: .* a grid without outliers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_command_line_quantizes_and_verifies(tmp_path, capfd):
    def run(*words):
        assert main([str(word) for word in words]) == 0, capfd.readouterr().err

    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("llama-tied").save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    run("quantize", source, "--bits", 4, "--group-size", 16, "--embedding-bits", 8, "-o", out)
    found = checkpoint.inspect(out)
    assert found.modules["model.embed_tokens"]["bits_per_weight"] == 8 + 8 * 4 / 32
    run("verify", out, "--source", source)
    assert isinstance(AutoModelForCausalLM.from_pretrained(out).get_output_embeddings(), TiedLinear)
    plan = Plan.load(out / "plan.json")
    assert plan.entries["model.embed_tokens"].bits == 8
