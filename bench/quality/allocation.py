"""Compare strategies of allocation at equal size: perplexity and divergence of a model with plans of each strategy.

    python -m bench.quality.allocation MODEL --calibration TEXT --text TEXT --work FOLDER [--output bench/results]

All plans use HQQ with 8-bit scales and zeros, as published. A budget is named after the nominal bits of a published
setting; its size in bytes is the stored size of the model with this setting. Sensiboost and kurtboost spend more, as
published. Measurements are saved in the work folder, and an interrupted run resumes from there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import quantrature as qtr
from bench.harness.heading import heading
from bench.harness.notes import Notes
from quantrature import Plan, models
from quantrature.allocation import CONFIGURATIONS, Source, activation_sensitivity, allocate, validate
from quantrature.analysis import Sensitivity
from quantrature.methods import quantize_matrix
from quantrature.plan import PlanEntry
from quantrature.text import token_windows

BUDGETS = (2.13, 2.25, 2.51, 2.75, 3.0, 3.13, 3.25, 3.51, 4.13, 4.25)
REFERENCES = (2, 3, 4)
CHOICE = {"bits": (2, 3, 4, 5, 6), "group_sizes": (32, 64, 128, 256), "meta_bits": 8}
OUTLIERS = (0.0, 0.005)
BOOSTS = ((2, 0), (2, 2), (3, 0), (3, 1))
PLANS = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text that plans are made from")
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--work", type=Path, required=True, help="folder to save measurements in")
    parser.add_argument("--tokens", type=int, default=8192, help="number of tokens of the evaluation text")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--nsamples", type=int, default=64, help="windows of calibration text")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the table and the picture")
    return parser.parse_args()


class Judge:
    """Measures perplexity and divergence from the original model, whose predictions are computed once."""

    def __init__(self, folder: str, windows: torch.Tensor) -> None:
        self.windows = windows
        self.model = models.load_model(folder, "float32").eval()
        self.stored = {linear.name: linear.weight.clone() for linear in models.find_linears(models.load_model(folder))}
        self.linears = models.find_linears(self.model)
        self.images: dict[tuple[str, PlanEntry], tuple[torch.Tensor, int]] = {}
        self.reference = [self._predictions(batch) for batch in windows.split(8)]
        self.perplexity, _, _ = self._compare()

    @torch.no_grad()
    def _predictions(self, batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(batch, use_cache=False).logits[:, :-1]
        return logits.log_softmax(dim=-1)

    @torch.no_grad()
    def _compare(self) -> tuple[float, float, float]:
        losses, divergences = [], []
        for batch, p in zip(self.windows.split(8), self.reference, strict=True):
            q = self._predictions(batch)
            losses.append(-q.gather(-1, batch[:, 1:, None]).double().mean(dim=(1, 2)))
            divergences.append((p.exp() * (p - q)).sum(dim=-1).double().mean(dim=1))
        loss, apart = torch.cat(losses), torch.cat(divergences)
        return float(loss.mean().exp()), float(apart.mean()), float(apart.std() / len(apart) ** 0.5)

    def image(self, name: str, entry: PlanEntry) -> tuple[torch.Tensor, int]:
        """Return the dequantized weights of a matrix, and its stored bytes."""
        bare = PlanEntry(entry.bits, entry.group_size, entry.sym, entry.method, entry.meta_bits, entry.outlier_fraction)
        if (name, bare) not in self.images:
            matrix = quantize_matrix(name, self.stored[name].contiguous(), bare)
            self.images[name, bare] = matrix.dequantize("float32"), matrix.nbytes
        return self.images[name, bare]

    @torch.no_grad()
    def measure(self, plan: Plan) -> dict[str, float]:
        """Return size, perplexity and divergence of the model with a plan."""
        size = weights = 0
        for name, entry in plan:
            image, nbytes = self.image(name, entry)
            self.linears.find(name).weight.copy_(image)
            size, weights = size + nbytes, weights + image.numel()
        perplexity, divergence, error = self._compare()
        return {
            "bytes": size,
            "bits": 8 * size / weights,
            "perplexity": perplexity,
            "divergence": divergence,
            "error": error,
        }


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = make()
    return found, time.perf_counter() - started


def main() -> None:
    options = parse_arguments()
    notes = Notes(options.work / "allocation.json")
    tokenizer = models.load_tokenizer(options.model)
    evaluation = token_windows(options.text, tokenizer, seqlen=options.seqlen, max_tokens=options.tokens)
    calibration = token_windows(
        options.calibration, tokenizer, seqlen=options.seqlen, nsamples=options.nsamples, seed=0
    )
    judge = Judge(options.model, evaluation)
    print(f"original: perplexity {judge.perplexity:.4f}", flush=True)

    model = models.load_model(options.model, "float32")

    def analyze() -> float:
        found, seconds = timed(
            lambda: qtr.analyze(
                model,
                calibration,
                metrics=["pqi", "kurtosis"],
                bits=REFERENCES,
                group_size=64,
                method="hqq",
                nodes=options.nodes,
                batch_size=8,
                progress=False,
            )
        )
        found.save(options.work / "sensitivity", overwrite=True)
        return seconds

    analysis = notes.of("analysis seconds", analyze)
    sensitivity = Sensitivity.load(options.work / "sensitivity")

    def activations() -> dict[str, Any]:
        scores, seconds = timed(lambda: activation_sensitivity(model, calibration, progress=False))
        return {"scores": dict(scores), "seconds": seconds}

    activation = notes.of("activation sensitivity", activations)

    settings = {config.label: config for config in CONFIGURATIONS}

    def limit(budget: float) -> int:
        """Bytes."""
        weights = [linear for linear in models.find_linears(model)]
        if budget in settings:
            entry = PlanEntry(settings[budget].bits, settings[budget].group_size, method="hqq", meta_bits=8)
            return sum(judge.image(linear.name, entry)[1] for linear in weights)
        return int(budget * sum(linear.numel for linear in weights) / 8)

    rows: list[dict[str, Any]] = []
    seen: dict[Any, dict[str, float]] = {}

    def add(budget: float, method: str, make: Callable[[], Plan], before: float = 0.0) -> None:
        def found() -> dict[str, Any]:
            plan, seconds = timed(make)
            key = tuple((name, str(entry)) for name, entry in plan)
            if key not in seen:  # boosted plans are often equal
                seen[key] = judge.measure(plan)
            return {
                "budget": budget,
                "method": method,
                "seconds": before + seconds,
                "predicted": plan.allocation.get("predicted_loss_change"),
                "settings": {name: entry.setting for name, entry in plan},
                **seen[key],
            }

        row = notes.of(f"{budget}: {method}", found)
        rows.append(row)
        print(
            f"{budget} {method}: {row['bits']:.4f} bits, perplexity {row['perplexity']:.4f}, "
            f"divergence {row['divergence']:.5f}, {row['seconds']:.1f} s",
            flush=True,
        )
        if options.output is not None:
            write(options.output, options.model, judge, rows, notes, evaluation)

    weights, analyzed = Source.of(options.model), Source.of(sensitivity, options.model)

    def measuring(source: Any, **choice: Any) -> float:
        """Seconds to measure what is chosen from, which later plans find measured."""
        return timed(lambda: allocate(source, avg_bits=8, **choice))[1]

    common = {"method": "hqq", "progress": False}
    pqi = {**common, **CHOICE, "strategy": "pqi"}

    def measurings() -> dict[str, float]:
        plain, more = (measuring(analyzed, outlier_fractions=shares, **pqi) for shares in ((0.0,), OUTLIERS))
        mxq = measuring(weights, strategy="mxq", **common)
        return {"MXQ": mxq, "PQI": analysis + plain, "PQI with outliers": analysis + plain + more}

    before = notes.of("measuring seconds", measurings)
    sizes = {budget: limit(budget) for budget in BUDGETS}
    for budget, size in sizes.items():
        target = {"target_bytes": size}
        uniform = {"strategy": "uniform", "bits": (2, 3, 4, 8), "meta_bits": 8}
        add(budget, "uniform", partial(allocate, weights, **uniform, **target, **common))
        add(budget, "MXQ", partial(allocate, weights, strategy="mxq", **target, **common), before["MXQ"])
        add(budget, "PQI", partial(allocate, analyzed, **target, **pqi), before["PQI"])
        add(
            budget,
            "PQI with outliers",
            partial(allocate, analyzed, outlier_fractions=OUTLIERS, **target, **pqi),
            before["PQI with outliers"],
        )
    for budget, size in sizes.items():
        free = {"target_bytes": size, "groups": "none"}
        add(budget, "PQI, not fused", partial(allocate, analyzed, **free, **pqi), before["PQI"])
        for stops, top in BOOSTS:
            boost = {"avg_bits": budget + 0.005, "stops": stops, "top_m": top, **common}
            add(
                budget,
                f"SensiBoost {stops}-{top}",
                partial(allocate, weights, strategy="sensiboost", sensitivity=activation["scores"], **boost),
                activation["seconds"],
            )
            add(budget, f"KurtBoost {stops}-{top}", partial(allocate, weights, strategy="kurtboost", **boost))

    def validation() -> dict[str, Any]:
        return validate(model, calibration, sensitivity, count=PLANS, batch_size=8, progress=False).to_json()

    notes.of("validation", validation)
    if options.output is not None:
        write(options.output, options.model, judge, rows, notes, evaluation)
        draw(options.output / "allocation.png", rows)


def write(
    folder: Path, model: str, judge: Judge, rows: list[dict[str, Any]], notes: Notes, evaluation: torch.Tensor
) -> None:
    """Write the table with the measurements so far."""
    lines = [
        "# Allocation",
        "",
        f"{heading('bench.quality.allocation', torch.get_num_threads())}; "
        f"{evaluation[:, 1:].numel():,} tokens in windows of "
        f"{evaluation.shape[1]}; {Path(model).name}, perplexity {judge.perplexity:.4f} as it is.",
        "",
        "Least divergence of each budget in bold. Methods that made the same plan share a row; planning took what the "
        "first of them did, on a busy machine.",
        "",
        "| budget | method | stored bits per weight | bytes | perplexity | divergence (nats a token) | predicted loss "
        "change | planning, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    same: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        same.setdefault((row["budget"], row["bytes"], row["divergence"]), []).append(row)
    for (budget, _, divergence), equals in sorted(same.items(), key=lambda pair: pair[0][0]):
        row, mark = equals[0], "**" * (divergence == min(key[2] for key in same if key[0] == budget))
        predicted = "" if row["predicted"] is None else f"{row['predicted']:+.4f}"
        lines.append(
            f"| {budget:g} | {', '.join(r['method'] for r in equals)} | {row['bits']:.4f} | {row['bytes']:,} | "
            f"{row['perplexity']:.3f} | {mark}{divergence:.5f}{mark} ± {row['error']:.5f} | {predicted} | "
            f"{row['seconds']:.1f} |"
        )
    if "validation" in notes.known:
        found = notes.known["validation"]
        lines += [
            "",
            f"Validation of the loss model on {found['plans']} random plans of {REFERENCES} bits, on the calibration "
            f"text: Spearman {found['spearman']:.4f}, median relative error {found['median_relative_error']:.1%}.",
        ]
    path = folder / "allocation.md"
    # Keep the text that people wrote below the table.
    _, notes, remarks = path.read_text().partition("\n## Notes\n") if path.is_file() else ("", "", "")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]) + notes + remarks)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw divergence over stored bits."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    styles = {
        "uniform": ("o", "0.4"),
        "MXQ": ("s", "tab:blue"),
        "SensiBoost 2-0": ("^", "tab:orange"),
        "KurtBoost 2-0": ("v", "tab:green"),
        "PQI": ("D", "tab:red"),
        "PQI with outliers": ("P", "tab:brown"),
        "PQI, not fused": ("X", "tab:purple"),
    }
    curves: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for method in styles:
        points = tuple(sorted({(row["bits"], row["divergence"]) for row in rows if row["method"] == method}))
        curves.setdefault(points, []).append(method)
    for points, methods in curves.items():
        marker, colour = styles[methods[0]]
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=", ".join(methods), ms=5, lw=1)
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight, everything included")
    axes.set_ylabel("KL divergence from the original, nats a token")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
