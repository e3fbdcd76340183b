"""Measure perplexity and divergence of a model, quantized by several methods to several sizes, beside the package hqq.

    python -m bench.quality.sizes MODEL --calibration TEXT --text TEXT [--tokens 65536] [--output bench/results]

Rows of this package are models that :func:`quantrature.quantize` quantized. For the rows of the package ``hqq``, it
quantizes the same matrices, and their dequantized values are put into the same model. Without the package, these rows
are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quantrature as qtr
from bench.harness.heading import heading
from quantrature import Plan, evaluate, models
from quantrature.nn import QuantLinear
from quantrature.plan import PlanEntry
from quantrature.text import token_windows

GRIDS = ((4, 64), (3, 64), (2, 64))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text that the PQI plans are made from")
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--tokens", type=int, default=65536, help="number of tokens of the evaluation text")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=64, help="windows of calibration text")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the table")
    return parser.parse_args()


def by_hqq(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Quantize a matrix with the package hqq, and return the dequantized values."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight.float(), nbits=bits, group_size=group_size, axis=1, device="cpu", compute_dtype=torch.float32
    )
    image: torch.Tensor = Quantizer.dequantize(codes, meta)
    return image.reshape(weight.shape)


def main() -> None:
    options = parse_arguments()
    tokenizer = models.load_tokenizer(options.model)
    evaluation = token_windows(options.text, tokenizer, seqlen=options.seqlen, max_tokens=options.tokens)
    original = models.load_model(options.model, "float32")
    names = [linear.name for linear in models.find_linears(original)]

    rows: list[tuple[str, str, Any]] = []

    def add(name: str, bits: float, model: Any) -> None:
        found = evaluate.divergence(model, original, evaluation, seqlen=options.seqlen)
        rows.append((name, f"{bits:.3f}", found))
        print(
            f"{name}: {bits:.3f} bits, perplexity {found.model.perplexity:.4f}, divergence {found.mean:.5f}", flush=True
        )

    def add_image(name: str, bits: float, image: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        model = models.load_model(options.model, "float32")
        for linear in models.find_linears(model):
            linear.weight.copy_(image(linear.name, linear.weight))
        add(name, bits, model)

    def add_plan(name: str, plan: Plan) -> None:
        model: Any = qtr.quantize(models.load_model(options.model, "float32"), plan=plan)
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        stored = sum(layer.spec.nbytes for layer in layers)
        model.dequantize()  # the same numbers, without unpacking them in every forward pass
        add(name, 8 * stored / sum(layer.out_features * layer.in_features for layer in layers), model)

    reference = evaluate.perplexity(original, evaluation, options.seqlen)
    for bits, group_size in GRIDS:
        for method in ("rtn", "hqq"):
            entry = PlanEntry(bits, group_size, method=method)
            add_plan(f"{method}, {bits} bits, g{group_size}", Plan.uniform(names, entry))
        if importlib.util.find_spec("hqq"):
            add_image(
                f"package hqq, {bits} bits, g{group_size}",
                bits + 32 / group_size,
                lambda name, weight, b=bits, g=group_size: by_hqq(weight, b, g),
            )
    sensitivity = qtr.analyze(
        original,
        options.calibration,
        tokenizer=tokenizer,
        metrics=["pqi"],
        bits=[bits for bits, _ in GRIDS],
        group_size=GRIDS[0][1],
        method="hqq",
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        nodes=options.nodes,
        batch_size=8,
    )
    for bits, group_size in GRIDS:
        add_plan(
            f"hqq by a PQI plan, the size of {bits} bits, g{group_size}",
            qtr.allocate(sensitivity, strategy="pqi", avg_bits=bits + 32 / group_size),
        )

    lines = [
        "| method | bits per weight | perplexity | divergence (nats a token) | same best guess |",
        "|---|---|---|---|---|",
        f"| original, float32 | 32 | {reference.perplexity:.4f} | 0 | 100 % |",
        *(
            f"| {name} | {bits} | {found.model.perplexity:.4f} | {found.mean:.5f} ± {found.standard_error:.5f} "
            f"| {found.same_top1:.1%} |"
            for name, bits, found in rows
        ),
    ]
    if not importlib.util.find_spec("hqq"):
        lines.append("| package hqq | | not installed | | |")
    head = (
        f"{heading('bench.quality.sizes', torch.get_num_threads())}; "
        f"{evaluation[:, 1:].numel():,} tokens in windows of {options.seqlen}.\n"
    )
    table = "\n".join([head, *lines, ""])
    print("\n" + table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"quality-{Path(options.model).name}.md").write_text(f"# Quality\n\n{table}")


if __name__ == "__main__":
    main()
