"""Make models of a few thousand random weights, in the layouts of several transformers models, and a tokenizer."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 258  # the bytes, <s> and </s>

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama-tied": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 8}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 8}),
    "phi": ("PhiConfig", _COMMON),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2Config", {**_GPT2, "bos_token_id": 256, "eos_token_id": 257}),
    "gpt-neox": ("GPTNeoXConfig", _COMMON),
    "falcon": ("FalconConfig", {**_COMMON, "alibi": False}),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**_GROUPED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 24},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
        | {"layer_types": ["full_attention"] * 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_GROUPED,
            "num_local_experts": 3,
            "intermediate_size_mlp": 40,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
        },
    ),
    "zamba": (  # two of the layers share one transformer block
        "ZambaConfig",
        {**_GROUPED, "num_hidden_layers": 4, "layers_block_type": ["hybrid", "mamba"] * 2},
    ),
    "bert": ("BertConfig", _COMMON),
    "t5": (
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}


def tiny_config(name: str) -> Any:
    """Return the configuration of a layout."""
    kind, settings = CONFIGS[name]
    return getattr(transformers, kind)(**settings)


def tiny_model(name: str, device: str = "cpu", seed: int = 0) -> Any:
    """Return a new model with random weights."""
    auto = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    torch.manual_seed(seed)
    with torch.device(device):
        return auto.get(name, transformers.AutoModelForCausalLM).from_config(tiny_config(name)).eval()


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte, <s> and </s>; it does not add <s> and </s> to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
