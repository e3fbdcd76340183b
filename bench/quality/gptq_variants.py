"""Compare variants of GPTQ by quality: order of columns, static groups or not, and calibration text.

    python -m bench.quality.gptq_variants MODEL --calibration TEXT --text TEXT [--bits 3,2,4] [--work FOLDER]
        [--output FOLDER]

Each row is a model, quantized block by block: perplexity, and mean divergence from the original model, on the text. At
the first number of bits, there are also rows with each quarter of the calibration text.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import quantrature as qtr
from bench.quality.methods import Bench, arguments, stored_bits
from quantrature import ops
from quantrature.methods import METHODS, Method, Statistics
from quantrature.models import find_linears
from quantrature.packed import QuantizedMatrix
from quantrature.plan import PlanEntry
from quantrature.quantization import calibrate

GROUP_SIZE = 128
QUARTERS = 4


def by_gptq(bits: int, windows: torch.Tensor, **options: Any) -> Callable[[Any], tuple[float, float]]:
    """Return a function that quantizes a model by GPTQ, and returns bits per weight and processor seconds."""

    def make(model: Any) -> tuple[float, float]:
        start = time.process_time()
        qtr.quantize(
            model,
            bits=bits,
            group_size=GROUP_SIZE,
            method="gptq",
            calibration=windows,
            nsamples=None,
            batch_size=16,
            progress=False,
            **options,
        )
        return stored_bits(model), time.process_time() - start

    return make


@dataclass(frozen=True)
class Reordered(QuantizedMatrix):
    """A quantized matrix with reordered columns. To store it, one would also store the group number of each column."""

    order: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> torch.Tensor:
        """Return the matrix with its columns in the original order."""
        found = super().dequantize(dtype, rows)
        return torch.empty_like(found).index_copy_(1, self.order, found)


def across_columns(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize by GPTQ with columns sorted by descending diagonal; groups are consecutive columns in this order."""
    assert statistics.hessian is not None
    lower = statistics.hessian.tril()
    hessian = lower + lower.tril(-1).mT
    order = hessian.diagonal().argsort(descending=True, stable=True)
    dense, _ = ops.gptq(
        weight[:, order].contiguous(),
        hessian[order][:, order].contiguous(),
        bits=entry.bits,
        group_size=entry.group_size,
        damp_percent=0.01,
        desc_act=False,
    )
    return Reordered(dense, order=order)


def by_gptq_across_columns(bits: int, windows: torch.Tensor) -> Callable[[Any], tuple[float, float]]:
    """Return a function as :func:`by_gptq`, for :func:`across_columns`; 32 bits per column count for group numbers."""

    def make(model: Any) -> tuple[float, float]:
        start = time.process_time()
        METHODS["across"] = Method("groups across columns", "across", across_columns, needs=("hessian",))
        linears = find_linears(model)
        entry = PlanEntry(bits, GROUP_SIZE, method="across")
        found = calibrate(model, linears, {linear.name: entry for linear in linears}, windows, batch_size=16)
        with torch.no_grad():
            for linear in linears:
                linear.weight.copy_(found.matrices[linear.name].dequantize())
        stored = sum(found.matrices[linear.name].nbytes + 4 * linear.in_features for linear in linears)
        return 8 * stored / sum(linear.numel for linear in linears), time.process_time() - start

    return make


def main() -> None:
    options = arguments(__doc__.splitlines()[0], "3,2").parse_args()
    bench = Bench("bench.quality.gptq_variants", options)
    quarter = len(bench.windows) // QUARTERS
    for bits in map(int, options.bits.split(",")):
        for static, desc in itertools.product((True, False), repeat=2):
            name = f"{bits} bits, desc_act {desc}, static_groups {static}".lower()
            bench.row(name, bits, by_gptq(bits, bench.windows, desc_act=desc, static_groups=static))
        name = f"{bits} bits, desc_act true, static_groups false, groups across columns"
        bench.row(name, bits, by_gptq_across_columns(bits, bench.windows))
    bits = int(options.bits.split(",")[0])
    for i in range(QUARTERS):
        windows = bench.windows[i * quarter : (i + 1) * quarter]
        name = f"{bits} bits, windows {i * quarter} to {(i + 1) * quarter - 1} alone"
        bench.row(name, bits, by_gptq(bits, windows))
    about = (
        f"groups of {GROUP_SIZE}; {len(bench.windows)} calibration windows where no others are named, and desc_act and "
        "static_groups likewise."
    )
    rows = sorted(bench.rows.values(), key=lambda row: (row["bits"], row["name"]))
    bench.write("Variants of GPTQ", "gptq-variants", "variant", about, rows)


if __name__ == "__main__":
    main()
