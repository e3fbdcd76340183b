"""Quantize a model with every setting that a target admits, export it, and write what a client must compute.

    python tests/clients/prepare.py CASE FOLDER

FOLDER gets ``model``, the exported folder, and ``expected.npz``: the weights, the logits of a prompt and 32 greedy
tokens, all computed by transformers in float32 from the weights that ``quantrature.exports.load`` reads.
"""

import itertools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import quantrature
import quantrature.demo
from quantrature.exports import load
from quantrature.models import find_linears, load_model, load_tokenizer
from quantrature.packed.gguf import bits_of

DEMO = Path(quantrature.demo.__file__).parent / "model"
PROMPT = "def close(self):\n    if self.fp is not None:\n"
TOKENS = 32

SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
SCALED = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OF_LLAMA3 = SCALED | {"original_max_position_embeddings": 32}


def mixture():
    """Return a small mixture of experts with random weights."""
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "rope_parameters": rope}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **more))


def scaled():
    """Return a small model with random weights, whose rotary embeddings are scaled."""
    return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=OF_LLAMA3))


def with_words(kind, **more):
    """Return a function that makes a small model with random weights, for the tokenizer of the demo.

    The weights are so large that some tokens are far more probable than others.
    """
    about = SMALL | {"vocab_size": 2048, "initializer_range": 0.15, "tie_word_embeddings": True} | more
    return lambda: AutoModelForCausalLM.from_config(kind(**about))


@dataclass(frozen=True)
class Case:
    """A target, a model, the settings that its matrices get in turn, and the numbers of zero points and scales.

    Attributes:
        types: types of GGUF, which matrices get in turn after the settings.
        words: whether a model that is made here has the tokenizer of the demo.
    """

    target: str
    make: object
    bits: tuple[int, ...]
    groups: tuple[int, ...] = (32, 64, 128, -1)
    symmetric: tuple[bool, ...] = (False, True)
    embedding_bits: int | None = None
    zero: str = "float"
    scale_dtype: str = "auto"
    embedding_sym: bool = False
    types: tuple[str, ...] = ()
    words: bool = False

    def entries(self):
        """Return the entries that matrices get in turn."""
        settings = itertools.product(self.bits, self.groups, self.symmetric)
        for bits, group_size, sym in settings:
            zero = "float" if sym else self.zero
            yield quantrature.PlanEntry(bits, group_size, sym=sym, zero=zero, scale_dtype=self.scale_dtype)
        for each in self.types:
            yield quantrature.PlanEntry(bits_of(each), 32, method="gguf", options={"type": each})

    def tokenizer(self):
        """Return the tokenizer; ``None`` for a model without text."""
        return load_tokenizer(DEMO) if self.make is None or self.words else None


TYPES_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
EMBEDDED = {"symmetric": (True,), "embedding_bits": 8, "embedding_sym": True, "words": True}

CASES = {
    "mlx": Case("mlx", None, (8, 7, 6, 5, 4, 3, 2, 1), embedding_bits=8),
    "mlx, experts": Case("mlx", mixture, (5,), (32,), (False,), 6),
    "mlx, scaled rotary embeddings": Case("mlx", scaled, (6,), (64,), (True,), 8, scale_dtype="bfloat16"),
    "compressed-tensors, symmetric": Case("compressed-tensors", None, (8, 7, 6, 5, 4, 3, 2), symmetric=(True,)),
    "compressed-tensors, whole zero points": Case("compressed-tensors", None, (8, 4, 2), zero="integer"),
    "compressed-tensors, bfloat16 scales": Case(
        "compressed-tensors", None, (6, 3), (64,), (True,), scale_dtype="bfloat16"
    ),
    "compressed-tensors, refit": Case("compressed-tensors", None, (4,), (32,), (False,)),
    "gguf": Case("gguf", None, (8,), (64,), (True,), types=TYPES_OF_32),
    "gguf, grids": Case("gguf", None, (5, 4)),
    "gguf, scaled rotary embeddings": Case(
        "gguf", with_words(LlamaConfig, rope_parameters=OF_LLAMA3), (8,), **EMBEDDED
    ),
    "gguf, Qwen2": Case("gguf", with_words(Qwen2Config), (8, 5), **EMBEDDED),
    "gguf, Gemma 3": Case(
        "gguf", with_words(Gemma3TextConfig, query_pre_attn_scalar=32, sliding_window=16), (8,), **EMBEDDED
    ),
    "gguf, Qwen3": Case("gguf", with_words(Qwen3Config, tie_word_embeddings=False), (8, 5), **EMBEDDED),
}


def quantized(case):
    """Return the quantized model and its tokenizer."""
    torch.manual_seed(0)
    model = load_model(DEMO) if case.make is None else case.make()
    linears = find_linears(model, embeddings=case.embedding_bits is not None)
    settings = list(case.entries())
    names = [linear.name for linear in linears if linear.in_block]
    of_table = quantrature.PlanEntry(case.embedding_bits or 16, 64, sym=case.embedding_sym)
    entries = {linear.name: of_table for linear in linears}
    for i, name in enumerate(names):
        entries[name] = settings[i * len(settings) // len(names)]
    tokenizer = case.tokenizer()
    calibration = torch.tensor(tokenizer.encode(PROMPT * 20)[:256]).view(4, 64) if case.types else None
    quantrature.quantize(model, plan=quantrature.Plan(entries), calibration=calibration)
    return model, tokenizer


def main(name, folder):
    """Write the folder."""
    logging.getLogger("quantrature").setLevel(logging.ERROR)  # vLLM fuses matrices that have different settings here
    case, folder = CASES[name], Path(folder)
    model, tokenizer = quantized(case)
    quantrature.checkpoint.save(model, folder / "quantized", tokenizer=tokenizer, overwrite=True)
    found = quantrature.export(folder / "quantized", case.target, folder / "model", allow_refit=True)
    results = ", ".join(f"{found.count(result)} {result}" for result in ("exact", "rounded", "refit"))
    print(f"{name}: {len(found.matrices)} matrices, {results}")
    dense = load(folder / "model")
    if tokenizer:
        tokenizer = load_tokenizer(folder / "model")  # transformers takes rules from the class of the model, too
    ids = torch.arange(200)[None] if tokenizer is None else torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        logits = dense(ids).logits[0]
        greedy = ids[0].tolist()
        for _ in range(TOKENS):
            greedy.append(int(dense(torch.tensor([greedy])).logits[0, -1].argmax()))
    written = greedy[-TOKENS:]
    tied = set(dense.all_tied_weights_keys)
    weights = {name: tensor.numpy() for name, tensor in dense.state_dict().items() if name not in tied}
    text = repr(tokenizer.decode(written)) if tokenizer else "no text, the model is random"
    about = {"/prompt": ids[0].numpy(), "/logits": logits.numpy(), "/greedy": np.array(written), "/text": text}
    about["/text of the prompt"] = PROMPT if tokenizer else ""
    np.savez(folder / "expected.npz", **about, **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
