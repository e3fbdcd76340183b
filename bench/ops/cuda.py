"""Measure the time of every kernel of the CUDA backend, on a machine with an NVIDIA GPU.

    PYTHONPATH=python python -m bench.ops.cuda [--output cuda.json] [--small]

bench/ops/cuda_quick.sh builds and checks the backend first, and then runs this script. The script measures every kernel
with CUDA events, and compares it with the bandwidth of a copy on the same device. Calls that do not wait for the device
are recorded into a CUDA graph, over more memory than the caches hold, so that only the work of the device is measured.
Other calls, and passes through a model with and without PQI, are measured as a caller sees them. If bitsandbytes and
hqq are installed, their products are measured, too. At the end, the script prints a table; the JSON file has all
figures. Without a GPU, the script says so and does nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHED = 256 << 20
"""Bytes that no cache of a GPU holds."""
REPEATS = 7
LONG = 0.05
"""Seconds of a call that is repeated less often."""


class Timer:
    """Times calls on the current device."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def _elapsed(self, body: Callable[[], Any]) -> float:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        start.record()
        body()
        end.record()
        self.torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def waiting(self, call: Callable[[], Any]) -> float:
        """Return the median seconds of a call that may wait for the device."""
        call()
        first = self._elapsed(call)
        return statistics.median(self._elapsed(call) for _ in range(3 if first > LONG else REPEATS))

    def queued(self, calls: list[Callable[[], Any]], rounds: int = 5) -> float:
        """Return the median seconds per call, for calls that only queue work; they are recorded once and replayed."""
        for call in calls:
            call()
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()

        def replays() -> None:
            for _ in range(rounds):
                graph.replay()

        return statistics.median(self._elapsed(replays) for _ in range(REPEATS)) / (rounds * len(calls))


