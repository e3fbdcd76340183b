"""Measure trellis codes on normally distributed numbers: squared error, and the time to find and decode the codes.

    python -m bench.ops.trellis [--sequences 400] [--output bench/results]

Errors are those of sequences of 256 numbers with unit variance, at the scale that the method qtip uses for each code.
Times are those of one thread: the time per weight to find the codes of 16 tiles, and the time to multiply a matrix of
2048 x 2048 by a vector, beside the float32 product of torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantrature as qtr
from bench.harness.heading import heading
from quantrature import ops
from quantrature.methods.qtip import RATIOS
from quantrature.ops import Trellis

TRELLISES = [
    *(Trellis(bits, 16, code) for bits in (1, 2, 3, 4) for code in ("1mad", "3inst", "hyb")),  # type: ignore[arg-type]
    *(Trellis(2, state_bits, code) for state_bits in (14, 12, 10) for code in ("1mad", "3inst", "hyb")),  # type: ignore[arg-type]
]
LLOYD_MAX = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}
SIDE, PANEL, ROUNDS = 2048, 16, 5


def seconds(call: Callable[[], Any]) -> float:
    """Return the median seconds of some calls, after a first call that is not counted."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(trellis: Trellis, x: np.ndarray, by_torch: float) -> str:
    """Return a row of the table."""
    scale = 1 / RATIOS[trellis.code, trellis.bits]
    read = ops.trellis_dequantize(ops.trellis_quantize(x, trellis, scale), x.shape[1], trellis, scale)
    errors = ((x - read).astype(np.float64) ** 2).mean(axis=1)
    qtr.set_num_threads(1)
    finding = seconds(lambda: ops.trellis_quantize(x[:PANEL], trellis, scale)) / (PANEL * 256)
    codes = np.random.default_rng(0).integers(0, 256, (SIDE * SIDE // 256, 32 * trellis.bits), dtype=np.uint8)
    vector = x.reshape(-1)[:SIDE]
    product = seconds(lambda: ops.trellis_matvec(codes, (SIDE, SIDE), vector, trellis, scale))
    qtr.set_num_threads(2)
    return (
        f"| {trellis.code} | {trellis.bits} | {trellis.state_bits} | {errors.mean():.5f} ± "
        f"{errors.std() / len(errors) ** 0.5:.5f} | {LLOYD_MAX[trellis.bits]:.5f} | {4.0**-trellis.bits:.5f} | "
        f"{finding * 1e6:.2f} | {product * 1e3:.2f} | {by_torch / product:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--output", type=Path, help="folder for the table")
    options = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((options.sequences, 256)).astype(np.float32)
    x /= np.sqrt((x.astype(np.float64) ** 2).mean())
    torch.set_num_threads(1)
    dense, vector = torch.randn(SIDE, SIDE), torch.randn(SIDE)
    by_torch = seconds(lambda: dense @ vector)
    lines = [
        "| code | bits | state bits | squared error | Lloyd-Max | bound | us to find a weight | ms a product | "
        "torch's time over ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for trellis in TRELLISES:
        lines.append(row(trellis, x, by_torch))
        print(lines[-1], flush=True)
    head = f"{heading('bench.ops.trellis', 1)}; {len(x)} sequences, torch takes {by_torch * 1e3:.2f} ms a product.\n"
    if options.output:
        (options.output / "trellis.md").write_text("\n".join([head, *lines]) + "\n")


if __name__ == "__main__":
    main()
