"""Compare quality, bits and time of all methods, each alone and with ReQuant, and of llama.cpp's K-quants.

    python -m bench.quality.methods MODEL --calibration TEXT --text TEXT [--bits 2,3,4] [--methods rtn,hqq,...]
        [--work FOLDER] [--output bench/results]

Every registered method takes part. ReQuant uses the settings of arXiv 2503.01901, for the methods in that paper.
Perplexity and mean divergence from the original model are measured on the text; bits count all stored bytes. With
--work, rows are saved in that folder and not measured again. For the rows of llama.cpp, llama.cpp quantizes the same
matrices, and their dequantized values are put into the same model. Without the packages ``gguf`` and ``llama_cpp``,
these rows are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantrature as qtr
from bench.harness import ggml
from bench.harness.heading import command
from bench.harness.machine import machine
from quantrature import evaluate, models
from quantrature.methods import METHODS
from quantrature.nn import quantized_layers
from quantrature.text import token_windows

ALONE: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 128},
    "hqq": {"group_size": 128},
    "awq": {"group_size": 128},
    "gptq": {"group_size": 128},
    "squeezellm": {"group_size": -1},
    "qtip": {"group_size": -1},
}
"""Methods in the order of the table, and their grids."""

SPLIT: dict[str, dict[str, Any]] = {"squeezellm": {"outlier_fraction": 0.0045, "sensitive": 0.0005}}
"""Shares that methods keep by rules of their own, for comparison with ReQuant: the paper's."""

REQUANT: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 256, "outlier_fraction": 0.0025, "significant_fraction": 0},
    "hqq": {"group_size": 256, "outlier_fraction": 0.0025, "significant_fraction": 0},
    "awq": {"group_size": 256, "outlier_fraction": 0.0025, "significant_fraction": 0},
    "gptq": {"group_size": 256, "outlier_fraction": 0.0025, "significant_fraction": 0},
    "squeezellm": {"group_size": -1, "outlier_fraction": 0.0045, "significant_fraction": 0.0005},
    "qtip": {"group_size": -1, "outlier_fraction": 0, "significant_fraction": 0.005},
}
"""Fractions that ReQuant keeps: the paper's for awq (which rtn, hqq and gptq share), squeezellm and qtip."""

KQUANTS = {2: "q2_K", 3: "q3_K", 4: "q4_K"}


def arguments(description: str, bits: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all comparisons of methods; ``bits`` is the default of --bits."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--tokens", type=int, default=65536, help="number of tokens of the evaluation text")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=128, help="windows of calibration text")
    parser.add_argument("--bits", default=bits)
    parser.add_argument("--work", type=Path, help="folder to save rows in")
    parser.add_argument("--output", type=Path, help="folder for the table")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0], "2,3,4")
    parser.add_argument("--requant-nsamples", type=int, default=32, help="windows of calibration text for ReQuant")
    parser.add_argument("--methods", default=",".join(ALONE))
    return parser.parse_args()


class Bench:
    """A model, its texts, and the rows so far."""

    def __init__(self, module: str, options: argparse.Namespace) -> None:
        self.module, self.options = module, options
        tokenizer = models.load_tokenizer(options.model)
        self.original = models.load_model(options.model, "float32")
        self.evaluation = token_windows(options.text, tokenizer, seqlen=options.seqlen, max_tokens=options.tokens)
        self.windows = token_windows(options.calibration, tokenizer, seqlen=options.seqlen, nsamples=options.nsamples)
        self.work = None if options.work is None else options.work / "rows.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        if self.work is not None:
            self.work.parent.mkdir(parents=True, exist_ok=True)
            if self.work.exists():
                self.rows = {row["name"]: row for row in map(json.loads, self.work.read_text().splitlines())}

    def row(self, name: str, bits: int, make: Callable[[Any], tuple[float, float]]) -> None:
        """Measure a row, unless it is saved already.

        Args:
            name: name of the row.
            bits: nominal bits.
            make: function that changes a model and returns bits per weight and processor seconds.
        """
        if name in self.rows:
            return
        model = models.load_model(self.options.model, "float32")
        stored, seconds = make(model)
        found = evaluate.divergence(model, self.original, self.evaluation, seqlen=self.options.seqlen, batch_size=8)
        self.rows[name] = {
            "name": name,
            "bits": bits,
            "stored": stored,
            "perplexity": found.model.perplexity,
            "divergence": found.mean,
            "error": found.standard_error,
            "seconds": seconds,
            "machine": machine(torch.get_num_threads()),
        }
        print(json.dumps(self.rows[name]), flush=True)
        if self.work is not None:
            with self.work.open("a") as file:
                file.write(json.dumps(self.rows[name]) + "\n")

    def method(
        self, method: str, bits: int, windows: torch.Tensor, **settings: Any
    ) -> Callable[[Any], tuple[float, float]]:
        """Return a function that quantizes a model by the method alone, with these windows of calibration text."""

        def make(model: Any) -> tuple[float, float]:
            start = time.process_time()
            qtr.quantize(
                model,
                bits=bits,
                method=method,
                calibration=windows if METHODS[method].needs else None,
                nsamples=None,
                batch_size=16,
                progress=False,
                **ALONE[method],
                **settings,
            )
            return stored_bits(model), time.process_time() - start

        return make

    def requant(self, method: str, bits: int) -> Callable[[Any], tuple[float, float]]:
        """Return a function that runs ReQuant with the method."""

        def make(model: Any) -> tuple[float, float]:
            start = time.process_time()
            qtr.requant(
                model,
                self.windows[: self.options.requant_nsamples],
                bits=bits,
                method=method,
                nodes=3,
                batch_size=8,
                prove=False,
                progress=False,
                **REQUANT[method],
            )
            return stored_bits(model), time.process_time() - start

        return make

    def kquant(self, kind: str) -> Callable[[Any], tuple[float, float]]:
        """Return a function that replaces every matrix by the values that llama.cpp quantizes it to."""

        def make(model: Any) -> tuple[float, float]:
            start = time.process_time()
            image, bits = by_ggml(kind)
            for linear in models.find_linears(model):
                linear.weight.copy_(image(linear.weight))
            return bits, time.process_time() - start

        return make

    def write(
        self, title: str, name: str, first: str, about: str, rows: Iterable[Any], last: Sequence[str] = ()
    ) -> None:
        """Print a table of rows. With --output, write it to a file whose name ends with the name of the model."""
        machines = sorted({re.sub(r", \d+ threads, load average [\d.]+", "", r["machine"]) for r in self.rows.values()})
        lines = [
            f"# {title}\n",
            f"`{command(self.module)}`\n",
            f"{date.today()}, {'; '.join(machines)}; {self.evaluation[:, 1:].numel():,} evaluated tokens in windows of "
            f"{self.options.seqlen}; {about}\n",
            f"| {first} | bits per weight, stored | perplexity | divergence (nats a token) | processor seconds |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['name']} | {row['stored']:.3f} | {row['perplexity']:.3f} "
            f"| {row['divergence']:.5f} ± {row['error']:.5f} | {row['seconds']:.0f} |"
            for row in rows
        ]
        table = "\n".join([*lines, *last, ""])
        print(table)
        if self.options.output is not None:
            self.options.output.mkdir(parents=True, exist_ok=True)
            (self.options.output / f"{name}-{Path(self.options.model).name}.md").write_text(table)


