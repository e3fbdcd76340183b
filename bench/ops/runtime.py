"""Measure how quantized models run: decoding, memory and loading, beside torch, llama.cpp and the package hqq.

    python -m bench.ops.runtime products [--output bench/results]
    python -m bench.ops.runtime calls [--threads 1]
    python -m bench.ops.runtime generate MODEL [--output bench/results]
    python -m bench.ops.runtime shape FOLDER [--output bench/results]     # the first time, it builds the models there

products: multiply matrices of the size of a 1B model by one vector each; together they are larger than the caches.
calls: measure the time that Python adds to the product of a quantized layer.
generate: decode greedily with several forms of a model, in turns. On a busy machine, compare the processor time, with
OMP_NUM_THREADS=1 --threads 1, instead of tokens/s.
shape: build a Llama of a billion random weights; load and decode each variant in its own process.
If a peer is not installed, it is left out, and a message names it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quantrature as qtr
from bench.harness import ggml
from bench.harness.heading import heading
from bench.harness.machine import SETTLE_SECONDS
from quantrature import ops

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
"""Llama 3.2 1B with a vocabulary of 32,000: 973 million weights in the blocks, 66 million in the embedding."""

_OUTLIERS = {"outlier_fraction": 0.005}
QUANTIZED: dict[str, dict[str, Any]] = {
    "4 bits, g64": {"bits": 4, "group_size": 64, **_OUTLIERS},
    "4 bits, g64, embedding 8 bits": {"bits": 4, "group_size": 64, **_OUTLIERS, "embedding_bits": 8},
    "4 bits, g128, embedding 8 bits": {"bits": 4, "group_size": 128, **_OUTLIERS, "embedding_bits": 8},
    "3 bits, g64, embedding 8 bits": {"bits": 3, "group_size": 64, **_OUTLIERS, "embedding_bits": 8},
    "2 bits, g64, embedding 8 bits": {"bits": 2, "group_size": 64, **_OUTLIERS, "embedding_bits": 8},
}
"""Quantized variants, as arguments of :func:`quantrature.quantize`; each has 0.5 % outliers."""


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call. The calls take turns; each runs once before the run that is measured."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# Products


def products(options: argparse.Namespace) -> str:
    """Measure the products of several matrices and one vector each."""
    torch.manual_seed(0)
    weights = [torch.randn(8192, 2048) * 0.02 for _ in range(options.matrices)]
    x = torch.ones(1, 2048)
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}

    def add(name: str, call: Callable[[], Any], bits: float) -> None:
        calls[name], sizes[name] = call, bits

    halves = [w.bfloat16() for w in weights]
    half = x.bfloat16()
    add("torch, float32", lambda: [torch.nn.functional.linear(x, w) for w in weights], 32)
    add("torch, bfloat16", lambda: [torch.nn.functional.linear(half, w) for w in halves], 16)
    for kind, bits in (("q4_0", 4.5), ("q4_K", 4.5)):
        try:
            theirs = ggml.Products(kind, weights, [x[0]] * len(weights), options.threads)
            theirs()
            exact = weights[0] @ x[0]
            error = float((theirs.result(0) - exact).norm() / exact.norm())
            if not error < 0.2:
                raise OSError(f"its products are off by {error}")
            add(f"llama.cpp, {kind}", theirs, bits)
        except (ImportError, OSError) as e:
            print(f"llama.cpp {kind} left out: {e}", file=sys.stderr)
    modes = [m for m in ("float32", "int8") if m == "float32" or "activations" in ops.matvec.__annotations__]
    for bits, share in ((8, 0.0), (4, 0.0), (4, 0.005), (3, 0.005), (2, 0.005)):
        packed, stored = [], 0
        for w in weights:
            outliers = ops.extract_outliers(w, fraction=share)[1] if share else None
            q = ops.quantize(w, bits, 64, exclude=outliers)
            packed.append(ops.PackedMatrix.of(q, outliers))
            stored += q.nbytes + (6 * outliers.nnz if outliers else 0)
        for mode in modes:
            extra = {} if mode == "float32" else {"activations": mode}
            name = f"quantrature, {bits} bits, g64, {share:.1%} outliers, {mode} activations"
            per_weight = 8 * stored / sum(w.numel() for w in weights)
            add(name, lambda packed=packed, extra=extra: [p.matvec(x, **extra) for p in packed], per_weight)
    times = in_turns(calls, options.rounds)
    base = times["torch, float32"]
    lines = [
        "| product | bits a weight | ms a matrix | GB/s | times float32 |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {sizes[name]:.2f} | {1e3 * t / len(weights):.3f} "
            f"| {sizes[name] / 8 * 8192 * 2048 * len(weights) / t / 1e9:.1f} | {base / t:.2f} |"
            for name, t in times.items()
        ),
    ]
    return f"{len(weights)} matrices of 8192 x 2048, one vector each.\n\n" + "\n".join(lines)


# Calls


def calls(options: argparse.Namespace) -> str:
    """Measure the thread's time of a quantized layer with one vector, beside the product in the core alone."""
    lines = [
        "| matrix | core, us | layer, us | bfloat16, us | with bias, us | F.linear, float32, us |",
        "|---|" + "---|" * 5,
    ]
    for rows, cols in ((8, 64), (192, 576), (576, 576), (1536, 576), (576, 1536)):
        times = [min(time_of(call) for _ in range(options.rounds)) for call in calls_of(rows, cols)]
        lines.append(f"| {rows} x {cols} | " + " | ".join(f"{us:.1f}" for us in times) + " |")
    return "\n".join(lines)


