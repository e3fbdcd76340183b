"""Make the default configuration of any transformers model tiny, by the names of its settings."""

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 258

RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"(.*_)?max_position_embeddings|n_positions|n_ctx|context_length|max_sequence_length|max_seq_len|block_size", 64),
    (r"max_(source|target)_positions", 64),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_query_groups)", 2),
    (r"linear_num_key_heads", 2),
    (r"(linear|mamba|ssm)?_?(num|n)_(v_heads|value_heads)", 4),
    (r"(global_|index_|swa_|linear_|full_)*(head_dim|head_size)|d_kv|v_head_dim|kv_channels|attention_head_dim", 8),
    (r"(.*_)?(qk_nope|qk_rope|v|linear_key|linear_value|qk|key|value|index)_head_dim", 8),
    (r"(mamba_|ssm_)?(n_heads|num_heads)|mamba_num_heads", 4),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads|heads)", 4),
    (r"(.*_)?(lora_rank|low_rank_dim|rank_dim|lora_rank_.*)", 8),
    (r"(num_|n_)?(hidden_|decoder_|encoder_)?(layers|layer)|num_(hidden|decoder|encoder)_layers|n_layers?", 4),
    (r"(num|n|moe_num)_?(.*_)?(experts|local_experts|routed_experts)", 4),
    (r"(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_?k|num_selected_experts|num_experts_per_token)", 2),
    (r"(.*_)?(n_group|topk_group|num_expert_group)", 1),
    (r"(moe_|.*expert_)(intermediate_size|ffn_hidden_size)(_.*)?", 16),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff|d_inner|dim_ff|expert_dim|feed_forward.*)", 48),
    (r"(.*_)?(hidden_size|d_model|n_embd|n_embed|emb_dim|embed_dim|embedding_size|word_embed_proj_dim|lru_width)", 32),
    (r"(d_embed|dim_model|attention_hidden_size|hidden_dim|projection_dim|embedding_dim)", 32),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)|mamba_d_state", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"(mamba_)?(n_groups|num_groups|d_groups)", 1),
    (r"(.*_)?chunk_size", 8),
    (r"rotary_dim|rotary_ndims", 8),
    (r"image_size", 16),
    (r"patch_size", 8),
    (r"num_codebooks|num_kv_shared_layers", 2),
    (r"(attention|sliding)_?window(_size)?|sliding_window|local_attention", 16),
]
"""Patterns for the full name of a setting, and the largest value of such a setting; it replaces larger values."""


SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "head_dim": 8, "num_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
        "num_hashes": 1,
        "num_buckets": 4,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}
"""Settings by model type that the rules cannot find, because the default lacks them or they depend on each other."""


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration of the same class, for models of some ten thousand weights."""
    return type(config)(**_settings(config), **SPECIAL.get(config.model_type, {}))


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    default = config.to_dict()
    layers = _layers(default)
    found: dict[str, Any] = {}
    for name, value in default.items():
        sub = getattr(config, name, None) if isinstance(value, dict) else None
        if name in ("model_type", "transformers_version", "architectures", "_name_or_path"):
            continue
        if isinstance(sub, PreTrainedConfig):
            found[name] = _settings(sub) | SPECIAL.get(sub.model_type, {})
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            found[name] = _size(name, value)
        elif isinstance(value, list) and layers and len(value) == layers:
            found[name] = _both_kinds(value, 4)
    if default.get("num_key_value_heads") == default.get("num_attention_heads"):
        found["num_key_value_heads"] = found.get("num_attention_heads")  # latent attention has no grouped heads
    special = SPECIAL.get(config.model_type, {})
    return {name: value for name, value in found.items() if value != default.get(name) and name not in special}


def _size(name: str, value: int) -> int:
    if re.fullmatch(r"(.*_)?(bos|eos|pad|sep|mask|decoder_start|image|boi|eoi|audio|video)_?.*(token_id|index)", name):
        return min(value, VOCABULARY - 2)
    return next((min(value, size) for pattern, size in RULES if re.fullmatch(pattern, name)), value)


def _layers(default: dict[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
    return next((default[name] for name in names if isinstance(default.get(name), int)), 0)


def _both_kinds(values: list[Any], count: int) -> list[Any]:
    """Shorten a list with one value per layer to ``count`` values: the distinct values in order, repeated."""
    kinds = [value for i, value in enumerate(values) if value not in values[:i]]
    return copy.deepcopy((kinds * count)[: max(count, 1)])
