"""What ReQuant gains: the ablation of arXiv 2503.01901 (its Table 8), and other uses of the same bytes.

    python bench/requant.py MODEL --calibration TEXT --text TEXT [--bits 2,3,4] [--hosts rtn,hqq]
        [--nsamples 32] [--tokens 32768] [--output bench/results]

For each host and number of bits: nothing kept; outliers alone; significant weights alone; both; as many random
positions. At the bytes of "both", as stored: the host with a smaller group size; and as many weights kept by other
rankings over the whole model (magnitude, squared gradient, first order; all left out of the fit of the grid). Loss
changes are nats a token on the calibration text, perplexity and divergence from the original are on the other one.
Every row is written as it comes, so that a run that was stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peers import machine

import quantrature as qtr
from quantrature import evaluate, models, ops
from quantrature.analysis.path import Moved, WeightPath
from quantrature.analysis.proving import Prover
from quantrature.evaluate._forward import not_training
from quantrature.methods import quantize_matrix, solver_of
from quantrature.nn import quantized_layers
from quantrature.plan import PlanEntry
from quantrature.requantization._requant import greedy_counts
from quantrature.requantization.matrices import narrowest
from quantrature.requantization.outliers import split
from quantrature.storage import QuantizedMatrix
from quantrature.text import token_windows

SMALLER = {64: (32, 56, 48, 40)}
"""Group sizes tried in place of 64, of which the one that comes closest in bytes without exceeding them is shown."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--tokens", type=int, default=32768, help="of the evaluation text")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--hosts", default="rtn,hqq")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--outliers", type=float, default=0.45, help="percent")
    parser.add_argument("--significant", type=float, default=0.05, help="percent")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the table")
    return parser.parse_args()


