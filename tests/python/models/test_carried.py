"""Weights of a checkpoint that transformers ignores are saved unchanged, or it is said that they are not."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import quantrature as qtr
from quantrature import QuantratureError, checkpoint
from quantrature.checkpoint.verify import verify
from quantrature.cli import main
from quantrature.models import load_model
from tiny_models import VOCABULARY, byte_tokenizer, tiny_model

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
CONFIGS = {
    "deepseek-v3": (
        "DeepseekV3Config",
        {**_COMMON, **_MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**_COMMON, **_MOE, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "llama": ("LlamaConfig", _COMMON),
}
EXTRA = {
    "deepseek-v3": ("model.layers.61.embed_tokens.weight", "model.layers.61.mlp.experts.0.gate_proj.weight"),
    "deepseek-v3 of two layers": ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.1.down_proj.weight"),
    "qwen3-next": ("mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"),
}


def folder_with(place, case):
    """A model whose folder has more weights than the class of transformers loads."""
    kind, settings = CONFIGS[case.split(" ")[0]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    tensors = load_file(place / "model.safetensors")
    extra = {name: torch.randn(8, 6).to(torch.bfloat16 if i else torch.float32) for i, name in enumerate(EXTRA[case])}
    save_file({**tensors, **extra}, place / "model.safetensors", {"format": "pt"})
    return SimpleNamespace(folder=place, extra=extra)


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def has(folder, extra):
    found = tensors_of(folder)
    return all(
        name in found and found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in extra.items()
    )


@pytest.mark.parametrize("case", EXTRA)
def test_what_transformers_ignores_is_saved_unchanged(case, tmp_path):
    source = folder_with(tmp_path / "source", case)
    model = qtr.quantize(load_model(source.folder), bits=4, group_size=16)
    checkpoint.save(model, tmp_path / "a")
    on_load = AutoModelForCausalLM.from_pretrained(
        source.folder, quantization_config=qtr.QuantratureConfig(bits=4, group_size=16)
    )
    on_load.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    load_model(tmp_path / "a").save_pretrained(tmp_path / "c")
    load_model(tmp_path / "c").save_pretrained(tmp_path / "c")  # onto itself
    for name in "abc":
        assert has(tmp_path / name, source.extra), name
        announced = json.loads((tmp_path / name / "config.json").read_text()).get("num_nextn_predict_layers")
        assert announced == (1 if "deepseek" in case else None)
        assert not verify(tmp_path / name, source.folder).failures
    assert checkpoint.inspect(tmp_path / "a").other_bytes > 8 * 6 * 6


def test_verify_compares_what_is_carried(tmp_path):
    source = folder_with(tmp_path / "source", "qwen3-next")
    checkpoint.save(qtr.quantize(load_model(source.folder), bits=4, group_size=16), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["mtp.fc.weight"][0, 0] += 1
    del tensors["mtp.layers.0.mlp.experts.0.up_proj.weight"]
    tensors["mtp.another.weight"] = torch.ones(3)
    save_file(tensors, path, {"format": "pt"})
    expected = {"mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight", "mtp.another.weight"}
    assert set(verify(tmp_path / "out", source.folder).failures) == expected


def test_requant_keeps_what_is_carried(tmp_path, capfd):
    source = folder_with(tmp_path / "source", "deepseek-v3")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 9)

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0, capfd.readouterr().err

    run("quantize", source.folder, "--bits", 3, "--group-size", 16, "--ignore", "re:.*experts", "-o", tmp_path / "out")
    assert has(tmp_path / "out", source.extra)
    windows = ("--calibration", tmp_path / "text.txt", "--nsamples", 2, "--seqlen", 16, "--steps", 1, "--nodes", 1)
    run("requant", tmp_path / "out", "--source", source.folder, "--significant-fraction", 0.01, *windows, "--overwrite")
    assert has(tmp_path / "out", source.extra)
    run("verify", tmp_path / "out", "--source", source.folder)


def test_a_model_without_a_source_says_what_is_lost_and_announces_it_no_longer(tmp_path, caplog):
    kind, settings = CONFIGS["deepseek-v3"]
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    qtr.quantize(model, bits=4, group_size=16).save_pretrained(tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "multi-token" in record.getMessage()]
    assert len(said) == 1 and "num_nextn_predict_layers is set to 0" in said[0] and "not available" in said[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    load_model(tmp_path / "out")


def test_a_model_without_its_head_says_what_is_lost(tmp_path, caplog):
    source = folder_with(tmp_path / "source", "deepseek-v3")
    model = qtr.quantize(AutoModel.from_pretrained(source.folder), bits=4, group_size=16)
    assert any("which belong to another class" in record.getMessage() for record in caplog.records)
    model.save_pretrained(tmp_path / "out")
    assert not any("61" in name for name in tensors_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_quantized_folder_opened_without_its_head_says_what_is_lost(tmp_path, caplog):
    source = folder_with(tmp_path / "source", "deepseek-v3")
    qtr.quantize(load_model(source.folder), bits=4, group_size=16).save_pretrained(tmp_path / "a")
    load_model(tmp_path / "a")
    assert not any("multi-token" in record.getMessage() for record in caplog.records)
    model = AutoModel.from_pretrained(tmp_path / "a")
    assert any("which belong to another class" in record.getMessage() for record in caplog.records)
    model.save_pretrained(tmp_path / "b")
    assert not any("61" in name for name in tensors_of(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_source_that_announces_what_it_lacks_is_left_alone(tmp_path, caplog):
    source = folder_with(tmp_path / "source", "deepseek-v3")
    tensors = load_file(source.folder / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n not in source.extra},
        source.folder / "model.safetensors",
        {"format": "pt"},
    )
    model = qtr.quantize(load_model(source.folder), bits=4, group_size=16)
    assert not any("multi-token" in record.getMessage() for record in caplog.records)
    assert model.config.num_nextn_predict_layers == 1


def test_a_source_that_has_gone_is_named(tmp_path):
    source = folder_with(tmp_path / "source", "qwen3-next")
    model = qtr.quantize(load_model(source.folder), bits=4, group_size=16)
    (source.folder / "model.safetensors").unlink()
    with pytest.raises(QuantratureError, match=r"\[save\] cannot read .*source/model.safetensors, which holds weights"):
        checkpoint.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_buffers_and_other_towers_are_not_carried(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    save_file({**load_file(path), "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path, {"format": "pt"})
    model = qtr.quantize(load_model(tmp_path / "gpt2"), bits=4, group_size=16)
    assert not model.hf_quantizer.carried
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    encoder = qtr.quantize(transformers.T5EncoderModel.from_pretrained(tmp_path / "t5"), bits=4, group_size=16)
    assert not encoder.hf_quantizer.carried
