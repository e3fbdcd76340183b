"""Measure the time of the ops, beside functions of other packages (peers) and the machine's own reads and copies.

    python -m bench.ops.peers [--side 4096] [--rounds 9] [--threads 2] [--only topk] [--json] [--output bench/results]

The whole table takes about three minutes on two cores.

In each round, the machine, the op and its peer take turns, so that other load on the machine affects all three. Each is
called for some milliseconds before the call that counts, as in a loop over the layers of a model. A time is the median
over the rounds; a ratio is the median of the ratios of the rounds. With --best, minima are taken instead; use it on a
machine that is busy with other work. If a peer is not installed, its row says so. If both the op and its peer can write
into a given output, the output is allocated beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantrature
from bench.harness import ggml
from bench.harness.heading import command
from bench.harness.machine import SETTLE_SECONDS, Machine, machine
from quantrature import ops

Call = Callable[[], Any]
Make = Callable[[], Call]

SLOW_SECONDS = 1.0
"""What takes longer is timed once."""

WARM_SECONDS = 0.02
"""Time to call an op before the call that counts, so that threads are awake and caches are warm."""


class Data:
    """The arrays that rows share: a matrix (std 0.02; one in 839 numbers, at random, times 8) and others."""

    def __init__(self, side: int) -> None:
        torch.manual_seed(0)
        self.side = side
        self.w = torch.randn(side, side) * 0.02
        self.w.view(-1)[torch.randperm(self.w.numel())[: self.w.numel() // 839]] *= 8
        self.acc = torch.zeros_like(self.w)
        self.k = int(self.w.numel() * 0.005)

    @cached_property
    def gradient(self) -> torch.Tensor:
        """Random numbers of the shape of the matrix."""
        return torch.randn_like(self.w)

    @cached_property
    def half_gradient(self) -> torch.Tensor:
        """The same in bfloat16."""
        return self.gradient.bfloat16()

    @cached_property
    def image(self) -> torch.Tensor:
        """Quantized weights, at distance 1 from the matrix.

        pqi_finalize multiplies by this distance, so repeated calls in place do not change the magnitude of its input.
        """
        return self.w + torch.where(self.gradient < 0, -1.0, 1.0)

    @cached_property
    def out(self) -> torch.Tensor:
        """Output of the shape of the matrix."""
        return torch.zeros_like(self.w)

    @cached_property
    def bytes(self) -> torch.Tensor:
        """A random byte for each weight."""
        return torch.randint(0, 256, (self.side, self.side), dtype=torch.uint8)

    @cached_property
    def bytes_out(self) -> torch.Tensor:
        """Output for bytes."""
        return torch.zeros_like(self.bytes)

    @cached_property
    def importance(self) -> torch.Tensor:
        """Importance of each weight in the first row."""
        return torch.rand(self.side, generator=torch.Generator().manual_seed(0))

    @cached_property
    def vector(self) -> torch.Tensor:
        """Vector for products."""
        return torch.randn(self.side)

    @cached_property
    def flat(self) -> np.ndarray:
        """The matrix as a NumPy vector."""
        return self.w.numpy().ravel()


@dataclass(frozen=True)
class Row:
    """A row of the table: an op, its peer, and functions that make their calls and fail if the package is missing."""

    op: str
    goal: str
    unit: str
    ours: Make
    peer: str
    theirs: Make


def _hqq(d: Data, bits: int, axis: int, optimize: bool) -> Call:
    from hqq.core.quantize import Quantizer

    return lambda: Quantizer.quantize(
        d.w, nbits=bits, group_size=64, optimize=optimize, axis=axis, device="cpu", compute_dtype=torch.float32
    )


def _quanto(d: Data, dequantize: bool) -> Call:
    from optimum.quanto import qint4, quantize_weight
    from optimum.quanto.tensor import MaxOptimizer

    def quantize() -> Any:
        scale, shift = MaxOptimizer()(d.w, qint4, 0, 64)
        return quantize_weight(d.w, qint4, 0, scale, shift, 64)

    return quantize().dequantize if dequantize else quantize


def _bitsandbytes(d: Data, dequantize: bool) -> Call:
    import bitsandbytes.functional as f

    codes, state = f.quantize_4bit(d.w, blocksize=64, quant_type="nf4")
    if dequantize:
        return lambda: f.dequantize_4bit(codes, state)
    return lambda: f.quantize_4bit(d.w, blocksize=64, quant_type="nf4")


def _ggml_quantize(d: Data) -> Call:
    return partial(ggml.quantizer("q4_0"), d.w.data_ptr(), d.bytes_out.data_ptr(), d.side, d.side)


def _hqq_dequantize(d: Data) -> Call:
    from hqq.core.quantize import Quantizer

    codes, meta = _hqq(d, 4, 1, False)()
    return lambda: Quantizer.dequantize(codes, meta)


def _dequantize(d: Data) -> Call:
    quantized = ops.quantize(d.w, 4, 64)
    return lambda: ops.dequantize(quantized, out=d.out)


def _scipy_kurtosis(d: Data, axis: int | None) -> Call:
    from scipy.stats import kurtosis

    return lambda: kurtosis(d.w.numpy(), axis=axis)


def _torch_kurtosis(d: Data) -> Call:
    def call() -> torch.Tensor:
        apart = d.w - d.w.mean()
        return (apart**4).mean() / (apart * apart).mean() ** 2 - 3

    return call


def _torch_split(d: Data) -> Call:
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        keep = d.w.abs() >= torch.topk(d.w.abs().view(-1), d.k, sorted=False).values.min()
        return (d.w * keep).to_sparse_csr(), d.w.masked_fill(keep, 0)

    return call


def _finalize_and_select(d: Data) -> Call:
    sums = d.gradient.clone()

    def call() -> Any:
        return ops.topk(ops.pqi_finalize(sums, d.w, d.image), d.k)

    return call


def _torch_finalize_and_select(d: Data) -> Call:
    return lambda: torch.topk((d.gradient * (d.image - d.w)).abs_().view(-1), d.k, sorted=False)


def _finalize(d: Data) -> Call:
    sums = d.gradient.clone()
    return lambda: ops.pqi_finalize(sums, d.w, d.image)


def _sklearn_kmeans(d: Data, rows: int) -> Call:
    """Run k-means row by row as users call it: one start by k-means++, float32, on the threads of OpenMP."""
    from sklearn.cluster import KMeans

    weight = d.importance.numpy()
    numbers = [d.w[i].numpy().reshape(-1, 1) for i in range(rows)]

    def fit() -> None:
        for row in numbers:
            KMeans(n_clusters=16, random_state=0, n_init="auto", max_iter=50).fit(row, sample_weight=weight)

    return fit


def _dequantize_nf4(d: Data) -> Call:
    quantized = ops.quantize(d.w, 4, 64, codebook="nf4")
    return lambda: ops.dequantize(quantized, out=d.out)


def _kmeans(d: Data) -> Call:
    row, weight = d.w[0].numpy(), d.importance.numpy()
    return lambda: ops.kmeans_1d(row, 16, weight)


KMEANS_ROWS = 32


def _kmeans_of_rows(d: Data) -> Call:
    rows = d.w[:KMEANS_ROWS].numpy()
    weight = np.ascontiguousarray(np.broadcast_to(d.importance.numpy(), rows.shape))
    return lambda: ops.kmeans_1d(rows, 16, weight)


def _pack(d: Data, bits: int) -> Call:
    codes = d.bytes & (2**bits - 1)
    out = ops.pack(codes, bits)
    return lambda: ops.pack(codes, bits, out=out)


def _unpack(d: Data, bits: int) -> Call:
    packed = ops.pack(d.bytes & (2**bits - 1), bits)
    out = ops.unpack(packed, bits, d.side)
    return lambda: ops.unpack(packed, bits, d.side, out=out)


GPTQ_SIDE = 2048


def _hessian() -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs of a layer, and their Hessian."""
    x = torch.randn(2 * GPTQ_SIDE, GPTQ_SIDE, generator=torch.Generator().manual_seed(0))
    return x, (x.mT @ x / len(x)).contiguous()