class Bench:
    """One model, its texts, and the table so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = models.load_tokenizer(options.model)
        self.windows = token_windows(
            options.calibration, self.tokenizer, seqlen=options.seqlen, nsamples=options.nsamples
        )
        self.evaluation = token_windows(options.text, self.tokenizer, seqlen=options.seqlen, max_tokens=options.tokens)
        self.original = models.load_model(options.model, "float32")
        self.linears = models.find_linears(self.original)
        self.total = sum(linear.numel for linear in self.linears)
        self.prover = Prover(self.original, self.windows, 8)
        self.lines: list[str] = []
        self.notes: list[str] = []

    def add(
        self,
        name: str,
        stored: Mapping[str, QuantizedMatrix],
        predicted: float | None = None,
        measured: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Evaluate stored forms in the place of the matrices, and write a row."""
        moved = [Moved(linear, lambda m=stored[linear.name]: m.dequantize("float32")) for linear in self.linears]
        with not_training(self.original):
            if measured is None:
                with WeightPath(self.original, moved) as path:
                    measured = self.prover.measure(path)
            model = models.load_model(self.options.model, "float32")
            for linear in models.find_linears(model):
                linear.weight.copy_(stored[linear.name].dequantize("float32"))
        found = evaluate.divergence(model, self.original, self.evaluation, seqlen=self.options.seqlen)
        bits = 8 * sum(matrix.nbytes for matrix in stored.values()) / self.total
        self.lines.append(
            f"| {name} | {bits:.3f} | {'' if predicted is None else f'{predicted:+.5f}'} | {measured:+.5f} "
            f"| {found.loss_change:+.5f} ± {found.loss_change_standard_error:.5f} | {found.model.perplexity:.3f} "
            f"| {found.mean:.5f} ± {found.standard_error:.5f} | {'' if seconds is None else f'{seconds:.0f}'} |"
        )
        print(self.lines[-1], flush=True)
        self.write()

    def host(self, entry: PlanEntry, kept: Mapping[str, torch.Tensor] | None = None) -> dict[str, QuantizedMatrix]:
        """All matrices in the host's stored form, some weights left out of the fit and kept."""
        return {
            linear.name: quantize_matrix(
                linear.name, narrowest(linear.weight), entry, None if kept is None else kept[linear.name]
            )
            for linear in self.linears
        }

    def requant(self, entry: PlanEntry, **settings: Any) -> tuple[dict[str, QuantizedMatrix], Any, float]:
        """Stored forms and record of ReQuant, and how long it took."""
        model = models.load_model(self.options.model, "float32")
        plan = qtr.Plan.uniform([linear.name for linear in self.linears], entry)
        start = time.perf_counter()
        _, record = qtr.requant(
            model, self.windows, plan=plan, nodes=self.options.nodes, batch_size=8, progress=False, **settings
        )
        seconds = time.perf_counter() - start
        return {name: layer.matrix for name, layer in quantized_layers(model).items()}, record, seconds

    def ablation(self, host: str, bits: int) -> None:
        """The rows of one host and number of bits."""
        options = self.options
        entry = PlanEntry(bits, options.group_size, solver=solver_of(host))
        label = f"{host}, {bits} bits, g{options.group_size}"
        budgets = {"outliers": options.outliers, "significant": options.significant}
        stored, record, seconds = self.requant(entry, **budgets)
        before, after = record.stages[0], record.stages[1]
        self.add(f"**{label}**", self.host(entry), before.predicted_loss_change, before.measured_loss_change)
        self.add(
            f"+ outliers, temperature {record.temperature:.2g}",
            self.host(entry, self.outliers([matrix.outliers for matrix in record.matrices])),
            after.predicted_loss_change,
            after.measured_loss_change,
        )
        sizes = [linear.numel for linear in self.linears]
        even = split(record.outliers, sizes, sizes, float("inf"), 1.0)
        self.add("+ outliers, the same ratio everywhere", self.host(entry, self.outliers(even)))
        mean_pqi = {matrix.name: matrix.mean_pqi for matrix in record.matrices}
        entries = dict.fromkeys(mean_pqi, entry)
        greedy = greedy_counts(self.linears, entries, mean_pqi, record.outliers, 0.05)
        self.add("+ outliers, greedy on predicted PQI", self.host(entry, self.outliers(greedy)))
        parts, found, spent = self.requant(entry, **{**budgets, "outliers": 0.0}, prove=False)
        self.add("+ significant", parts, found.predicted_loss_change, found.measured_loss_change, spent)
        self.add("+ both", stored, record.predicted_loss_change, record.measured_loss_change, seconds)
        self.notes.append(
            f"{label}: {record.gradient_evaluations} gradient evaluations of each window in {seconds:.0f} s, "
            f"{record.outliers:,} outliers and {record.significant:,} significant weights; "
            f"{record.bits_per_weight:.3f} bits per weight as stored, {record.paper_bits_per_weight:.3f} by the "
            f"paper's rule (48 bits a kept weight)"
        )
        count = record.outliers + record.significant
        self.add("+ random positions", self.host(entry, self.at_random(count)))
        for name, maps in self.rankings(entry).items():
            self.add(f"+ the same number by {name}", self.host(entry, self.largest(maps, count)))
        budget = sum(matrix.nbytes for matrix in stored.values())
        fitting = []
        for size in SMALLER[options.group_size]:
            finer = self.host(replace(entry, group_size=size))
            fitting.append((sum(matrix.nbytes for matrix in finer.values()), size, finer))
        below = [f for f in fitting if f[0] <= budget]
        taken = max(below, key=lambda f: f[0]) if below else min(fitting, key=lambda f: f[0])
        self.add(f"{host}, {bits} bits, g{taken[1]}", taken[2])

    def outliers(self, counts: list[int]) -> dict[str, torch.Tensor]:
        """Positions of so many of the largest weights of each matrix."""
        return {
            linear.name: ops.topk(narrowest(linear.weight).view(-1), count)[1]
            for linear, count in zip(self.linears, counts, strict=True)
        }

    def at_random(self, count: int) -> dict[str, torch.Tensor]:
        """Positions drawn over the whole model."""
        drawn = torch.randperm(self.total, generator=torch.Generator().manual_seed(0))[:count].sort().values
        places, start = {}, 0
        for linear in self.linears:
            inside = (drawn >= start) & (drawn < start + linear.numel)
            places[linear.name] = drawn[inside] - start
            start += linear.numel
        return places

    def rankings(self, entry: PlanEntry) -> dict[str, dict[str, torch.Tensor]]:
        """Values of all weights by the metrics that PQI is held against."""
        found = qtr.analyze(
            self.original,
            self.windows,
            metrics=["first_order", "fisher"],
            bits=entry.bits,
            group_size=entry.group_size,
            method={solver_of(name): name for name in ("rtn", "mse", "hqq")}[entry.solver],
            progress=False,
        )
        return {
            "magnitude": {linear.name: linear.weight.abs() for linear in self.linears},
            "squared gradient": dict(found.maps["fisher"]),
            "first order": dict(found.maps["first_order"]),
        }

    def largest(self, maps: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Positions of the largest values over the whole model."""
        ranked = ops.topk([maps[linear.name].contiguous() for linear in self.linears], count, key="value")
        return {linear.name: places for linear, (_, places) in zip(self.linears, ranked, strict=True)}

    def write(self) -> None:
        """Write the table as far as it has come."""
        options = self.options
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        table = "\n".join(
            [
                f"`python {' '.join(sys.argv)}`\n",
                f"{date.today()}, {machine(torch.get_num_threads())}; {len(self.windows)} windows of calibration text "
                f"and {self.evaluation[:, 1:].numel():,} evaluated tokens in windows of {options.seqlen}; Gauss with "
                f"{options.nodes} nodes; {options.outliers} % outliers, {options.significant} % significant weights in "
                f"2 steps; peak memory of the whole process {peak:,.0f} MiB.\n",
                "| | bits per weight, stored | predicted loss change, calibration | measured, calibration "
                "| measured, evaluation | perplexity | divergence (nats a token) | seconds |",
                "|---|---|---|---|---|---|---|---|",
                *self.lines,
                "",
                *(f"- {note}" for note in self.notes),
                "",
            ]
        )
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"requant-{Path(options.model).name}.md").write_text(f"# ReQuant\n\n{table}")


def main() -> None:
    options = parse_arguments()
    bench = Bench(options)
    for bits in options.bits.split(","):
        for host in options.hosts.split(","):
            bench.ablation(host, int(bits))


if __name__ == "__main__":
    main()
