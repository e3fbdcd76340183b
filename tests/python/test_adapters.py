"""LoRA adapters on quantized layers. Needs peft."""

import pytest
import torch

import quantrature as qtr
from quantrature import UnsupportedError
from tiny_models import tiny_model

peft = pytest.importorskip("peft")

from quantrature.adapters import LoraQuantLinear, prepare  # noqa: E402

# What PEFT asks of transformers is on its way out there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(2 * 12).view(2, 12)
NAMES = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "falcon": ["query_key_value"],
}


def quantized(layout="llama"):
    return qtr.quantize(tiny_model(layout), bits=4, group_size=16, outliers=0.01)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("layout", NAMES)
def test_adapters_learn_on_a_quantized_model(layout, tmp_path):
    torch.manual_seed(0)
    before = logits(quantized(layout))
    config = peft.LoraConfig(r=4, target_modules=NAMES[layout], task_type="CAUSAL_LM", lora_dropout=0.0)
    model = peft.get_peft_model(quantized(layout), prepare(config))
    assert sum(isinstance(module, LoraQuantLinear) for module in model.modules()) == 2 * len(NAMES[layout])
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    # Not in training mode: GPT-2 would drop out at random.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)

    after = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        quantized(layout), tmp_path, config=prepare(peft.LoraConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(logits(again), after)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)


def test_transformers_adds_adapters_too():
    model = quantized()
    model.add_adapter(prepare(peft.LoraConfig(r=2, target_modules=["q_proj"])))
    model(TOKENS).logits.sum().backward()
    assert model.hf_quantizer.is_trainable  # what transformers' Trainer asks


def test_what_needs_plain_weights_is_refused():
    with pytest.raises(UnsupportedError, match="use_dora needs plain weights"):
        prepare(peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
    model = peft.get_peft_model(quantized(), prepare(peft.LoraConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(UnsupportedError, match="dequantize the model first"):
        model.merge_and_unload()


def test_peft_alone_says_that_it_cannot():
    with pytest.raises(ValueError, match="QuantLinear.*is not supported"):
        peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=["q_proj"]))