def calls_of(rows: int, cols: int) -> list[Callable[[], Any]]:
    from quantrature.nn import QuantLinear
    from quantrature.packed import MatrixSpec, QuantizedMatrix

    weight = torch.randn(rows, cols)
    matrix = QuantizedMatrix(ops.quantize(weight, 4, 64))
    layer, with_bias = (
        QuantLinear(MatrixSpec.of(matrix), bias) for bias in (None, torch.nn.Parameter(torch.randn(rows)))
    )
    layer.store(matrix)
    with_bias.store(matrix)
    x, y = torch.randn(1, 1, cols), torch.empty(rows)
    half = x.bfloat16()
    core = ops.PackedMatrix.of(matrix.dense).core
    return [
        lambda: core.multiply(x.data_ptr(), 0, y.data_ptr(), 0, 1),
        lambda: layer(x),
        lambda: layer(half),
        lambda: with_bias(x),
        lambda: torch.nn.functional.linear(x, weight),
    ]


def time_of(call: Callable[[], Any], times: int = 300) -> float:
    """Return the microseconds of the thread per call."""
    call()
    start = time.thread_time_ns()
    for _ in range(times):
        call()
    return (time.thread_time_ns() - start) / times / 1e3


# Generation


def decode(model: Any, tokens: int, prompt: int = 16) -> tuple[float, float]:
    """Return tokens per second and processor seconds per token of greedy decoding, without the prompt."""
    ids = torch.arange(10, 10 + prompt).view(1, -1)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def took(new: int) -> tuple[float, float]:
        start, busy = time.perf_counter(), time.process_time()
        model.generate(ids, max_new_tokens=new, **settings)
        return time.perf_counter() - start, time.process_time() - busy

    with torch.no_grad():
        took(2)
        first, all_of_them = took(1), took(tokens + 1)
    return tokens / (all_of_them[0] - first[0]), (all_of_them[1] - first[1]) / tokens


