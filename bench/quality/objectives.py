"""Compare plans that minimize the loss with plans that minimize the KL divergence, on another text.

    python -m bench.quality.objectives MODEL --calibration TEXT --text TEXT [--nsamples 32] [--seqlen 256]
        [--tokens 32768] [--bits 2.6,2.75,3.25,3.75,4.25] [--output bench/results]

For each objective, the model is analyzed on the calibration text, with rtn at 2, 3 and 4 bits in groups of 64, and a
plan is made for each budget. The divergence (KL divergence from the predictions of the original model) and the loss
change are measured on the other text, in nats per token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import quantrature as qtr
from bench.harness.heading import heading
from quantrature import evaluate, models
from quantrature.analysis import OBJECTIVES
from quantrature.text import token_windows


def main() -> None:
    """Analyze, plan, quantize, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--bits", default="2.6,2.75,3.25,3.75,4.25")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    original = models.load_model(options.model, "float32")
    tokenizer = models.load_tokenizer(options.model)
    cut = {"tokenizer": tokenizer, "seqlen": options.seqlen}
    text = token_windows(options.text, **cut, max_tokens=options.tokens)
    lines = ["| objective | bits | predicted | divergence | change of the loss |", "|---|---|---|---|---|"]
    seconds = {}
    for objective in OBJECTIVES:
        start = time.perf_counter()
        found = qtr.analyze(
            models.load_model(options.model, "float32"),
            options.calibration,
            objective=objective,
            metrics=["pqi"],
            bits=[2, 3, 4],
            nsamples=options.nsamples,
            nodes=options.nodes,
            **cut,
        )
        seconds[objective] = time.perf_counter() - start
        for bits in map(float, options.bits.split(",")):
            plan = qtr.allocate(found, avg_bits=bits)
            quantized = qtr.quantize(models.load_model(options.model, "float32"), plan=plan)
            measured = evaluate.divergence(quantized, original, text, seqlen=options.seqlen)
            lines.append(
                f"| {objective} | {bits:g} | {plan.predicted_loss_change:.4f} | {measured.mean:.4f} ± "
                f"{measured.standard_error:.4f} | {measured.loss_change:+.4f} ± "
                f"{measured.loss_change_standard_error:.4f} |"
            )
            print(lines[-1], flush=True)
    name = Path(options.model).name
    took = ", ".join(f"{objective} {spent:.0f} s" for objective, spent in seconds.items())
    head = [
        f"# Plans by the loss and by the divergence, {name}",
        "",
        f"{heading('bench.quality.objectives', torch.get_num_threads())}. Analyses took {took}.",
        "Method rtn. Nats per token. The prediction is of the objective on the calibration text; divergence and loss",
        "are measured on the other text.",
        "",
    ]
    table = "\n".join([*head, *lines, ""])
    print(table)
    if options.output is not None:
        (options.output / f"objectives-{name}.md").write_text(table)


if __name__ == "__main__":
    main()
