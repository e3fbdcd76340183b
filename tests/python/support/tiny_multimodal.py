"""Make models of a few thousand random weights that read images and text, or have an encoder and a decoder."""

from typing import Any

import torch
import transformers

from tiny_models import VOCABULARY

SPECIAL = VOCABULARY + 6  # room for the tokens that stand for images

_TEXT = {
    "vocab_size": SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 32,
}
_QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_IMAGES = {
    "image_token_id": VOCABULARY,
    "video_token_id": VOCABULARY + 1,
    "vision_start_token_id": VOCABULARY + 2,
    "vision_end_token_id": VOCABULARY + 3,
}
_HALVES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
    "decoder_start_token_id": 257,
}

LANGUAGE = {
    "llava": "model.language_model.",
    "qwen2.5-vl": "model.language_model.",
    "qwen3-vl": "model.language_model.",
    "gemma3": "model.language_model.",
    "paligemma": "model.language_model.",
}
"""Prefix of the names of the language model's modules, in each model that reads images."""

ENCODER_DECODERS = ("t5", "bart", "marian")


def _config(name: str) -> Any:
    t = transformers
    if name == "llava":
        return t.LlavaConfig(
            text_config=t.LlamaConfig(**_TEXT), vision_config=t.CLIPVisionConfig(**_TOWER), image_token_id=VOCABULARY
        )
    if name == "qwen2.5-vl":
        tower = {**_QWEN_TOWER, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
        return t.Qwen2_5_VLConfig(text_config={**_TEXT, **_ROTARY}, vision_config=tower, **_IMAGES)
    if name == "qwen3-vl":
        tower = {**_QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}
        return t.Qwen3VLConfig(text_config={**_TEXT, **_ROTARY}, vision_config=tower, **_IMAGES)
    if name == "gemma3":
        return t.Gemma3Config(
            text_config={**_TEXT, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
            vision_config=_TOWER,
            mm_tokens_per_image=1,
            boi_token_index=VOCABULARY + 2,
            eoi_token_index=VOCABULARY + 3,
            image_token_index=VOCABULARY,
        )
    if name == "paligemma":
        return t.PaliGemmaConfig(
            text_config={**_TEXT, "model_type": "gemma"},
            vision_config={**_TOWER, "model_type": "siglip_vision_model"},
            image_token_index=VOCABULARY,
            projection_dim=32,
        )
    if name == "t5":
        return t.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    if name == "bart":
        return t.BartConfig(**_HALVES)
    return t.MarianConfig(**_HALVES)


CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "marian": "MarianMTModel",
}


def tiny_multimodal(name: str, seed: int = 0) -> Any:
    """Return a new model with random weights."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[name])(_config(name)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # larger weights, so that attention and decoders affect the output
        for name, parameter in model.named_parameters():
            # Marian computes its position embeddings itself, and ignores those of a checkpoint.
            if parameter.ndim > 1 and "embed_positions" not in name:
                parameter.normal_(0, 0.3, generator=generator)
    return model