def _gptq(d: Data) -> Call:
    weight = d.w[:GPTQ_SIDE, :GPTQ_SIDE].contiguous()
    _, hessian = _hessian()
    grid = ops.quantize(weight, 4, 128)
    return lambda: ops.gptq(weight, hessian, grid)


def _torch_gptq(d: Data) -> Call:
    """Run the usual loop of GPTQ in torch: blocks of 128 columns, one grid for each row, the same Hessian."""
    weight = d.w[:GPTQ_SIDE, :GPTQ_SIDE].contiguous()
    _, hessian = _hessian()

    def run() -> torch.Tensor:
        damped = hessian + 0.01 * hessian.diag().mean() * torch.eye(GPTQ_SIDE)
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
        w, values = weight.clone(), torch.zeros_like(weight)
        step = w.abs().amax(1) / 7
        for first in range(0, GPTQ_SIDE, 128):
            inside = slice(first, first + 128)
            columns, errors, corner = w[:, inside].clone(), torch.zeros(GPTQ_SIDE, 128), inverse[inside, inside]
            for j in range(128):
                values[:, first + j] = (columns[:, j] / step).round().clamp(-8, 7) * step
                errors[:, j] = (columns[:, j] - values[:, first + j]) / corner[j, j]
                columns[:, j:] -= errors[:, j : j + 1] * corner[j, j:]
            w[:, first + 128 :] -= errors @ inverse[inside, first + 128 :]
        return values

    return run