def write(bench: Bench) -> None:
    """Write the table with the rows so far."""
    bench.write(
        "Host methods",
        "methods",
        "method",
        f"methods calibrated on {len(bench.windows)} windows, block by block, under ReQuant on "
        f"{bench.options.requant_nsamples}, as in the rows that say so. By bits, then by divergence; seconds are of "
        "quantizing, processor time over all threads.",
        sorted(bench.rows.values(), key=lambda row: (row["bits"], row["divergence"])),
        () if have_ggml() else ("| llama.cpp | not installed | | | |",),
    )


def stored_bits(model: Any) -> float:
    """Return the stored bits per weight, and dequantize the model."""
    layers = quantized_layers(model).values()
    stored = sum(layer.spec.nbytes for layer in layers)
    weights = sum(layer.spec.dense.numel for layer in layers)
    model.dequantize()  # the same numbers, without unpacking them in every forward pass
    return 8 * stored / weights


def have_ggml() -> bool:
    return all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))


def by_ggml(kind: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], float]:
    """Return a function that quantizes and dequantizes a matrix with llama.cpp, and the bits per weight."""
    import gguf

    number = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[number]
    quantize = ggml.quantizer(kind)

    def image(weight: torch.Tensor) -> torch.Tensor:
        x = np.ascontiguousarray(weight.float().numpy())
        out = np.empty((x.shape[0], x.shape[1] // block * size), np.uint8)
        quantize(x.ctypes.data, out.ctypes.data, *x.shape)
        return torch.from_numpy(gguf.quants.dequantize(out, number)).view_as(weight)

    return image, 8 * size / block


def main() -> None:
    options = parse_arguments()
    bench = Bench("bench.quality.methods", options)
    methods = [name for name in options.methods.split(",") if name in METHODS]
    for bits in map(int, options.bits.split(",")):
        for method in methods:
            name = f"{method}, {bits} bits, g{ALONE[method]['group_size']}"
            bench.row(name, bits, bench.method(method, bits, bench.windows))
            if METHODS[method].needs:
                few = bench.windows[: options.requant_nsamples]
                bench.row(f"{name}, {len(few)} windows", bits, bench.method(method, bits, few))
                if method in SPLIT:
                    kept = " + ".join(f"{100 * share:g}" for share in SPLIT[method].values())
                    for windows, note in ((few, f", {len(few)} windows"), (bench.windows, "")):
                        own = bench.method(method, bits, windows, **SPLIT[method])
                        bench.row(f"{name}, its own {kept} %{note}", bits, own)
        if have_ggml() and bits in KQUANTS:
            bench.row(f"llama.cpp {KQUANTS[bits].lower()}", bits, bench.kquant(KQUANTS[bits]))
    for bits in map(int, options.bits.split(",")):
        for method in methods:
            kept = REQUANT[method]
            shares = f"{100 * kept['outlier_fraction']:g} + {100 * kept['significant_fraction']:g} %"
            name = f"{method}, {bits} bits, g{kept['group_size']}, ReQuant {shares}"
            bench.row(name, bits, bench.requant(method, bits))
    write(bench)


if __name__ == "__main__":
    main()
