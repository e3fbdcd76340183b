"""Every causal language model that transformers has, tiny: quantized, saved, loaded and used."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import quantrature as qtr
from quantrature import QuantratureError
from quantrature.nn import quantized_layers
from tiny_configs import shrunk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # models of all ages warn of this and that
]

IDS = torch.arange(5, 13)[None]
MOST = 8_000_000
"""Weights; models that stay larger are not built."""

TWO_TOKENS = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}


def built(kind):
    """A model of a type with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shrunk(CONFIG_MAPPING[kind]())).eval()


def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(IDS, **more).logits


def roundtrip(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def checked(kind):
    """Skip, with the reason, a type whose dense model cannot be built tiny or does not run; whether it generates."""
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in built(kind).parameters())
        if count > MOST:
            pytest.skip(f"{kind} has {count} weights where it is smallest")
        dense = built(kind)
        logits(dense)
    except Exception as error:
        pytest.skip(f"a dense {kind} cannot be built and run: {type(error).__name__}: {str(error).strip()[:200]}")
    try:
        dense.generate(IDS, **TWO_TOKENS)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_it_is_quantized_saved_loaded_and_used(kind, tmp_path):
    generates = checked(kind)
    for embedding_bits in (None, 8):
        model = built(kind)
        try:
            qtr.quantize(model, bits=8, group_size=16, embedding_bits=embedding_bits)
        except QuantratureError as refusal:  # a named one
            pytest.skip(f"{kind} with embedding_bits={embedding_bits}: {refusal}")
        before = logits(model)
        loaded = roundtrip(model, tmp_path / f"{embedding_bits}")
        after = logits(loaded)
        assert before.isfinite().all()
        assert {n: layer.spec for n, layer in quantized_layers(loaded).items()} == {
            n: layer.spec for n, layer in quantized_layers(model).items()
        }
        if not torch.equal(before, after):  # then only where the dense model is not the same either
            dense = built(kind)
            assert not torch.equal(logits(roundtrip(dense, tmp_path / "dense")), logits(built(kind)))
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
        loaded.to(torch.bfloat16).to(torch.float32)
        if generates:
            loaded.generate(IDS, **TWO_TOKENS)
