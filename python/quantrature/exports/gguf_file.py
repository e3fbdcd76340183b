"""GGUF files of whole models: names of tensors, order of rows and metadata, for each architecture.

llama.cpp has names of its own for tensors. In its architecture llama, rotary embeddings pair neighbouring dimensions of
a head, where transformers pairs its two halves. The rows of q_proj and k_proj are therefore stored in another order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .._C import InvalidArgumentError, QuantratureError
from ..ops import GGUF_TYPES, gguf_dequantize
from .gguf_tokenizer import GgufTokenizer
from .target import Content, Weights

if TYPE_CHECKING:
    from gguf import GGUFWriter

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
"""Names in checkpoints of transformers to names in GGUF files, outside the blocks."""

IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

FILE_TYPES = {
    **{"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25},
    **{"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18},
}
"""Types to the number by which a file says that most of its matrices have the type."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: its name in GGUF files.
        in_block: names in checkpoints to names in GGUF files, inside a block.
        halves: whether heads are rotated in neighbouring pairs, so that rows of q_proj and k_proj are reordered.
        norm_offset: what is added to the weights of norms.
        activation: names of the activation function.
        windows: whether all layers but every sixth have a sliding window.
    """

    name: str
    in_block: Mapping[str, str]
    halves: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, ...] = ("silu", "swish")
    windows: bool = False

    def to_gguf(self, name: str) -> str:
        """Return the name of a tensor in GGUF files.

        Raises:
            InvalidArgumentError: for a tensor that the architecture does not have.
        """
        module, _, part = name.rpartition(".")
        found = _BLOCK.fullmatch(module)
        if part in ("weight", "bias"):
            if found and found[2] in self.in_block:
                return f"blk.{found[1]}.{self.in_block[found[2]]}.{part}"
            if module in OUTSIDE:
                return f"{OUTSIDE[module]}.{part}"
        raise InvalidArgumentError(f"[export] gguf has no place for {name} in a model of the architecture {self.name}")

    def from_gguf(self, name: str) -> str:
        """Return the name of a tensor in checkpoints.

        Raises:
            QuantratureError: for a tensor that the architecture does not have.
        """
        module, _, part = name.rpartition(".")
        found = _GGUF_BLOCK.fullmatch(module)
        of_block = {theirs: ours for ours, theirs in self.in_block.items()}
        outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
        if found and found[2] in of_block:
            return f"model.layers.{found[1]}.{of_block[found[2]]}.{part}"
        if module in outside:
            return f"{outside[module]}.{part}"
        raise QuantratureError(f"[load] tensor {name} is unknown in a model of the architecture {self.name}")

    def is_norm(self, name: str) -> bool:
        """Whether a tensor, by its name in GGUF files, is the weight of a norm."""
        return name.endswith("norm.weight")

    def order(self, name: str, rows: int, heads: int, kv_heads: int) -> npt.NDArray[np.int64] | None:
        """Return the rows of a tensor in the order of GGUF files, by its name there; ``None`` if they stay in place."""
        count = heads if ".attn_q." in name else kv_heads if ".attn_k." in name else 0
        if not self.halves or not count:
            return None
        return np.arange(rows).reshape(count, 2, -1).swapaxes(1, 2).ravel()


_LLAMA = Architecture("llama", IN_BLOCK, halves=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", IN_BLOCK),
    "qwen3": Architecture("qwen3", {**IN_BLOCK, **HEAD_NORMS}),
    "gemma3_text": Architecture(
        "gemma3",
        {**IN_BLOCK, **HEAD_NORMS, **FOUR_NORMS},
        norm_offset=1.0,
        activation=("gelu_pytorch_tanh",),
        windows=True,
    ),
}
"""``model_type`` in config.json to the architecture."""


def check_model(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that llama.cpp has the model.

    Args:
        config: content of config.json.
        names: names of all tensors.

    Raises:
        InvalidArgumentError: for an architecture, a setting or a tensor that it does not have; the message names it.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InvalidArgumentError(f"[export] gguf knows the architectures {', '.join(ARCHITECTURES)}: got {kind}")
    about = ARCHITECTURES[kind]
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation not in about.activation:
        raise InvalidArgumentError(f"[export] gguf needs hidden_act {about.activation[0]} for {kind}: got {activation}")
    if config.get("use_sliding_window"):
        raise InvalidArgumentError(f"[export] gguf has no sliding window for {kind}: use_sliding_window must be false")
    _rotation(config)
    if about.windows:
        _check_windows(config)
    for name in names:
        about.to_gguf(name)


def _check_windows(config: Mapping[str, Any]) -> None:
    """Check what llama.cpp takes for granted in a model with sliding windows, and does not read from the file."""
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    local = {"rope_type": "default", "rope_theta": 10000.0}
    granted = {
        "query_pre_attn_scalar": (config.get("query_pre_attn_scalar"), _head_dim(config)),
        "layer_types": (config.get("layer_types"), kinds),
        "rope_parameters of sliding_attention": (config.get("rope_parameters", {}).get("sliding_attention"), local),
        "attn_logit_softcapping": (config.get("attn_logit_softcapping"), None),
        "final_logit_softcapping": (config.get("final_logit_softcapping"), None),
        "use_bidirectional_attention": (config.get("use_bidirectional_attention") or False, False),
    }
    for name, (found, wanted) in granted.items():
        if found != wanted:
            raise InvalidArgumentError(
                f"[export] gguf needs {name} {wanted} for {config['model_type']}, as in llama.cpp: got {found}"
            )


def _rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of rotary embeddings, those of layers with full attention."""
    given = config.get("rope_parameters") or {}
    given = given.get("full_attention", given)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, **given}
    kind = found["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise InvalidArgumentError(
            f"[export] gguf knows the rope_type default, linear, yarn and llama3: got {kind} in config.json"
        )
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise InvalidArgumentError("[export] gguf needs rotary embeddings of whole heads: got a partial_rotary_factor")
    return found