def generate(options: argparse.Namespace) -> str:
    """Measure decoding with several forms of a model, in turns."""
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)

    variants = {"float32": load(torch.float32), "bfloat16": load(torch.bfloat16)}
    try:
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        theirs = load(torch.float32)
        AutoHQQHFModel.quantize_model(
            theirs, BaseQuantizeConfig(nbits=4, group_size=64, axis=1), compute_dtype=torch.float32, device="cpu"
        )
        variants["package hqq, 4 bits, g64, float32"] = theirs
    except Exception as e:  # a message shows why a peer is missing or fails
        print(f"hqq left out: {e}", file=sys.stderr)
    for bits in (4, 3, 2):
        for dtype in (torch.float32, torch.bfloat16):
            model = qtr.quantize(load(dtype), bits=bits, group_size=64, outlier_fraction=0.005)
            variants[f"quantrature, {bits} bits, g64, 0.5 % outliers, {str(dtype)[6:]}"] = model
    for dtype in (torch.float32, torch.bfloat16):
        model = qtr.quantize(load(dtype), bits=4, group_size=64, embedding_bits=8)
        variants[f"quantrature, 4 bits, g64, embedding 8 bits, {str(dtype)[6:]}"] = model
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, model in variants.items():
            speeds[name].append(decode(model, options.tokens))
    lines = [
        "| model | tokens/s | times float32 | least ms of the processor a token | of float32 |",
        "|---|---|---|---|---|",
    ]
    middle = {name: statistics.median(speed for speed, _ in found) for name, found in speeds.items()}
    busy = {name: 1e3 * min(seconds for _, seconds in found) for name, found in speeds.items()}
    lines += [
        f"| {name} | {middle[name]:.1f} | {middle[name] / middle['float32']:.2f} "
        f"| {busy[name]:.1f} | {busy[name] / busy['float32']:.2f} |"
        for name in speeds
    ]
    return f"{Path(options.model).name}, {options.tokens} tokens, one sequence.\n\n" + "\n".join(lines)


# A billion weights


def build(folder: Path) -> None:
    """Write the dense model, unless it is there already."""
    if not (folder / "dense" / "config.json").exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM._init_weights = lambda self, module: None  # keep the initial weights of torch, which is faster
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16")).to(torch.bfloat16)
        model.save_pretrained(folder / "dense")


def name_of(setting: dict[str, Any]) -> str:
    return "-".join(f"{key}{value}" for key, value in setting.items())


