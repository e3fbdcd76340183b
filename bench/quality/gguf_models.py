"""Divergence of models in GGUF types: quantized by llama.cpp's quantizer, by the method gguf, and by a plan.

    python -m bench.quality.gguf_models MODEL --calibration TEXT --text TEXT [--nsamples 32] [--seqlen 256]
        [--tokens 16384] [--bits 2,3,4,5,6] [--windows 8] [--output bench/results]

All use the same text for importance. For each number of bits, every matrix gets the type that the method gguf would
choose for it. The plan is never larger. llama.cpp's quantizer is ggml_quantize_chunk of the package xllamacpp, with the
mean squares of the inputs as importance matrix. The divergence (KL divergence from the predictions of the original
model) is measured on the other text, in nats per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import quantrature as qtr
from bench.harness.heading import heading
from bench.quality.gguf_fit import ggml_quantizer
from quantrature import evaluate, models, ops
from quantrature.methods import Statistics
from quantrature.methods.gguf import type_for
from quantrature.plan import Plan, PlanEntry
from quantrature.quantization import collect
from quantrature.text import token_windows


def uniform(names: list[str], bits: int) -> Plan:
    """The plan in which every matrix has the same number of bits."""
    return Plan.uniform(names, PlanEntry(bits, 32, method="gguf"))


def by_ggml(model: torch.nn.Module, plan: Plan, importance: dict[str, Statistics]) -> torch.nn.Module:
    """Replace the weights by those of llama.cpp's quantizer."""
    quantize = ggml_quantizer()
    linears = models.find_linears(model, experts=False)
    for name, entry in plan:
        weight = linears.find(name).weight.detach().float().contiguous()
        hessian = importance[name].hessian
        assert hessian is not None
        about = ops.GGUF_TYPES[type_for(entry, weight.shape[1])]
        data = quantize(weight.numpy(), about, hessian.diagonal().float().contiguous().numpy())
        linears.find(name).weight.data.copy_(torch.from_numpy(ops.gguf_dequantize(data, about.name, weight.shape[1])))
    return model


def main() -> None:
    """Quantize, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=8, help="windows to integrate on; 0 makes no plans")
    parser.add_argument("--bits", default="2,3,4,5,6")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    original = models.load_model(options.model, "float32")
    tokenizer = models.load_tokenizer(options.model)
    cut = {"tokenizer": tokenizer, "seqlen": options.seqlen}
    windows = token_windows(options.calibration, nsamples=options.nsamples, **cut)
    text = token_windows(options.text, max_tokens=options.tokens, **cut)
    linears = models.find_linears(original, experts=False)
    names = [linear.name for linear in linears]
    importance = collect(original, linears, dict.fromkeys(names, ("hessian",)), windows)

    def fresh() -> torch.nn.Module:
        return models.load_model(options.model, "float32")

    def planned(bits: int) -> Plan:
        size = sum(entry_bytes(entry, name) for name, entry in uniform(names, bits))
        return qtr.allocate(found, target_bytes=size)

    def entry_bytes(entry: PlanEntry, name: str) -> int:
        return qtr.plan.stored_bytes(linears.find(name).out_features, linears.find(name).in_features, entry)

    chosen = [int(bits) for bits in options.bits.split(",")]
    ways: dict[str, Callable[[int], tuple[Plan, torch.nn.Module]]] = {
        "llama.cpp": lambda bits: (uniform(names, bits), by_ggml(fresh(), uniform(names, bits), importance)),
        "gguf": lambda bits: _quantized(fresh(), uniform(names, bits), windows),
    }
    if options.windows:
        found = qtr.analyze(
            fresh(),
            windows[: options.windows],
            objective="kl",
            metrics=["pqi"],
            bits=[4, 3],
            group_size=32,
            method="gguf",
            statistics=importance,
            nodes=3,
        )
        ways["gguf, PQI plan"] = lambda bits: _quantized(fresh(), planned(bits), windows)
    lines = ["| bits | quantized by | bits per weight | divergence | perplexity |", "|---|---|---|---|---|"]
    weights = sum(linear.numel for linear in linears)
    for bits in chosen:
        for way, quantize in ways.items():
            plan, model = quantize(bits)
            measured = evaluate.divergence(model, original, text, seqlen=options.seqlen)
            size = 8 * sum(entry_bytes(entry, name) for name, entry in plan) / weights
            lines.append(
                f"| {bits} | {way} | {size:.3f} | {measured.mean:.4f} ± {measured.standard_error:.4f} | "
                f"{measured.model.perplexity:.3f} |"
            )
            print(lines[-1], flush=True)
    name = Path(options.model).name
    head = [
        f"# GGUF types on {name}",
        "",
        heading("bench.quality.gguf_models", torch.get_num_threads()),
        "",
        f"{len(windows)} windows of {options.seqlen} tokens for importance, {options.windows} of them for the plans; "
        f"{text.numel():,} tokens of other text to measure on.",
        "",
    ]
    if options.output is not None:
        (options.output / f"gguf-{name}.md").write_text("\n".join([*head, *lines, ""]))


def _quantized(model: torch.nn.Module, plan: Plan, windows: torch.Tensor) -> tuple[Plan, torch.nn.Module]:
    return plan, qtr.quantize(model, plan=plan, calibration=windows, nsamples=None)


if __name__ == "__main__":
    main()