def _head_dim(config: Mapping[str, Any]) -> int:
    given = config.get("head_dim")
    return int(given or config["hidden_size"] // config["num_attention_heads"])


def _llama3_factors(rotation: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """Return what each frequency is divided by in the scaling of Llama 3.1."""
    frequencies = rotation["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = rotation["low_freq_factor"], rotation["high_freq_factor"]
    turns = rotation["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / (kept + (1 - kept) / rotation["factor"])).astype(np.float32)
    return factors


def _add_metadata(writer: GGUFWriter, config: Mapping[str, Any], types: Counter[str]) -> None:
    about, head_dim, rotation = ARCHITECTURES[config["model_type"]], _head_dim(config), _rotation(config)
    name = str(config.get("_name_or_path") or config.get("name_or_path") or "").rstrip("/").rpartition("/")[2]
    writer.add_name(name or f"{about.name} model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rotation["rope_theta"])
    if about.windows:
        writer.add_sliding_window(config["sliding_window"])
    if rotation["rope_type"] in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(rotation["rope_type"]))
        writer.add_rope_scaling_factor(rotation["factor"])
        original = rotation.get("original_max_position_embeddings")
        if original:
            writer.add_rope_scaling_orig_ctx_len(original)
    elif rotation["rope_type"] == "llama3":
        writer.add_tensor(_ROPE_FACTORS, _llama3_factors(rotation, head_dim))
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[types.most_common(1)[0][0]])


def _dense(tensor: torch.Tensor) -> tuple[npt.NDArray[Any], str]:
    """Return a dense matrix, and the narrowest type of GGUF that has its values."""
    if tensor.dtype != torch.bfloat16 and torch.equal(tensor.half().float(), tensor.float()):
        return tensor.half().numpy(), "F16"
    if torch.equal(tensor.bfloat16().float(), tensor.float()):
        return tensor.bfloat16().view(torch.uint8).numpy(), "BF16"
    return tensor.float().numpy(), "F32"


def write_file(path: Path, content: Content, tokenizer: GgufTokenizer) -> None:
    """Write a model, of which :func:`check_model` has found nothing wrong."""
    import gguf

    config = content.config
    about = ARCHITECTURES[config["model_type"]]
    heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, about.name)
    _add_metadata(writer, config, Counter(setting.form for setting in content.settings.values()))
    tokenizer.add_to(writer)

    def add(name: str, data: npt.NDArray[Any], type: str) -> None:
        order = about.order(name, len(data), *heads)
        data = np.ascontiguousarray(data if order is None else data[order])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type])

    for name, parts in content.encoded.items():
        add(about.to_gguf(f"{name}.weight"), parts["weight"].numpy(), content.settings[name].form)
    for name, tensor in content.tensors.items():
        theirs, tensor = about.to_gguf(name), tensor.detach().cpu().contiguous()
        if about.is_norm(theirs):
            add(theirs, (tensor.float() + about.norm_offset).numpy(), "F32")
        elif tensor.ndim == 1:
            add(theirs, tensor.float().numpy(), "F32")
        else:
            add(theirs, *_dense(tensor))
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_file(path: Path, dtype: torch.dtype) -> Weights:
    """Read the weights of a model.

    Args:
        path: the file.
        dtype: dtype of the model, in which dense tensors are returned if it has their values.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        if field is None:
            raise KeyError(key)
        return field.contents()

    name = value("general.architecture")
    about = next((each for each in ARCHITECTURES.values() if each.name == name), None)
    if about is None:
        raise QuantratureError(f"[load] {path} is of the architecture {name}, which is not known")
    heads = value(f"{name}.attention.head_count"), value(f"{name}.attention.head_count_kv")
    found = Weights()
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        data = np.array(tensor.data)
        order = about.order(tensor.name, len(data), *heads)
        if order is not None:
            data = data[np.argsort(order)]
        ours, type = about.from_gguf(tensor.name), tensor.tensor_type.name
        if type in GGUF_TYPES:
            found.quantized[ours] = dequantized(torch.from_numpy(data), type)
        else:
            offset = about.norm_offset if about.is_norm(tensor.name) else 0.0
            found.others[ours] = _restored(_values(data, type), offset, dtype)
    return found


def dequantized(data: torch.Tensor, type: str) -> torch.Tensor:
    """Return the values of blocks, float32."""
    about = GGUF_TYPES[type]
    found: torch.Tensor = gguf_dequantize(data, type, data.shape[1] // about.block_bytes * about.block_size)
    return found


def _values(data: npt.NDArray[Any], type: str) -> torch.Tensor:
    if type == "BF16":
        return torch.from_numpy(data.view(np.uint8)).view(torch.bfloat16).float()
    if type not in ("F16", "F32"):
        raise QuantratureError(f"[load] the type {type} is not known")
    return torch.from_numpy(data).float()


def _restored(stored: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    """Return a dense tensor without the offset of norms, in the dtype of the model if it has the values."""
    values = stored - offset
    if offset:
        # A sum with 1 is rounded. Where a number of bfloat16 gives the same sum, take that number.
        narrow = values.bfloat16().float()
        values = torch.where(narrow + offset == stored, narrow, values)
    found = values.to(dtype)
    return found if torch.equal(found.float(), values) else values
