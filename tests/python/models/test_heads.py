"""Quantized folders opened under another head than they were saved with, as transformers opens dense ones."""

import json

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

import quantrature as qtr
from quantrature import InvalidArgumentError, checkpoint
from quantrature.models.folding import folds_of
from quantrature.nn import quantized_layers
from tiny_models import CONFIGS, VOCABULARY, tiny_config, tiny_model

# transformers reports the tensors of heads that a folder has too many or too few of, of dense models, too.
TOKENS = torch.arange(24).view(2, 12)


def opened(auto, folder):
    found = (getattr(transformers, auto) if isinstance(auto, str) else auto).from_pretrained(folder)
    assert all(layer.intact for layer in quantized_layers(found).values())
    return found


def hidden(model):
    """What the model without its head gives."""
    base = model.base_model
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return base(input_ids=TOKENS, **more)[0]


def heads_aside(names, prefix):
    return {name.removeprefix(f"{prefix}.") for name in names} - {"lm_head", "embed_out", "cls.predictions.decoder"}


@pytest.mark.parametrize("embedding_bits", [None, 8])
@pytest.mark.parametrize("layout", ["llama", "llama-tied", "gpt2", "mixtral", "opt", "bert"])
def test_a_causal_model_opens_without_its_head_and_back(layout, embedding_bits, tmp_path):
    model = qtr.quantize(tiny_model(layout), bits=4, group_size=16, embedding_bits=embedding_bits)
    model.save_pretrained(tmp_path / "whole")
    expected = hidden(model)
    base = opened(AutoModel, tmp_path / "whole")
    assert type(base) is type(model.base_model)
    assert heads_aside(quantized_layers(base), "") == heads_aside(quantized_layers(model), model.base_model_prefix)
    assert torch.equal(hidden(base), expected)
    base.save_pretrained(tmp_path / "base")
    assert set(checkpoint.inspect(tmp_path / "base").modules) == set(quantized_layers(base))
    assert torch.equal(hidden(opened(AutoModel, tmp_path / "base")), expected)
    back = opened(type(model), tmp_path / "base")
    assert torch.equal(hidden(back), expected)
    back.save_pretrained(tmp_path / "back")
    assert set(checkpoint.inspect(tmp_path / "back").modules) == set(quantized_layers(back))
    assert torch.equal(hidden(opened(type(model), tmp_path / "back")), expected)


@pytest.mark.parametrize(
    ("layout", "auto"),
    [
        ("llama", "AutoModelForSequenceClassification"),
        ("qwen3", "AutoModelForSequenceClassification"),
        ("gpt2", "AutoModelForSequenceClassification"),
        ("llama", "AutoModelForTokenClassification"),
        ("gpt2", "AutoModelForQuestionAnswering"),
        ("bert", "AutoModelForQuestionAnswering"),
    ],
)
def test_a_causal_model_opens_with_another_head(layout, auto, tmp_path):
    model = qtr.quantize(tiny_model(layout), bits=4, group_size=16, embedding_bits=8 if layout == "llama" else None)
    model.save_pretrained(tmp_path / "causal")
    other = opened(auto, tmp_path / "causal")
    assert torch.equal(hidden(other), hidden(model))
    with torch.no_grad():
        head = other.score if hasattr(other, "score") else None
        if head is not None:
            head.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    again = opened(auto, tmp_path / "other")
    assert head is None or torch.equal(again.score.weight, other.score.weight)
    assert torch.equal(hidden(again), hidden(model))


def test_a_model_that_was_quantized_without_a_head_gets_one(tmp_path):
    torch.manual_seed(0)
    model = qtr.quantize(AutoModel.from_config(tiny_config("llama-tied")), bits=4, group_size=16, embedding_bits=8)
    model.save_pretrained(tmp_path / "base")
    causal = opened(AutoModelForCausalLM, tmp_path / "base")
    assert torch.equal(hidden(causal), hidden(model))
    logits = causal(TOKENS).logits
    table = model.embed_tokens.dequantize()
    assert torch.allclose(logits, hidden(model) @ table.T, rtol=1e-4, atol=1e-4)


