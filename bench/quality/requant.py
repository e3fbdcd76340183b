"""Measure what ReQuant gains: the ablation of arXiv 2503.01901 (Table 8), and other ways to spend the same bytes.

    python -m bench.quality.requant MODEL --calibration TEXT --text TEXT --work FOLDER [--bits 2,3,4]
        [--methods rtn,hqq] [--nsamples 32] [--tokens 32768] [--output bench/results]

First, the bench measures time and memory of the analysis, with 3 Gauss nodes and with the 32 intervals of the paper,
each in its own process.

Then it evaluates several models for each method and number of bits. They keep different weights unquantized: none;
outliers; significant weights; both; the same number of weights at random positions. Others have the size of "both":
the method with smaller groups, with 16-bit and with 8-bit scales and zeros; and the same number of unquantized weights,
chosen by another score over the whole model (PQI, magnitude, squared gradient, first order), which do not affect the
scales.

Loss changes are in nats per token on the calibration text. Perplexity and divergence from the original are measured on
the other text. The work folder keeps each measurement; a run that was interrupted continues from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import quantrature as qtr
from bench.harness.heading import heading
from bench.harness.notes import Notes
from quantrature import Sensitivity, models, ops
from quantrature.analysis.path import Moved, WeightPath, homes_of
from quantrature.analysis.proving import Effort, Prover
from quantrature.methods import QuantizedMatrix, quantize_matrix
from quantrature.models.folding import narrowest
from quantrature.models.running import not_training
from quantrature.nn import quantized_layers
from quantrature.plan import PlanEntry
from quantrature.plan.option import stored_bytes
from quantrature.requantization.outliers import split
from quantrature.requantization.selection import Quantizer, greedy_counts
from quantrature.text import token_windows

FINER = {None: (32, 36, 43, 48, 52, 56), 8: (12, 16, 20, 22, 24, 26, 28, 32)}
"""Bits of scales and zeros to group sizes, of which those are shown whose bytes are next to those of ReQuant."""

ANALYSES = (("gauss", 3), ("paper", 33))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--work", type=Path, required=True, help="folder to save measurements in")
    parser.add_argument("--tokens", type=int, default=32768, help="number of tokens of the evaluation text")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--bits", default="2,3,4", help="bits, separated by commas; none: only measure the analysis")
    parser.add_argument("--methods", default="rtn,hqq")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--outlier-fraction", type=float, default=0.0045)
    parser.add_argument("--significant-fraction", type=float, default=0.0005)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the table")
    return parser.parse_args()


def analysis_alone(options: argparse.Namespace, rule: str, nodes: int) -> dict[str, Any]:
    """Measure time and peak memory of ``quantrature analyze`` in its own process; its maps stay in the work folder."""
    command = [sys.executable, "-m", "quantrature", "analyze", options.model, "--calibration", options.calibration]
    command += ["-o", str(options.work / f"analysis-{rule}-{nodes}"), "--overwrite", "--json", "--metrics", "pqi"]
    command += ["--bits", "2", "--group-size", str(options.group_size), "--rule", rule, "--nodes", str(nodes)]
    command += ["--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen), "--batch-size", "8"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    return {
        "seconds": time.perf_counter() - start,
        "MiB": usage.ru_maxrss / 1024,
        **{name: found[name] for name in ("predicted_loss_change", "measured_loss_change", "gradient_evaluations")},
    }


class Bench:
    """A model, its texts, and the table so far."""

    def __init__(self, options: argparse.Namespace, notes: Notes) -> None:
        self.options, self.notes = options, notes
        self.tokenizer = models.load_tokenizer(options.model)
        self.windows = token_windows(
            options.calibration, self.tokenizer, seqlen=options.seqlen, nsamples=options.nsamples
        )
        self.evaluation = token_windows(options.text, self.tokenizer, seqlen=options.seqlen, max_tokens=options.tokens)
        self.original = models.load_model(options.model, "float32")
        self.linears = models.find_linears(self.original)
        self.model = models.load_model(options.model, "float32")
        self.places = {linear.name: linear.weight for linear in models.find_linears(self.model)}
        self.total = sum(linear.numel for linear in self.linears)
        self.prover = Prover(self.original, self.windows, 8, Effort("gauss", options.nodes))
        self.reference = [self.predictions(self.original.eval(), batch) for batch in self.evaluation.split(8)]
        self.losses = [self.loss(p, batch) for p, batch in zip(self.reference, self.evaluation.split(8), strict=True)]
        self.blocks: dict[str, list[dict[str, Any]]] = {}

    def evaluate(
        self,
        stored: Mapping[str, QuantizedMatrix],
        predicted: float | None = None,
        measured: float | None = None,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """Evaluate the model with quantized matrices.

        Args:
            stored: matrix name to quantized matrix.
            predicted, measured: loss changes on the calibration text; computed if not given.
            seconds: time that quantization took, for the row.
        """
        if predicted is None or measured is None:
            moved = [Moved(linear, lambda m=stored[linear.name]: m.dequantize("float32")) for linear in self.linears]
            with not_training(self.original), WeightPath(self.original, moved) as path:
                _, proof = self.prover.prove(path, "", "", lambda steps: None)
            predicted, measured = proof.predicted_loss_change, proof.measured_loss_change
        for name, place in self.places.items():
            place.copy_(stored[name].dequantize("float32"))
        losses, divergences = [], []
        for p, before, batch in zip(self.reference, self.losses, self.evaluation.split(8), strict=True):
            q = self.predictions(self.model, batch)
            losses.append(self.loss(q, batch) - before)
            divergences.append((p.exp() * (p - q)).sum(dim=-1).double().mean(dim=1))
        loss, apart = torch.cat(losses), torch.cat(divergences)
        return {
            "bytes": sum(matrix.nbytes for matrix in stored.values()),
            "predicted": predicted,
            "measured": measured,
            "loss": float(loss.mean()),
            "loss error": float(loss.std() / len(loss) ** 0.5),
            "perplexity": float((torch.cat(self.losses).mean() + loss.mean()).exp()),
            "divergence": float(apart.mean()),
            "divergence error": float(apart.std() / len(apart) ** 0.5),
            "seconds": seconds,
        }

    @staticmethod
    @torch.no_grad()
    def predictions(model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Return the log probabilities of the next token, at every position but the last."""
        logits: torch.Tensor = model(batch, use_cache=False).logits[:, :-1]
        return logits.log_softmax(dim=-1)

    @staticmethod
    def loss(predictions: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of each window."""
        return -predictions.gather(-1, batch[:, 1:, None]).double().mean(dim=(1, 2))

    def method(self, entry: PlanEntry, kept: Mapping[str, torch.Tensor] | None = None) -> dict[str, QuantizedMatrix]:
        """Quantize all matrices; the weights at the indices ``kept`` stay unquantized and do not affect the scales."""
        return {
            linear.name: quantize_matrix(
                linear.name, narrowest(linear.weight), entry, None if kept is None else kept[linear.name]
            )
            for linear in self.linears
        }

    def requant(self, entry: PlanEntry, **settings: Any) -> tuple[dict[str, QuantizedMatrix], Any, float]:
        """Run ReQuant; return the quantized matrices, the record and the seconds."""
        model = models.load_model(self.options.model, "float32")
        plan = qtr.Plan.uniform([linear.name for linear in self.linears], entry)
        start = time.perf_counter()
        _, record = qtr.requant(
            model, self.windows, plan=plan, nodes=self.options.nodes, batch_size=8, progress=False, **settings
        )
        seconds = time.perf_counter() - start
        return {name: layer.matrix for name, layer in quantized_layers(model).items()}, record, seconds

    def ablation(self, method: str, bits: int) -> None:
        """Measure the rows of one method and number of bits."""
        options = self.options
        entry = PlanEntry(bits, options.group_size, method=method)
        label = f"{method}, {bits} bits, g{options.group_size}"
        rows = self.blocks.setdefault(label, [])
        budgets = {
            "outlier_fraction": options.outlier_fraction,
            "significant_fraction": options.significant_fraction,
        }

        def add(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            row = self.notes.of(f"{label}: {name}", lambda: {"name": name, **make()})
            rows.append(row)
            print(line(row, self.total), flush=True)
            self.write()
            return row

        def at(places: Callable[[], Mapping[str, torch.Tensor]]) -> Callable[[], dict[str, Any]]:
            return lambda: self.evaluate(self.method(entry, places()))

        def with_both() -> dict[str, Any]:
            stored, record, seconds = self.requant(entry, **budgets)
            self.notes.of(f"{label}: record", record.to_json)
            return self.evaluate(stored, record.predicted_loss_change, record.measured_loss_change, seconds)

        def significant_alone() -> dict[str, Any]:
            stored, record, seconds = self.requant(entry, **{**budgets, "outlier_fraction": 0.0})
            return self.evaluate(stored, record.predicted_loss_change, record.measured_loss_change, seconds)

        both = add("+ both", with_both)
        record = self.notes.known[f"{label}: record"]
        before, after = record["stages"][:2]
        counts = [matrix["outliers"] for matrix in record["modules"]]
        sizes = [linear.numel for linear in self.linears]
        count = record["outliers"] + record["significant"]

        def stage(found: Mapping[str, Any], kept: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
            return self.evaluate(
                self.method(entry, kept), found["predicted_loss_change"], found["measured_loss_change"]
            )

        def greedily() -> dict[str, torch.Tensor]:
            mean_pqi = {matrix["name"]: matrix["mean_pqi"] for matrix in record["modules"]}
            quantizer = Quantizer(self.linears, homes_of(self.linears), dict.fromkeys(mean_pqi, entry), {})
            return self.outliers(greedy_counts(quantizer, mean_pqi, sum(counts), 0.05))

        add("nothing kept", lambda: stage(before, None))
        add("+ outliers, by temperature", lambda: stage(after, self.outliers(counts)))
        add(
            "+ outliers, the same ratio everywhere",
            at(lambda: self.outliers(split(sum(counts), sizes, sizes, float("inf"), 1.0))),
        )
        add("+ outliers, greedy on predicted PQI", at(greedily))
        add("+ significant", significant_alone)
        add("+ random positions", at(lambda: self.at_random(count)))
        rankings = functools.cache(lambda: self.rankings(entry))
        for name in ("PQI", "magnitude", "squared gradient", "first order"):
            add(f"+ the same number by {name}", at(lambda name=name: self.largest(rankings()[name], count)))
        for meta_bits, sizes_tried in FINER.items():
            finer = [replace(entry, group_size=size, meta_bits=meta_bits) for size in sizes_tried]
            taken = {e: sum(stored_bytes(w.out_features, w.in_features, e) for w in self.linears) for e in finer}
            parameters = "" if meta_bits is None else f", {meta_bits}-bit scales and zeros"
            below = max((e for e in finer if taken[e] <= both["bytes"]), key=taken.__getitem__)
            above = min((e for e in finer if taken[e] > both["bytes"]), key=taken.__getitem__)
            for which, chosen in (("below", below), ("above", above)):
                add(
                    f"smaller groups{parameters}, next size {which} (g{chosen.group_size})",
                    lambda chosen=chosen: self.evaluate(self.method(chosen)),
                )

    def outliers(self, counts: list[int]) -> dict[str, torch.Tensor]:
        """Return the positions of the largest weights of each matrix, in these numbers."""
        return {
            linear.name: ops.topk(narrowest(linear.weight).view(-1), count)[1]
            for linear, count in zip(self.linears, counts, strict=True)
        }

    def at_random(self, count: int) -> dict[str, torch.Tensor]:
        """Return random positions over the whole model."""
        drawn = torch.randperm(self.total, generator=torch.Generator().manual_seed(0))[:count].sort().values
        places, start = {}, 0
        for linear in self.linears:
            inside = (drawn >= start) & (drawn < start + linear.numel)
            places[linear.name] = drawn[inside] - start
            start += linear.numel
        return places

    def rankings(self, entry: PlanEntry) -> dict[str, dict[str, torch.Tensor]]:
        """Return the scores of all weights: PQI, and the metrics that it is compared with."""
        found = qtr.analyze(
            self.original,
            self.windows,
            metrics=["pqi", "first_order", "fisher"],
            bits=entry.bits,
            group_size=entry.group_size,
            method=entry.method,
            nodes=self.options.nodes,
            batch_size=8,
            progress=False,
        )
        return {
            "PQI": dict(found.maps["pqi"]),
            "magnitude": {linear.name: linear.weight.abs() for linear in self.linears},
            "squared gradient": dict(found.maps["fisher"]),
            "first order": dict(found.maps["first_order"]),
        }

    def largest(self, maps: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Return the positions of the largest values over the whole model."""
        ranked = ops.topk([maps[linear.name].contiguous() for linear in self.linears], count, key="value")
        return {linear.name: places for linear, (_, places) in zip(self.linears, ranked, strict=True)}

    def write(self) -> None:
        """Write the tables with the rows so far."""
        options = self.options
        if options.output is None:
            return
        lines = [
            "# ReQuant\n",
            f"{heading('bench.quality.requant', torch.get_num_threads())}; "
            f"{len(self.windows)} windows of calibration text and "
            f"{self.evaluation[:, 1:].numel():,} evaluated tokens in windows of {options.seqlen}; Gauss with "
            f"{options.nodes} nodes; {100 * options.outlier_fraction:g} % outliers, "
            f"{100 * options.significant_fraction:g} % significant weights in 2 steps. "
            f"Seconds are of ReQuant as a whole, on a machine with other work.\n",
            *analysis_table(options, self.notes),
        ]
        for label, rows in self.blocks.items():
            lines += ["", f"## {label}", "", *HEAD, *(line(row, self.total) for row in in_order(rows))]
            record = self.notes.known[f"{label}: record"]
            lines += ["", *(f"- {text}" for text in remarks(rows, record, self.total))]
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"requant-{Path(options.model).name}.md").write_text("\n".join([*lines, ""]))