def stream_rows(timer: Timer, rows: int, cols: int) -> list[dict[str, Any]]:
    """Measure the kernels that read or write a large tensor once."""
    import torch

    from quantrature import ops

    n = rows * cols
    torch.manual_seed(0)
    w = torch.randn(rows, cols, device="cuda")
    image, acc, out = w + 0.01, torch.zeros_like(w), torch.empty_like(w)
    half = w.bfloat16()
    q = ops.quantize(w, bits=4, group_size=64)
    codes = q.unpack()
    meta = q.scale.nbytes + q.zero.nbytes
    found: list[dict[str, Any]] = []

    def row(name: str, bytes_moved: float, seconds: float) -> None:
        found.append({"name": name, "bytes": bytes_moved, "seconds": seconds, "bandwidth": bytes_moved / seconds})
        print(f"  {name}: {seconds * 1e6:.1f} us", flush=True)

    row("copy (torch)", 8 * n, timer.queued([lambda: out.copy_(w)]))
    row("pqi_accumulate f32", 12 * n, timer.queued([lambda: ops.pqi_accumulate(acc, w, 0.5)]))
    row("pqi_accumulate bf16", 10 * n, timer.queued([lambda: ops.pqi_accumulate(acc, half, 0.5)]))
    row("pqi_finalize", 16 * n, timer.queued([lambda: ops.pqi_finalize(acc, w, image, out=out)]))
    row("interpolate", 12 * n, timer.queued([lambda: ops.interpolate(w, image, 0.5, out=out)]))
    row("dequantize 4 bits to bf16", 2.5 * n + meta, timer.queued([lambda: ops.dequantize(q, out=half)]))
    row("unpack 4 bits", 1.5 * n, timer.queued([lambda: ops.unpack(q.codes, 4, cols, out=codes)]))
    row("pqi_sum", 12 * n, timer.waiting(lambda: ops.pqi_sum(acc, w, image)))
    row("moments, tensor", 4 * n, timer.waiting(lambda: ops.moments(w)))
    row("moments, rows", 4 * n, timer.waiting(lambda: ops.moments(w, axis=1)))
    row("moments, columns", 4 * n, timer.waiting(lambda: ops.moments(w, axis=0)))
    row("pack 4 bits", 1.5 * n, timer.waiting(lambda: ops.pack(codes, 4, out=q.codes)))
    row("quantize minmax, 4 bits, g64", 4.5 * n + 2 * meta, timer.waiting(lambda: ops.quantize(w, 4)))
    row("quantize mse, 4 bits, g64", 4.5 * n + 2 * meta, timer.waiting(lambda: ops.quantize(w, 4, solver="mse")))
    row("quantize hqq, 4 bits, g64", 4.5 * n + 2 * meta, timer.waiting(lambda: ops.quantize(w, 4, solver="hqq")))
    row("topk 0.5 %", 12 * n, timer.waiting(lambda: ops.topk(w, n // 200)))
    row("extract_outliers 0.5 %", 20 * n, timer.waiting(lambda: ops.extract_outliers(w, fraction=0.005)))
    some = w[: rows // 4]
    weights = some.square()
    row("kmeans, 16 of a row, weighted", 9 * some.numel(), timer.waiting(lambda: ops.kmeans_1d(some, 16, weights)))
    sequences = w[: max(1, rows // 64)].reshape(-1, 256)
    for bits, code in ((2, "3inst"), (4, "3inst"), (2, "hyb")):
        trellis = ops.Trellis(bits, 16, code)
        seconds = timer.waiting(lambda t=trellis: ops.trellis_quantize(sequences, t))
        row(f"trellis search, {bits} bits, {code}", (4 + bits / 8) * sequences.numel(), seconds)
    return found


def step_rows(timer: Timer, layers: int, hidden: int, tokens: int) -> list[dict[str, Any]]:
    """Measure the time of a gradient of a Llama with random bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=32000,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16().to(torch.device("cuda"))
    return [step_row(timer, model, torch.randint(0, config.vocab_size, (1, tokens)))]


def step_row(timer: Timer, model: Any, windows: Any) -> dict[str, Any]:
    """Measure the time of a gradient without PQI, and with PQI, which adds up and checks each gradient."""
    import torch

    from quantrature import ops
    from quantrature.models import find_linears
    from quantrature.models.finiteness import GradientCheck
    from quantrature.models.gradients import gradients_to, next_token_nll

    linears = find_linears(model)
    sums = {linear.name: torch.zeros(linear.parameter.shape, device=linear.parameter.device) for linear in linears}
    check = GradientCheck(sums)
    tokens = windows.numel()

    def take(linear: Any, gradient: Any) -> None:
        ops.pqi_accumulate(sums[linear.name], gradient, 0.25, check(linear.name, gradient, 0.0, range(1)))

    def step() -> None:
        (next_token_nll(model, windows) / tokens).backward()
        check.settle(0.0, range(1))

    with gradients_to(model, linears, lambda linear, gradient: None):
        without = timer.waiting(step)
    with gradients_to(model, linears, take):
        seconds = timer.waiting(step)
    share = (seconds - without) / seconds
    print(f"  PQI in a step of {tokens} tokens: {share:.2%} of {seconds * 1e3:.1f} ms", flush=True)
    weights = sum(total.numel() for total in sums.values())
    about = {"name": "PQI accumulate in the backward pass", "tokens": tokens, "weights": weights}
    return about | {"seconds": seconds, "without": without, "share": share}


def gptq_rows(timer: Timer, rows: int, cols: int, tokens: int) -> list[dict[str, Any]]:
    """Measure the steps of GPTQ for one matrix: sum of the Hessian, its factor on the device, the columns."""
    import torch

    from quantrature import ops

    torch.manual_seed(0)
    w, x = torch.randn(rows, cols, device="cuda"), torch.randn(tokens, cols, device="cuda")
    total = torch.zeros(cols, cols, device="cuda")
    ops.hessian_accumulate(total, x)
    grid = ops.quantize(w, bits=4, group_size=128)
    factor = ops.gptq_factor(total)
    fitting = ops.gptq_factor(total, group_size=128)
    calls = {
        f"Hessian of {tokens} tokens": lambda: ops.hessian_accumulate(total, x),
        "factor, float64": lambda: ops.gptq_factor(total),
        "columns, given grid": lambda: ops.gptq(w, factor, grid),
        "columns, fitted grids": lambda: ops.gptq(w, fitting, bits=4, group_size=128),
        "factor on the CPU and columns": lambda: ops.gptq(w, total, grid),
    }
    found = []
    for name, call in calls.items():
        seconds = timer.waiting(call)
        found.append({"name": name, "shape": (rows, cols), "seconds": seconds})
        print(f"  {name}: {seconds * 1e3:.2f} ms", flush=True)
    return found


def product_rows(timer: Timer, shapes: list[tuple[int, int]], cached: int = CACHED) -> list[dict[str, Any]]:
    """Measure products of packed matrices with 0.5 % outliers and 1 to 64 vectors, beside torch and installed peers."""
    import torch

    from quantrature import ops

    found: list[dict[str, Any]] = []

    def row(name: str, shape: tuple[int, int], vectors: int, bytes_moved: float, seconds: float) -> None:
        kept = {"name": name, "shape": shape, "vectors": vectors, "bytes": bytes_moved, "seconds": seconds}
        found.append(kept | {"bandwidth": bytes_moved / seconds})
        print(f"  {name} {shape} x {vectors}: {seconds * 1e6:.1f} us", flush=True)

    for shape in shapes:
        rows, cols = shape
        torch.manual_seed(0)
        dense_copies = max(2, cached // (2 * rows * cols) + 1)
        dense = [torch.randn(rows, cols, device="cuda").bfloat16() for _ in range(dense_copies)]
        for vectors in (1, 2, 4, 8, 16, 64):
            x = torch.randn(vectors, cols, device="cuda").bfloat16()
            calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense]
            row("torch bf16", shape, vectors, 2 * rows * cols, timer.queued(calls))
        for bits in (4, 3, 2, 8):
            copies = max(2, cached // (rows * cols * bits // 8) + 1)
            rest, outliers = ops.extract_outliers(dense[0].float(), fraction=0.005)
            q = ops.quantize(rest, bits=bits, group_size=64, exclude=outliers)
            packed = []
            for _ in range(copies):
                mine = q.__class__(**{**q.__dict__, "codes": q.codes.clone()})
                packed.append(ops.PackedMatrix.of(mine, outliers))
            residuals = packed[0].residuals
            assert residuals is not None
            moved = q.nbytes + residuals.nbytes
            for vectors in (1, 2, 4, 8, 16, 64):
                x = torch.randn(vectors, cols, device="cuda").bfloat16()
                out = torch.empty(vectors, rows, device="cuda", dtype=torch.bfloat16)
                calls = [lambda p=p, x=x, out=out: p.matmul(x, out=out) for p in packed]
                row(f"matvec {bits} bits, g64, 0.5 %", shape, vectors, moved, timer.queued(calls))
            if bits == 4:
                x = torch.randn(1, cols, device="cuda").bfloat16()
                made = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16)
                calls = [
                    lambda p=p, x=x, made=made: torch.nn.functional.linear(x, ops.dequantize(p.dense, out=made))
                    for p in packed
                ]
                row("dequantize 4 bits, then torch", shape, 1, moved, timer.queued(calls))
        for package, peer in PEERS.items():
            try:
                calls, bytes_moved = peer(dense[0], max(2, cached // (rows * cols // 2) + 1))
            except ImportError as e:
                print(f"  {package} is left out: {e}", flush=True)
                continue
            row(f"{package} 4 bits, g64", shape, 1, bytes_moved, timer.queued(calls))
    return found


Peer = tuple[list[Callable[[], Any]], float]
"""Products of copies of a packed matrix with one vector, and the bytes that each reads."""


def bitsandbytes_product(dense: Any, copies: int) -> Peer:
    """NF4, by its own kernel for one vector."""
    import bitsandbytes as bnb
    import torch

    packed = [bnb.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4") for _ in range(copies)]
    x = torch.randn(1, dense.shape[1], device=dense.device).to(dense.dtype)
    calls = [lambda c=c, s=s: bnb.matmul_4bit(x, c.t(), quant_state=s) for c, s in packed]
    return calls, dense.numel() * (0.5 + 4 / 64)


def hqq_product(dense: Any, copies: int) -> Peer:
    """A grid along the rows, as it is run without further packages: dequantized, then multiplied by torch."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device=dense.device, dtype=dense.dtype)
    linear.weight.data.copy_(dense)
    settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    layer = HQQLinear(linear, settings, compute_dtype=dense.dtype, device=str(dense.device))
    layers = [copy.deepcopy(layer) for _ in range(copies)]
    x = torch.randn(1, dense.shape[1], device=dense.device).to(dense.dtype)

    def product(layer: Any) -> Any:
        with torch.no_grad():
            return layer.forward_pytorch(x)

    meta = layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
    return [lambda layer=layer: product(layer) for layer in layers], layer.W_q.nbytes + meta


PEERS = {"bitsandbytes": bitsandbytes_product, "hqq": hqq_product}


def table(result: dict[str, Any]) -> str:
    """Return the table that is printed at the end."""
    copy = next(r["bandwidth"] for r in result["streams"] if r["name"].startswith("copy"))
    lines = [f"{result['device']}, {result['date']}; copy {copy / 1e12:.2f} TB/s"]
    lines.append(f"{'kernel':34} {'us':>9} {'of copy':>8}")
    for r in result["streams"]:
        lines.append(f"{r['name']:34} {r['seconds'] * 1e6:9.1f} {r['bandwidth'] / copy:8.0%}")
    for r in result["steps"]:
        about = f"{r['seconds'] * 1e3:.1f} ms, {r['tokens']} tokens, {r['weights'] / 1e6:.0f} million weights"
        lines.append(f"{r['name']}: {r['share']:.2%} of a step of {about}")
    for r in result["gptq"]:
        lines.append(f"GPTQ {'x'.join(map(str, r['shape']))}, {r['name']}: {r['seconds'] * 1e3:.2f} ms")
    torch_rows = {(tuple(r["shape"]), r["vectors"]): r for r in result["products"] if r["name"] == "torch bf16"}
    lines.append(f"{'product':34} {'matrix':>12} {'vectors':>7} {'us':>8} {'of copy':>8} {'x torch':>8}")
    for r in result["products"]:
        base = torch_rows[tuple(r["shape"]), r["vectors"]]["seconds"]
        shape = "x".join(map(str, r["shape"]))
        lines.append(
            f"{r['name']:34} {shape:>12} {r['vectors']:7} {r['seconds'] * 1e6:8.1f} {r['bandwidth'] / copy:8.0%} "
            f"{base / r['seconds']:8.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the measurements, and write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / f"cuda-{date.today()}.json")
    parser.add_argument("--small", action="store_true", help="one shape of each kind")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("bench/ops/cuda.py: skipped, it needs torch with CUDA")
        return 0
    if not torch.cuda.is_available():
        print(f"bench/ops/cuda.py: skipped, torch {torch.__version__} sees no NVIDIA GPU")
        return 0
    import quantrature

    devices, why_not = quantrature.cuda_device_count()
    if devices == 0:
        raise SystemExit(f"the CUDA backend does not load: {why_not}")
    result: dict[str, Any] = {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "quantrature": quantrature.__version__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    timer = Timer()
    shapes = [(4096, 4096)] if options.small else [(4096, 4096), (4096, 14336), (14336, 4096)]
    layers = 2 if options.small else 16
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "streams": lambda: stream_rows(timer, 14336, 4096),
        "steps": lambda: step_rows(timer, layers, 2048, 2048),
        "gptq": lambda: gptq_rows(timer, 4096, 4096, 4096),
        "products": lambda: product_rows(timer, shapes),
    }
    for name, rows in work.items():
        print(name, flush=True)
        result[name] = rows()
        options.output.write_text(json.dumps(result, indent=1))
    print(table(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