def _accumulate_hessian(d: Data) -> Call:
    x, total = _hessian()
    return lambda: ops.hessian_accumulate(total, x)


def _torch_hessian(d: Data) -> Call:
    x, total = _hessian()
    return lambda: total.addmm_(x.mT, x)


def _table() -> tuple[list[list[float]], list[list[int]], int]:
    """Return an allocation problem as in cpp/bench_allocation.cc: 80 layers of 7 matrices, 9 options, 3.25 bits."""
    normal = np.random.default_rng(0).standard_normal
    counts = 80 * [8192 * rows for rows in (8192, 1024, 1024, 8192, 28672, 28672, 28672)]
    options = [(bits, group) for bits in (2, 3, 4) for group in (32, 64, 128)]
    costs = []
    for sensitivity in np.exp(1.5 * normal(len(counts))):
        costs.append(
            [float(sensitivity * np.exp(0.1 * normal()) * 4.0**-bits * group**0.25) for bits, group in options]
        )
    sizes = [[count * bits // 8 + count // group * 4 for bits, group in options] for count in counts]
    return costs, sizes, sum(counts) * 13 // 32


def _allocate(relative_gap: float) -> Call:
    costs, sizes, budget = _table()
    return lambda: ops.multiple_choice_knapsack(costs, sizes, budget, relative_gap=relative_gap)


def _highs(relative_gap: float) -> Call:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python" / "support"))
    from integer_program import choose

    costs, sizes, budget = _table()
    return lambda: choose(costs, sizes, budget, relative_gap=relative_gap, time_limit=300.0)


def _allocation_rows() -> list[Row]:
    """Return the rows for allocation in a model of 70 billion weights; their ratio to the machine has no meaning."""
    return [
        Row(
            f"allocation, 560 matrices of 9 options, {name}",
            "",
            "read",
            partial(_allocate, gap),
            "HiGHS by scipy",
            partial(_highs, gap),
        )
        for name, gap in (("optimum", 0.0), ("within 1e-4", 1e-4))
    ]


def _none() -> Call:
    raise LookupError("no peer has this op")


def _matvec(d: Data, bits: int, activations: str) -> Call:
    _, outliers = ops.extract_outliers(d.w, count=d.k)
    packed = ops.PackedMatrix.of(ops.quantize(d.w, bits, 64, exclude=outliers), outliers)
    x, y = d.vector.numpy(), np.empty(d.side, np.float32)
    return lambda: packed.matvec(x, out=y, activations=activations)


def _nf4_matvec(d: Data) -> Call:
    _, outliers = ops.extract_outliers(d.w, count=d.k)
    packed = ops.PackedMatrix.of(ops.quantize(d.w, 4, 64, codebook="nf4", exclude=outliers), outliers)
    x, y = d.vector.numpy(), np.empty(d.side, np.float32)
    return lambda: packed.matvec(x, out=y)


def _bitsandbytes_matvec(d: Data) -> Call:
    dequantize = _bitsandbytes(d, True)
    return lambda: dequantize() @ d.vector


def _ggml_matvec(d: Data, name: str) -> Call:
    return ggml.Products(name, [d.w], [d.vector], torch.get_num_threads())


def _hqq_matvec(d: Data) -> Call:
    dequantize = _hqq_dequantize(d)
    return lambda: dequantize().view(d.side, d.side) @ d.vector


def _matvec_rows(d: Data) -> list[Row]:
    """Return the rows for products of a packed matrix with outliers and one vector."""
    peers = [(4, "q4_0"), (4, "q4_K"), (3, "q3_K"), (2, "q2_K")]
    made = [
        Row(
            f"mat-vec {bits}-bit g64 + 0.5 % outliers, {activations}",
            f"1 x {name}",
            "read",
            partial(_matvec, d, bits, activations),
            f"llama.cpp {name}, 8-bit vector",
            partial(_ggml_matvec, d, name),
        )
        for activations in ("float32", "int8")
        for bits, name in peers
    ]
    for peer, theirs in (
        ("hqq dequantize, matmul", lambda: _hqq_matvec(d)),
        ("torch float32", lambda: lambda: d.w @ d.vector),
    ):
        op = "mat-vec 4-bit g64 + 0.5 % outliers, float32"
        made.append(Row(op, "", "read", partial(_matvec, d, 4, "float32"), peer, theirs))
    for peer, theirs in (
        ("bitsandbytes dequantize, matmul", lambda: _bitsandbytes_matvec(d)),
        ("itself on a grid, float32", lambda: _matvec(d, 4, "float32")),
    ):
        op = "mat-vec nf4 g64 + 0.5 % outliers, float32"
        made.append(Row(op, "", "read", lambda: _nf4_matvec(d), peer, theirs))
    return made


def rows(d: Data) -> list[Row]:
    """Return all rows, in the order of the table."""
    return [
        Row(
            "quantize 4-bit g64 (minmax), packed",
            "3 x read",
            "read",
            lambda: lambda: ops.quantize(d.w, 4, 64),
            "ggml q4_0, 1 thread",
            lambda: _ggml_quantize(d),
        ),
        Row(
            "quantize 4-bit g64 (minmax), packed",
            "3 x read",
            "read",
            lambda: lambda: ops.quantize(d.w, 4, 64),
            "optimum-quanto",
            lambda: _quanto(d, False),
        ),
        Row(
            "quantize 4-bit g64 (minmax), packed",
            "3 x read",
            "read",
            lambda: lambda: ops.quantize(d.w, 4, 64),
            "hqq, no optimise",
            lambda: _hqq(d, 4, 1, False),
        ),
        Row(
            "quantize 4-bit g64 (minmax), packed",
            "3 x read",
            "read",
            lambda: lambda: ops.quantize(d.w, 4, 64),
            "bitsandbytes nf4",
            lambda: _bitsandbytes(d, False),
        ),
        Row(
            "HQQ solver 4-bit g64, rows",
            "40 x hqq",
            "read",
            lambda: lambda: ops.quantize(d.w, 4, 64, solver="hqq"),
            "hqq",
            lambda: _hqq(d, 4, 1, True),
        ),
        Row(
            "HQQ solver 3-bit g64, columns",
            "40 x hqq",
            "read",
            lambda: lambda: ops.quantize(d.w, 3, 64, axis=0, solver="hqq"),
            "hqq",
            lambda: _hqq(d, 3, 0, True),
        ),
        Row(
            "dequantize 4-bit g64 to float32",
            "1.5 x copy",
            "copy",
            lambda: _dequantize(d),
            "bitsandbytes nf4",
            lambda: _bitsandbytes(d, True),
        ),
        Row(
            "dequantize 4-bit g64 to float32",
            "1.5 x copy",
            "copy",
            lambda: _dequantize(d),
            "optimum-quanto",
            lambda: _quanto(d, True),
        ),
        Row(
            "dequantize 4-bit g64 to float32",
            "1.5 x copy",
            "copy",
            lambda: _dequantize(d),
            "hqq",
            lambda: _hqq_dequantize(d),
        ),
        Row(
            "quantize nf4 g64, packed",
            "3 x read",
            "read",
            lambda: lambda: ops.quantize(d.w, 4, 64, codebook="nf4"),
            "bitsandbytes",
            lambda: _bitsandbytes(d, False),
        ),
        Row(
            "dequantize nf4 g64 to float32",
            "1.5 x copy",
            "copy",
            lambda: _dequantize_nf4(d),
            "bitsandbytes",
            lambda: _bitsandbytes(d, True),
        ),
        Row(
            "top-k of abs(w), 0.5 %",
            "4 x read",
            "read",
            lambda: lambda: ops.topk(d.w, d.k),
            "torch.topk",
            lambda: lambda: torch.topk(d.w.abs().view(-1), d.k, sorted=False),
        ),
        Row(
            "top-k of abs(w), 0.5 %",
            "4 x read",
            "read",
            lambda: lambda: ops.topk(d.flat, d.k),
            "numpy.argpartition",
            lambda: lambda: np.argpartition(np.abs(d.flat), d.flat.size - d.k)[-d.k :],
        ),
        Row(
            "outliers to CSR and remainder, 0.5 %",
            "3 x copy",
            "copy",
            lambda: lambda: ops.extract_outliers(d.w, count=d.k, out=d.out),
            "torch",
            lambda: _torch_split(d),
        ),
        Row(
            "the same, remainder newly allocated",
            "",
            "copy",
            lambda: lambda: ops.extract_outliers(d.w, count=d.k),
            "torch",
            lambda: _torch_split(d),
        ),
        Row(
            "kurtosis",
            "3 x read",
            "read",
            lambda: lambda: ops.kurtosis(d.w),
            "torch expression",
            lambda: _torch_kurtosis(d),
        ),
        Row(
            "kurtosis",
            "3 x read",
            "read",
            lambda: lambda: ops.kurtosis(d.w),
            "scipy.stats",
            lambda: _scipy_kurtosis(d, None),
        ),
        Row(
            "kurtosis of each row",
            "3 x read",
            "read",
            lambda: lambda: ops.kurtosis(d.w, axis=1),
            "scipy.stats",
            lambda: _scipy_kurtosis(d, 1),
        ),
        Row(
            "PQI accumulate, float32",
            "1 x torch",
            "copy",
            lambda: lambda: ops.pqi_accumulate(d.acc, d.gradient, 1e-3),
            "torch add_",
            lambda: lambda: d.acc.add_(d.gradient, alpha=1e-3),
        ),
        Row(
            "PQI accumulate, bfloat16",
            "6 x torch",
            "copy",
            lambda: lambda: ops.pqi_accumulate(d.acc, d.half_gradient, 1e-3),
            "torch add_",
            lambda: lambda: d.acc.add_(d.half_gradient, alpha=1e-3),
        ),
        Row(
            "PQI finalize (absolute)",
            "",
            "read",
            lambda: _finalize(d),
            "torch",
            lambda: lambda: (d.gradient * (d.image - d.w)).abs_(),
        ),
        Row(
            "PQI finalize and global top-k, 0.5 %",
            "6 x read",
            "read",
            lambda: _finalize_and_select(d),
            "torch",
            lambda: _torch_finalize_and_select(d),
        ),
        Row(
            "weighted 1-D k-means, 16 centroids, one row",
            "50 x scikit-learn",
            "read",
            lambda: _kmeans(d),
            "scikit-learn",
            lambda: _sklearn_kmeans(d, 1),
        ),
        Row(
            f"weighted 1-D k-means, 16 centroids, {KMEANS_ROWS} rows",
            "50 x scikit-learn",
            "read",
            lambda: _kmeans_of_rows(d),
            "scikit-learn",
            lambda: _sklearn_kmeans(d, KMEANS_ROWS),
        ),
        *(
            Row(f"{name} {bits}-bit codes", "1.5 x own bytes", f"{name} {bits}", partial(make, d, bits), "-", _none)
            for name, make in (("pack", _pack), ("unpack", _unpack))
            for bits in range(1, 9)
        ),
        Row(
            "GPTQ 4-bit g128, 2048 x 2048, factor included",
            "5 x torch",
            "read",
            lambda: _gptq(d),
            "torch, blocked",
            lambda: _torch_gptq(d),
        ),
        Row(
            "Hessian of 4096 tokens, 2048 inputs",
            "1 x torch",
            "read",
            lambda: _accumulate_hessian(d),
            "torch addmm_",
            lambda: _torch_hessian(d),
        ),
        *_allocation_rows(),
        *_matvec_rows(d),
    ]


def _own_time(machine: Machine, d: Data, unit: str) -> Callable[[], float]:
    """Return a function that gives the machine's seconds for the memory that an op must read and write."""
    if unit == "read":
        return lambda: machine.read(d.w)
    if unit == "copy":
        return lambda: machine.copy(d.w, d.out)
    name, bits = unit.split()
    codes, packed = d.bytes.view(-1), d.bytes_out.view(-1)[: d.bytes.numel() * int(bits) // 8]
    return (lambda: machine.move(codes, packed)) if name == "pack" else (lambda: machine.move(packed, codes))


def _warm_up(call: Callable[[], Any]) -> None:
    time.sleep(SETTLE_SECONDS)
    end = time.perf_counter() + WARM_SECONDS
    call()
    while time.perf_counter() < end:
        call()


def _seconds(call: Call, warm: bool) -> float:
    if warm:
        _warm_up(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _prepare(make: Make) -> tuple[Call | None, str, float]:
    """Return the call, or ``None`` and the reason that there is none; and the seconds of its first run."""
    try:
        call = make()
        seconds = _seconds(call, warm=False)
    except Exception as e:  # the table shows why a peer is missing or fails
        return None, f"{type(e).__name__}: {e}".splitlines()[0][:100], 0.0
    return call, "", seconds


def measure(row: Row, d: Data, machine: Machine, rounds: int, best: bool) -> dict[str, Any]:
    """Measure a row: medians or minima in milliseconds, and the ratios."""
    result: dict[str, Any] = {"op": row.op, "goal": row.goal, "unit": row.unit, "peer": row.peer}
    calls: dict[str, Call] = {}
    slow: dict[str, float] = {}
    for name, make in (("ours", row.ours), ("peer", row.theirs)):
        call, reason, first = _prepare(make)
        if call is None:
            result[f"{name}_absent"] = reason
        else:
            calls[name] = call
            if first > SLOW_SECONDS:
                slow[name] = first
    if "ours" not in calls:
        return result
    own_time = _own_time(machine, d, row.unit)
    times: dict[str, list[float]] = {name: [] for name in ("machine", *calls)}
    for _ in range(rounds):
        _warm_up(own_time)
        times["machine"].append(own_time())
        for name, call in calls.items():
            times[name].append(slow[name] if name in slow else _seconds(call, warm=True))
    pick = min if best else statistics.median

    def ratio(of: str, to: str) -> float:
        if best:
            return min(times[of]) / min(times[to])
        return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))

    result |= {f"{name}_ms": pick(t) * 1e3 for name, t in times.items()}
    result["ratio"] = ratio("ours", "machine")
    if "peer" in calls:
        result["speedup"] = ratio("peer", "ours")
    result["met"] = _met(result)
    return result


def _met(result: dict[str, Any]) -> bool | None:
    """Return whether the op reaches its goal: at most a multiple of the machine's time, or at least a speedup."""
    factor, _, what = result["goal"].partition(" x ")
    if what in ("read", "copy", "own bytes"):
        return bool(result["ratio"] <= float(factor))
    return bool(result["speedup"] >= float(factor)) if what and "speedup" in result else None


def _number(x: float) -> str:
    return f"{x:.3f}" if x < 1 else f"{x:.2f}"


LIMITS = {
    "quantize": "reading; a little arithmetic that fetching ahead does not hide",
    "HQQ solver": "arithmetic: up to 20 iterations on every number in the cache",
    "dequantize": "writing the result",
    "top-k": "reading; then one thread, which finds the k-th of the candidates",
    "outliers": "reading and writing, in one pass; then as top-k",
    "the same, remainder": "reading, and pages that the system hands out",
    "kurtosis": "arithmetic in double: two sweeps over each chunk in the cache",
    "PQI accumulate": "memory: two matrices read, one written",
    "PQI finalize (": "memory: three matrices read, one written",
    "PQI finalize and": "memory: the same, then as top-k",
    "weighted 1-D k-means": "of one row: half in divisions of doubles, a third in the radix sort",
    "pack": "the third-level cache, which holds the codes; 16-byte shuffles",
    "unpack": "the third-level cache, which holds the codes; 16-byte shuffles",
    "GPTQ": "arithmetic in float, and one thread in the factor",
    "Hessian": "arithmetic in float",
    "mat-vec": "arithmetic: codes become bytes or floats in registers, 8-bit products",
}
"""Beginning of the name of an op to the limit of its speed, as found with bench/ops/cpp and variants of the kernels."""


def _limit(op: str) -> str:
    return next((limit for beginning, limit in LIMITS.items() if op.startswith(beginning)), "")


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| op | ours ms | machine ms | ratio | goal | peer | peer ms | our speedup | met | limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "ours_absent" in r:
            lines.append(
                f"| {r['op']} | not in this build: {r['ours_absent']} | | | {r['goal']} | {r['peer']} | | | | |"
            )
            continue
        peer_ms, speedup = "" if r["peer"] == "-" else f"left out: {r.get('peer_absent', '')}", ""
        if "speedup" in r:
            peer_ms, speedup = _number(r["peer_ms"]), _number(r["speedup"])
        met = {True: "yes", False: "no", None: ""}[r["met"]]
        lines.append(
            f"| {r['op']} | {_number(r['ours_ms'])} | {r['unit']} {_number(r['machine_ms'])} | {r['ratio']:.2f} "
            f"| {r['goal']} | {r['peer']} | {peer_ms} | {speedup} | {met} | {_limit(r['op'])} |"
        )
    return "\n".join(lines)


def about(d: Data, own: Machine, rounds: int) -> str:
    """Return a sentence about the machine and the speed of its memory."""
    size = d.w.nbytes
    ways: dict[str, Callable[[], float]] = {
        "read plainly": lambda: own.seconds(own.READ, d.w, d.w, size),
        "read four parts in turn": lambda: own.seconds(own.READ_STREAMS, d.w, d.w, size),
        "torch sum": lambda: _seconds(d.w.sum, warm=False),
        "copy plainly": lambda: own.seconds(own.COPY, d.w, d.out, size),
        "copy past the cache": lambda: own.seconds(own.COPY_PAST_CACHE, d.w, d.out, size),
        "torch copy_": lambda: _seconds(lambda: d.out.copy_(d.w), warm=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(rounds, 9)):
        for name, way in ways.items():
            _warm_up(way)
            times[name].append(way())
    figures = ", ".join(f"{name} {statistics.median(t) * 1e3:.2f} ms" for name, t in times.items())
    return f"{machine(own.threads)}. The machine's own times for the matrix: {figures}"


def main() -> None:
    """Measure, print the table, and save it if ``--output`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the matrix")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose op contains this text")
    parser.add_argument("--best", action="store_true", help="minima instead of medians")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    parser.add_argument("--output", type=Path, help="folder for a Markdown file named after the date")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    quantrature.set_num_threads(options.threads)
    torch.set_grad_enabled(False)

    d = Data(options.side)
    machine = Machine(options.threads)
    where = about(d, machine, options.rounds)
    results = []
    for row in rows(d):
        if options.only in row.op:
            print(f"{row.op} / {row.peer}", file=sys.stderr)
            results.append(measure(row, d, machine, options.rounds, options.best))
    if options.json:
        print(json.dumps({"machine": where, "side": options.side, "rows": results}))
    else:
        print(f"{where}\n\n{table(results)}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        text = (
            f"# Ops beside their peers, {date.today()}\n\n    {command('bench.ops.peers')}\n\n{where}. "
            f"{options.side} x {options.side} "
            f"float32 unless stated; {'minima' if options.best else 'medians'} of {options.rounds} rounds, in which "
            f"machine, ours and peer take turns.\n\n{table(results)}\n"
        )
        (options.output / f"peers-{date.today()}.md").write_text(text)


if __name__ == "__main__":
    main()
