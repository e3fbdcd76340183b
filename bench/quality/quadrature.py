"""Compare quadrature rules: how well each predicts the loss change of quantization, and its number of gradients.

    python -m bench.quality.quadrature MODEL --calibration TEXT [--nsamples 16] [--bits 2,3,4] [--output bench/results]

All matrices move together, from the original weights w to the weights w~ that are rounded to nearest. A rule predicts
the weighted sum of the slope dF/dt at its nodes. The slope at a node is computed as an integral with this node alone.
Nodes that several rules share (i/32, for all rules but Gauss) are evaluated once. The true value is F(w~) - F(w),
measured on the same text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench.harness.heading import heading
from quantrature import analysis, models
from quantrature.analysis.integral import integrate
from quantrature.analysis.path import Moved, WeightPath
from quantrature.analysis.proving import Prover
from quantrature.methods import image_of
from quantrature.models.running import not_training
from quantrature.plan import PlanEntry
from quantrature.text import token_windows

RULES = (
    *(("gauss", nodes) for nodes in (1, 2, 3, 4, 5)),
    *(("midpoint", nodes) for nodes in (4, 8, 16)),
    *(("trapezoid", intervals + 1) for intervals in (4, 8, 16, 32)),
    *(("paper", intervals + 1) for intervals in (4, 8, 16, 32)),
    *((rule, nodes) for rule in ("left", "right") for nodes in (4, 8, 16, 32)),
)
"""Rules and nodes; 32 intervals have 33 nodes where both ends belong to the rule."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--output", type=Path, help="folder for the table")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    tokenizer = models.load_tokenizer(options.model)
    model = models.load_model(options.model, "float32")
    linears = models.find_linears(model)
    windows = token_windows(options.calibration, tokenizer, seqlen=options.seqlen, nsamples=options.nsamples)
    prover = Prover(model, windows, 8)
    settings = [int(bits) for bits in options.bits.split(",")]
    measured: dict[int, float] = {}
    slopes: dict[tuple[int, float], float] = {}
    seconds = []
    with not_training(model):
        for bits in settings:
            entry = PlanEntry(bits, options.group_size, method=options.method)
            moved = [Moved(linear, image_of(linear.name, linear.weight, entry)) for linear in linears]
            with WeightPath(model, moved) as path:
                measured[bits] = prover.measure(path)
                for t in sorted({t for rule, nodes in RULES for t, _ in analysis.quadrature(rule, nodes)}):
                    start = time.perf_counter()
                    found = integrate(path, windows, [(t, 1.0)], batch_size=8)
                    seconds.append(time.perf_counter() - start)
                    slopes[bits, t] = sum(found.signed.values())
                    print(f"{bits} bits, t={t:.4f}: slope {slopes[bits, t]:+.6f}, {seconds[-1]:.1f} s", flush=True)

    def cell(rule: str, nodes: int, bits: int) -> str:
        predicted = sum(weight * slopes[bits, t] for t, weight in analysis.quadrature(rule, nodes))
        return f"{abs(predicted - measured[bits]) / abs(measured[bits]):.1e}"

    lines = [
        "| rule | gradient evaluations | " + " | ".join(f"{bits} bits" for bits in settings) + " |",
        "|---|---|" + "---|" * len(settings),
        *(
            f"| {rule} | {nodes} | " + " | ".join(cell(rule, nodes, bits) for bits in settings) + " |"
            for rule, nodes in RULES
        ),
        "| measured loss change, nats a token | | " + " | ".join(f"{measured[bits]:.6f}" for bits in settings) + " |",
    ]
    head = (
        f"{heading('bench.quality.quadrature', torch.get_num_threads())}; "
        f"{len(windows)} windows of {windows.shape[1]} tokens, {options.method}, groups of {options.group_size}, "
        f"float32. Relative error of the summed prediction of the loss change. "
        f"A gradient evaluation of all windows took {sorted(seconds)[len(seconds) // 2]:.1f} s (median).\n"
    )
    table = "\n".join([head, *lines, ""])
    print("\n" + table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"quadrature-{Path(options.model).name}.md").write_text(f"# Quadrature\n\n{table}")


if __name__ == "__main__":
    main()