HEAD = [
    "| | bits per weight, stored | predicted loss change, calibration | measured, calibration "
    "| measured, evaluation | perplexity | divergence (nats a token) | seconds |",
    "|---|---|---|---|---|---|---|---|",
]


def analysis_table(options: argparse.Namespace, notes: Notes) -> list[str]:
    """Return the table of time and memory of both analyses, and the share of top-ranked weights in common."""
    lines = [
        "2 bits, rtn, a process each (`quantrature analyze`, Python and libraries included):\n",
        "| rule | gradient evaluations | predicted | measured | apart by | seconds | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule, nodes in ANALYSES:
        found = notes.known[f"analysis {rule} {nodes}"]
        apart = abs(found["predicted_loss_change"] / found["measured_loss_change"] - 1)
        lines.append(
            f"| {rule} | {found['gradient_evaluations']} | {found['predicted_loss_change']:+.5f} "
            f"| {found['measured_loss_change']:+.5f} | {apart:.1e} | {found['seconds']:.1f} | {found['MiB']:,.0f} |"
        )
    share = notes.known["analyses agree"]
    return [*lines, f"\nOf the 0.5 % of all weights that rank highest, both name {share:.1%}."]


def agreement(options: argparse.Namespace) -> float:
    """Return the share of the 0.5 % highest-ranking weights that is the same in both analyses."""
    chosen = []
    for rule, nodes in ANALYSES:
        maps = Sensitivity.load(options.work / f"analysis-{rule}-{nodes}").maps["pqi"]
        values = [maps[name].contiguous() for name in maps]
        count = round(0.005 * sum(v.numel() for v in values))
        chosen.append({(i, p) for i, (_, at) in enumerate(ops.topk(values, count, key="value")) for p in at.tolist()})
    return len(chosen[0] & chosen[1]) / len(chosen[0])


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort the rows: first the parts of ReQuant, then the alternatives."""
    first = ["nothing kept", "+ outliers, by temperature", "+ outliers, the same ratio everywhere"]
    first += ["+ outliers, greedy on predicted PQI", "+ significant", "+ both"]
    return sorted(rows, key=lambda row: first.index(row["name"]) if row["name"] in first else len(first))


def line(row: Mapping[str, Any], weights: int) -> str:
    """Return a row of the table."""
    return (
        f"| {row['name']} | {8 * row['bytes'] / weights:.3f} "
        f"| {row['predicted']:+.5f} | {row['measured']:+.5f} "
        f"| {row['loss']:+.5f} ± {row['loss error']:.5f} | {row['perplexity']:.3f} "
        f"| {row['divergence']:.5f} ± {row['divergence error']:.5f} "
        f"| {'' if row['seconds'] is None else format(row['seconds'], '.0f')} |"
    )


def remarks(rows: list[dict[str, Any]], record: Mapping[str, Any], weights: int) -> list[str]:
    """Return sentences about the rows, computed from their figures."""
    named = {row["name"]: row for row in rows}
    both = named["+ both"]
    kept = record["outliers"] + record["significant"]
    beside = 8 * (record["bytes"] - record["grid_bytes"]) / kept
    found = [
        f"{record['gradient_evaluations']} gradient evaluations of each window, {record['outliers']:,} outliers at "
        f"temperature {record['temperature']}, {record['significant']:,} significant weights; "
        f"{record['bits_per_weight']:.3f} bits per weight as stored ({beside:.1f} for each kept weight, row offsets "
        f"included), {record['paper_bits_per_weight']:.3f} by the paper's rule (48)"
    ]
    if "+ random positions" in named:
        order = [named[name]["measured"] for name in ("+ both", "+ outliers, by temperature", "nothing kept")]
        holds = "holds" if order == sorted(order) else "does not hold"
        chance = named["+ random positions"]["measured"] / order[-1] - 1
        found.append(
            f"both < outliers < nothing in calibration loss {holds}; random positions change it by {chance:+.1%}"
        )
    rivals = [row for row in rows if row["name"].startswith(("+ the same", "smaller"))]
    for measure, what, error in (
        (
            ("measured", "calibration loss", None),
            ("divergence", "divergence", "divergence error"),
            ("loss", "loss on the other text", "loss error"),
        )
        if rivals
        else ()
    ):
        better = [
            f"{row['name']} ({row[measure] - both[measure]:+.5f}"
            + (f" ± {row[error]:.5f}" if error else "")
            + f", {8 * (row['bytes'] - both['bytes']) / weights:+.3f} bits)"
            for row in rivals
            if row[measure] < both[measure]
        ]
        found.append(
            f"in {what} both is " + ("ahead of all that follow" if not better else "behind " + "; ".join(better))
        )
    return found


def main() -> None:
    options = parse_arguments()
    notes = Notes(options.work / "requant.json")
    for rule, nodes in ANALYSES:
        notes.of(f"analysis {rule} {nodes}", functools.partial(analysis_alone, options, rule, nodes))
    notes.of("analyses agree", lambda: agreement(options))
    bench = Bench(options, notes)
    print("\n".join(analysis_table(options, notes)), flush=True)
    bench.write()
    for bits in options.bits.split(",") if options.bits != "none" else ():
        for method in options.methods.split(","):
            bench.ablation(method, int(bits))


if __name__ == "__main__":
    main()
