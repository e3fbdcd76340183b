"""Measure a model on a GPU: the analysis, generation with quantized and dense models, and PQI in a training step.

    PYTHONPATH=python python -m bench.ops.cuda_model MODEL [--text FILE] [--output model.json] [--device cpu]

MODEL is a folder that transformers can load. The text is cut into windows, for the analysis and for the loss of each
model. Without --text, held-out source code of Python's standard library is used. Nothing is downloaded. transformers
generates one sequence greedily. At the end, the script prints a table; the JSON file has all figures.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import quantrature as qtr
from bench.ops.cuda import ROOT, Timer, step_row
from quantrature import models
from quantrature.analysis.objective import Loss, mean_over
from quantrature.demo.text import evaluation_text
from quantrature.text import token_windows

PROMPT, GENERATED = 16, 64
CHARACTERS = 1 << 20
"""Of a text, more than the windows take."""


class CpuTimer(Timer):
    """Measures calls on the CPU, to try this script without a GPU."""

    def _elapsed(self, body: Callable[[], Any]) -> float:
        start = time.perf_counter()
        body()
        return time.perf_counter() - start


class Machine:
    """A device on which calls are measured."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.timer = CpuTimer() if self.device.type == "cpu" else Timer()

    @property
    def name(self) -> str:
        """Name of the device."""
        return "CPU" if self.device.type == "cpu" else str(torch.cuda.get_device_name(self.device))

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float, int]:
        """Return the result of a call, its seconds, and the peak of the device's memory in bytes."""
        gc.collect()
        if self.device.type == "cpu":
            start = time.perf_counter()
            return call(), time.perf_counter() - start, 0
        torch.cuda.empty_cache()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        found = call()
        torch.cuda.synchronize(self.device)
        return found, time.perf_counter() - start, int(torch.cuda.max_memory_allocated(self.device))


def analysis_row(machine: Machine, model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Measure an analysis with the default metrics and number of nodes."""
    mean_over(Loss(), model, windows[:1], 1)  # warm up: the first pass has costs of its own
    found, seconds, peak = machine.timed(lambda: qtr.analyze(model, windows, progress=False))
    proof = found.proofs[0]
    print(f"  analysis: {seconds:.2f} s, {proof.predicted_loss_change:.5f} predicted", flush=True)
    return {
        "seconds": seconds,
        "peak": peak,
        "setting": proof.setting,
        "nodes": proof.nodes,
        "predicted": proof.predicted_loss_change,
        "measured": proof.measured_loss_change,
    }


FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "rtn, 4 bits, g64": {"bits": 4, "group_size": 64},
    "the same, 0.5 % outliers": {"bits": 4, "group_size": 64, "outlier_fraction": 0.005},
    "the same, embedding of 8 bits": {"bits": 4, "group_size": 64, "outlier_fraction": 0.005, "embedding_bits": 8},
}
"""The models that are measured, as arguments of :func:`quantrature.quantize`; ``None`` for the dense model."""


def model_row(machine: Machine, name: str, model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Quantize a copy of the model, and measure generation and the loss on the windows."""
    settings = FORMS[name]
    quantizing = 0.0
    subject = copy.deepcopy(model)
    if settings is not None:
        subject, quantizing, _ = machine.timed(lambda: qtr.quantize(subject, **settings, progress=False))
    prompt = windows[:1, :PROMPT].to(machine.device)
    how = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}

    def generate() -> Any:
        return subject.generate(prompt, attention_mask=torch.ones_like(prompt), **how)

    generate()
    runs = [machine.timed(generate) for _ in range(3)]
    seconds = statistics.median(seconds for _, seconds, _ in runs)
    loss, loss_seconds, loss_peak = machine.timed(lambda: mean_over(Loss(), subject, windows, 1))
    print(f"  {name}: {GENERATED / seconds:.1f} tokens/s, loss {loss:.5f}", flush=True)
    return {
        "name": name,
        "quantizing": quantizing,
        "tokens_per_second": GENERATED / seconds,
        "generation_peak": max(peak for _, _, peak in runs),
        "loss": loss,
        "loss_seconds": loss_seconds,
        "loss_peak": loss_peak,
    }


def table(result: dict[str, Any]) -> str:
    """Return the table that is printed at the end."""
    analysis = result["analysis"]
    lines = [
        f"{result['model']} on {result['device']}, torch {result['torch']}, {result['date']}",
        f"analysis of {result['windows']} windows of {result['seqlen']} tokens, {analysis['setting']}, "
        f"{analysis['nodes']} nodes: {analysis['seconds']:.2f} s, peak {analysis['peak'] / 1e6:.0f} MB; "
        f"loss change {analysis['predicted']:.5f} predicted, {analysis['measured']:.5f} measured",
        f"{'model':32} {'quantized in s':>14} {'tokens/s':>9} {'peak MB':>8} {'loss':>8} {'in s':>6} {'peak MB':>8}",
    ]
    for r in result["models"]:
        lines.append(
            f"{r['name']:32} {r['quantizing']:14.2f} {r['tokens_per_second']:9.1f} {r['generation_peak'] / 1e6:8.0f} "
            f"{r['loss']:8.5f} {r['loss_seconds']:6.2f} {r['loss_peak'] / 1e6:8.0f}"
        )
    for r in result["steps"]:
        lines.append(
            f"step of {r['tokens']} tokens: {r['without'] * 1e3:.2f} ms without PQI, {r['seconds'] * 1e3:.2f} ms "
            f"with it ({r['share']:.2%})"
        )
    return "\n".join(lines)


def main() -> int:
    """Load the model, run the measurements, and write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", help="text file to use instead of Python source code")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / f"cuda-model-{date.today()}.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="*", default=[2048, 8192], help="tokens per training step")
    options = parser.parse_args()
    machine = Machine(options.device)
    devices, why_not = qtr.cuda_device_count()
    if machine.device.type != "cpu" and not devices:
        raise SystemExit(f"the CUDA backend does not load: {why_not}")
    model: Any = models.load_model(options.model, "bfloat16").eval().to(machine.device)
    text = evaluation_text() if options.text is None else Path(options.text).read_text(encoding="utf-8")
    windows = token_windows(
        [text[:CHARACTERS]],
        models.load_tokenizer(options.model),
        seqlen=options.seqlen,
        nsamples=options.nsamples,
        model=model,
    )
    result: dict[str, Any] = {
        "date": str(date.today()),
        "device": machine.name,
        "torch": torch.__version__,
        "quantrature": qtr.__version__,
        "model": options.model.resolve().name,
        "windows": len(windows),
        "seqlen": windows.shape[1],
    }
    longest = model.config.max_position_embeddings

    def step_of(tokens: int) -> dict[str, Any]:
        length = min(tokens, longest)
        window = windows.flatten()[:length].repeat(-(-length // windows.numel()))[:length]
        return step_row(machine.timer, model, window.repeat(tokens // length, 1))

    options.output.parent.mkdir(parents=True, exist_ok=True)
    work: dict[str, Callable[[], Any]] = {
        "analysis": lambda: analysis_row(machine, model, windows),
        "models": lambda: [model_row(machine, name, model, windows) for name in FORMS],
        "steps": lambda: [step_of(tokens) for tokens in options.steps],
    }
    for name, rows in work.items():
        print(name, flush=True)
        start = time.perf_counter()
        result[name] = rows()
        print(f"  {time.perf_counter() - start:.1f} s in all", flush=True)
        options.output.write_text(json.dumps(result, indent=1))
    print(table(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
