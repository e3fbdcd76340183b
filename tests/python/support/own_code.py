"""Checkpoints with custom model code, which need trust_remote_code."""

import torch

from config_file import edit_config
from tiny_models import byte_tokenizer, tiny_model

OWN_CODE = """
import transformers


class OwnConfig(transformers.LlamaConfig):
    model_type = "own-llama"


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp.extra_proj = transformers.pytorch_utils.nn.Linear(32, 32, bias=False)

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


class OwnOfOwnConfig(LlamaForCausalLM):
    config_class = OwnConfig


class OwnModel(transformers.LlamaForCausalLM):
    pass
"""


def own_code(folder, auto_map, **changes):
    """Save a small Llama with custom code to a folder.

    Args:
        folder: folder to write.
        auto_map: name of a transformers auto class to name of the class in the code. With ``AutoModelForCausalLM``,
            the first block has one more matrix than a Llama of transformers.
        changes: other changes of config.json.
    """
    model = tiny_model("llama")
    if "AutoModelForCausalLM" in auto_map:
        model.model.layers[0].mlp.extra_proj = torch.nn.Linear(32, 32, bias=False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    edit_config(folder, auto_map={auto: f"modeling_own.{name}" for auto, name in auto_map.items()}, **changes)
    return folder


OWN_CASES = {
    "of a known name": ({"AutoModelForCausalLM": "LlamaForCausalLM"}, {}),
    "of its own name": ({"AutoModelForCausalLM": "LlamaForCausalLM"}, {"architectures": ["OwnForCausalLM"]}),
    "under AutoModel alone": ({"AutoModel": "OwnModel"}, {}),
    "with a configuration of a known type": (
        {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnOfOwnConfig"},
        {},
    ),
    "with a configuration of an unknown type": (
        {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnOfOwnConfig"},
        {"model_type": "own-llama", "architectures": ["OwnOfOwnConfig"]},
    ),
    "with a configuration without a type": (
        {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnOfOwnConfig"},
        {"model_type": None},
    ),
}