class Memory:
    """Peak memory of this process in a ``with`` block, in bytes: ``own`` without mapped files, ``all`` with them."""

    def __init__(self) -> None:
        self.own = self.all = 0

    def __enter__(self) -> Memory:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.look()

    def look(self) -> tuple[int, int]:
        """Return the bytes in use now, without and with mapped pages of files."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own, everything = (int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
        self.own, self.all = max(self.own, own), max(self.all, everything)
        return own, everything

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def one(options: argparse.Namespace) -> None:
    """Load one variant, decode, and print times and memory as JSON."""
    from transformers import AutoModelForCausalLM

    settings = json.loads(options.settings)
    wish = settings.pop("wish", None)
    if wish:
        settings["quantization_config"] = qtr.QuantratureConfig(**wish)
    settings["dtype"] = getattr(torch, settings["dtype"])
    memory = Memory()
    before, _ = memory.look()
    start = time.perf_counter()
    with memory:
        model = AutoModelForCausalLM.from_pretrained(options.model, **settings)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "load_peak": memory.own - before}
    found["load_peak_with_files"] = memory.all
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    if options.keep:
        model.save_pretrained(options.keep)
    else:
        with Memory() as memory:
            found["tokens_per_second"], _ = decode(model, options.tokens)
        prepared = {name: of_products(layer) for name, layer in qtr_layers(model).items()}
        found |= {"run_peak": memory.own - before, "weights": sum(tensors.values()) + sum(prepared.values())}
        found["matrices"] = sum(
            prepared[name] + sum(t.nbytes for t in layer.stored().values())
            for name, layer in qtr_layers(model).items()
            if ".layers." in name
        )
    print(json.dumps(found))


def of_products(layer: Any) -> int:
    """Return the bytes that products of a layer need besides the stored tensors.

    They are the residuals of outliers in float32, and a copy of row offsets that are stored in 16 bits.
    """
    stored = layer.stored()
    if "outlier_values" not in stored:
        return 0
    offsets = stored["outlier_row_offsets"]
    return 4 * len(stored["outlier_values"]) + (4 * len(offsets) if offsets.dtype == torch.uint16 else 0)


def qtr_layers(model: Any) -> dict[str, Any]:
    from quantrature.nn import quantized_layers

    return quantized_layers(model)


def shape(options: argparse.Namespace) -> str:
    """Measure all variants of the model with a billion weights, one after another."""
    folder = Path(options.model)
    build(folder)

    def run(model: Path, settings: dict[str, Any], keep: Path | None = None) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.ops.runtime", "one", str(model), "--settings", json.dumps(settings)]
        command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run(
                command + (["--keep", str(keep)] if keep else []), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            if done.returncode:
                errors.seek(0)
                raise RuntimeError(errors.read()[-2000:])
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    record = folder / "quantizing.json"
    quantizing = json.loads(record.read_text()) if record.exists() else {}
    for name, wish in QUANTIZED.items():
        if name not in quantizing:
            quantizing[name] = run(folder / "dense", {"dtype": "bfloat16", "wish": wish}, folder / name_of(wish))
            record.write_text(json.dumps(quantizing))
    if options.build_only:
        return "built"
    rows = {
        "float32": run(folder / "dense", {"dtype": "float32"}),
        "bfloat16": run(folder / "dense", {"dtype": "bfloat16"}),
    }
    for name, wish in QUANTIZED.items():
        for dtype in ("float32", "bfloat16"):
            rows[f"{name}, {dtype}"] = run(folder / name_of(wish), {"dtype": dtype})
    base, half = rows["float32"], rows["bfloat16"]
    blocks = (
        16
        / 8
        * sum(  # bytes of the blocks' matrices in bfloat16
            SHAPE["num_hidden_layers"] * n for n in (2048 * 2048 * 2, 2048 * 512 * 2, 2048 * 8192 * 3)
        )
    )
    gb = 1e9
    lines = [
        "| model | tokens/s | times float32 | weights GB | of bfloat16 | blocks' matrices, of bfloat16 | s to load "
        "| most memory loading, GB | and running, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        matrices = f"{r['matrices'] / blocks:.3f}" if r["matrices"] else ""
        lines.append(
            f"| {name} | {r['tokens_per_second']:.2f} | {r['tokens_per_second'] / base['tokens_per_second']:.2f} "
            f"| {r['weights'] / gb:.3f} | {r['weights'] / half['weights']:.3f} | {matrices} | {r['load_seconds']:.1f} "
            f"| {r['load_peak'] / gb:.2f} | {r['run_peak'] / gb:.2f} |"
        )
    lines += ["", "| quantized while loading | most memory, GB | s |", "|---|---|---|"]
    lines += [f"| {name} | {r['load_peak'] / gb:.2f} | {r['load_seconds']:.1f} |" for name, r in quantizing.items()]
    return (
        "A Llama of a billion random weights: 973 million in the blocks, 66 million in an embedding that the head "
        f"shares, which is dense unless said. Quantized with 0.5 % outliers; {options.tokens} tokens of one sequence. "
        "Memory is the process's own, less what it had before it loaded; what products prepare once is counted as "
        "weights. Dense weights are pages of the file until they are touched where they need no cast.\n\n"
        + "\n".join(lines)
    )


def main() -> None:
    """Measure, print the table, and save it if ``--output`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["products", "calls", "generate", "shape", "one"])
    parser.add_argument("model", nargs="?", help="folder of the model; for shape, folder to build the models in")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build-only", action="store_true", help="for shape: only write the models")
    parser.add_argument("--settings", help="for one, which shape calls: settings of the variant, as JSON")
    parser.add_argument("--keep", help="for one: folder to save the variant in, instead of decoding")
    parser.add_argument("--output", type=Path, help="folder for a Markdown file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    qtr.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.part == "one":
        one(options)
        return
    table = {"products": products, "calls": calls, "generate": generate, "shape": shape}[options.part](options)
    head = heading("bench.ops.runtime", options.threads)
    text = f"{head}\n\n{table}\n"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"runtime-{options.part}" + (f"-{Path(options.model).name}" if options.part == "generate" else "")
        (options.output / f"{name}.md").write_text(f"# Runtime: {options.part}\n\n{text}")


if __name__ == "__main__":
    main()