def test_an_encoder_opens_without_its_decoder(tmp_path):
    model = qtr.quantize(tiny_model("t5"), bits=4, group_size=16)
    model.save_pretrained(tmp_path / "t5")
    encoder = opened(transformers.T5EncoderModel, tmp_path / "t5")
    with torch.no_grad():
        assert torch.equal(encoder(TOKENS)[0], model.encoder(TOKENS)[0])
    encoder.save_pretrained(tmp_path / "encoder")
    assert len(checkpoint.inspect(tmp_path / "encoder").modules) == len(quantized_layers(encoder)) > 0
    with torch.no_grad():
        assert torch.equal(opened(transformers.T5EncoderModel, tmp_path / "encoder")(TOKENS)[0], encoder(TOKENS)[0])


def test_folded_scales_follow_the_names(tmp_path):
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16, method="awq", calibration=TOKENS, nsamples=None)
    model.save_pretrained(tmp_path / "whole")
    assert folds_of(model)
    base = opened(AutoModel, tmp_path / "whole")
    assert [fold.producer for fold in folds_of(base)] == [
        fold.producer.removeprefix("model.") for fold in folds_of(model)
    ]
    base.save_pretrained(tmp_path / "base")
    back = opened(AutoModelForCausalLM, tmp_path / "base")
    assert [fold.to_json() for fold in folds_of(back)] == [fold.to_json() for fold in folds_of(model)]
    assert all(torch.equal(a.scale, b.scale) for a, b in zip(folds_of(back), folds_of(model), strict=True))
    assert torch.equal(hidden(back), hidden(model))


_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}


def two_towers(name):
    torch.manual_seed(0)
    if name == "gemma3":
        config = transformers.Gemma3Config(
            text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=257
        )
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    if name == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            image_token_index=257,
        )
        return transformers.LlavaForConditionalGeneration(config).eval()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=257,
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2-vl"])
def test_a_model_with_a_tower_for_images_opens_without_its_head_and_back(name, tmp_path):
    model = qtr.quantize(two_towers(name), bits=4, group_size=16)
    model.save_pretrained(tmp_path / "whole")
    expected = hidden(model)
    base = opened(AutoModel, tmp_path / "whole")
    assert torch.equal(hidden(base), expected)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(hidden(opened(type(model), tmp_path / "base")), expected)


def test_the_language_model_of_a_model_with_a_tower_opens_alone(tmp_path):
    text = {**CONFIGS["llama4"][1], "pad_token_id": 0}
    vision = {**_VISION, "vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 32}
    vision |= {"pixel_shuffle_ratio": 0.5, "num_hidden_layers": 1, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=text, vision_config=vision, image_token_index=257)
    ).eval()
    qtr.quantize(model, bits=4, group_size=16).save_pretrained(tmp_path / "whole")
    text = opened(AutoModelForCausalLM, tmp_path / "whole")
    assert type(text) is transformers.Llama4ForCausalLM
    assert len(quantized_layers(text)) == len(quantized_layers(model)) > 0
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        assert torch.equal(text(TOKENS).logits, expected)
        text.save_pretrained(tmp_path / "text")
        assert torch.equal(opened(AutoModelForCausalLM, tmp_path / "text")(TOKENS).logits, expected)


def test_a_class_without_any_of_the_blocks_is_refused(tmp_path):
    qtr.quantize(tiny_model("llama"), bits=4, group_size=16).save_pretrained(tmp_path / "causal")
    for auto in ("LlamaForQuestionAnswering", "OPTModel"):  # the first has its blocks in transformer.layers
        with pytest.raises(
            InvalidArgumentError,
            match=rf"\[load\] {auto} has none of the quantized matrices .* LlamaForCausalLM; the checkpoint has",
        ):
            getattr(transformers, auto).from_pretrained(tmp_path / "causal")


def test_a_matrix_of_the_blocks_is_never_passed_over(tmp_path):
    qtr.quantize(tiny_model("llama"), bits=4, group_size=16).save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for auto in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(
            InvalidArgumentError, match=r"\[load\] model\.layers\.1\.\S+ .*the model has no such matrix"
        ):
            auto.from_pretrained(tmp_path / "whole")
    modules = config["quantization_config"]["modules"]
    modules["nonsense"] = next(iter(modules.values()))
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidArgumentError, match=r"\[load\] nonsense .*the model has no such matrix"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
