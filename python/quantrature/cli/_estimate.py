"""Estimates of size, memory and time for ``--dry-run``."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..methods import METHODS, Statistics, quantize_matrix
from ..models import Linears
from ..ops._arrays import dtype_name
from ..plan import Plan, PlanEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SAMPLE = (256, 1024)
"""Shape (rows, columns) of the random matrix that is quantized to measure the time per weight."""


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a command.

    Attributes:
        bytes: size of the quantized matrices, or of the maps of an analysis.
        other_bytes: size of the model's other tensors.
        memory_bytes: peak memory, model included.
        seconds: time, extrapolated from a small part of the work that was run for the estimate.
        bits_per_weight: of the quantized matrices; ``None`` if the command stores no matrices.
    """

    bytes: int
    other_bytes: int
    memory_bytes: int
    seconds: float
    bits_per_weight: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return the fields as rows of a table."""
        rows = [("bits per weight", f"{self.bits_per_weight:.3f}")] if self.bits_per_weight is not None else []
        return [
            *rows,
            (
                "bytes",
                f"{self.bytes:,}" + (f", and {self.other_bytes:,} for other tensors" if self.other_bytes else ""),
            ),
            ("peak memory", f"{self.memory_bytes / 2**20:,.0f} MiB"),
            ("time", f"about {self.seconds:.1f} s"),
        ]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantizing(model: torch.nn.Module, linears: Linears, plan: Plan, windows: torch.Tensor | None = None) -> Cost:
    """Estimate :func:`quantrature.quantize` for a plan, with the calibration windows if a method needs them."""
    from ..plan.option import stored_bytes
    from ..quantization import peak_bytes

    work = [(linears.find(name), entry) for name, entry in plan if not entry.keeps]
    size = sum(
        stored_bytes(linear.out_features, linear.in_features, entry, dtype_name(linear.parameter))
        for linear, entry in work
    )
    weights = sum(linear.numel for linear, _ in work)
    total = _bytes(model.parameters())
    replaced = sum(linear.numel * linear.parameter.element_size() for linear, _ in work)
    largest = max((linear.numel for linear, _ in work), default=0)
    rates = {entry: _seconds_per_weight(entry) for entry in {_grid_alone(entry) for _, entry in work}}
    seconds = sum(linear.numel * rates[_grid_alone(entry)] for linear, entry in work)
    calibration = 0
    needs = {need for _, entry in work for need in METHODS[entry.method].needs}
    if windows is not None and needs:
        inside = {linear.name: entry for linear, entry in work if linear.in_block}
        calibration = peak_bytes(linears, inside, *windows.shape)
        seconds += _seconds_of_calibration(model, windows, needs)
    return Cost(
        bytes=size,
        other_bytes=total - replaced,
        memory_bytes=total + size + 8 * largest + calibration,
        seconds=seconds,
        bits_per_weight=8 * size / weights if weights else None,
    )


def requantizing(
    model: torch.nn.Module, windows: torch.Tensor, linears: Linears, plan: Plan, settings: Mapping[str, Any]
) -> Cost:
    """Estimate :func:`quantrature.requant` for a plan and these settings of ReQuant."""
    from ..requantization import SHARES, TEMPERATURES

    share = settings["outlier_fraction"] + settings["significant_fraction"]
    kept = replace(plan, entries={name: e if e.keeps else replace(e, outlier_fraction=share) for name, e in plan})
    once = quantizing(model, linears, kept)
    integrals = bool(settings["outlier_fraction"]) + settings["steps"] * bool(settings["significant_fraction"]) + 1
    analysis = analyzing(model, windows, linears, integrals * settings["nodes"], settings["batch_size"])
    trials = len(TEMPERATURES) if settings["selection"] == "temperature" else len(SHARES)
    return replace(
        once,
        memory_bytes=analysis.memory_bytes + 2 * once.bytes,
        seconds=analysis.seconds + once.seconds * (1 + trials * bool(settings["outlier_fraction"])),
    )


def _grid_alone(entry: PlanEntry) -> PlanEntry:
    return replace(entry, reason="", predicted_loss_change=None)


STAGES = 5
"""Number of times calibration runs a block: once per stage of matrices in it, and once for its outputs."""


def _seconds_of_calibration(model: torch.nn.Module, windows: torch.Tensor, needs: set[str]) -> float:
    """Time one forward pass and extrapolate; a backward pass takes about twice as long."""
    from ..models.running import evaluating, logits

    with evaluating(model):
        start = time.perf_counter()
        logits(model, windows[:1])
        once = (time.perf_counter() - start) * len(windows)
    return once * (STAGES * bool(needs - {"fisher"}) + 3 * ("fisher" in needs))


def _seconds_per_weight(entry: PlanEntry) -> float:
    rows, cols = SAMPLE
    sample = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(
        hessian=torch.eye(cols),
        fisher=torch.ones(SAMPLE),
        activations=torch.ones(rows, cols),
        tokens=rows,
    )
    start = time.perf_counter()
    quantize_matrix("sample", sample, entry, statistics=statistics)
    return (time.perf_counter() - start) / sample.numel()


def analyzing(model: torch.nn.Module, windows: torch.Tensor, linears: Linears, passes: int, batch_size: int) -> Cost:
    """Estimate an analysis that computes ``passes`` gradients per window."""
    from ..models.gradients import gradients_to, next_token_nll
    from ..models.running import not_training

    with not_training(model), gradients_to(model, linears, lambda linear, gradient: None):
        start = time.perf_counter()
        next_token_nll(model, windows[:batch_size]).backward()
        seconds = time.perf_counter() - start
    maps = 4 * sum(linear.numel for linear in linears)
    total = _bytes(model.parameters())
    largest = max(linear.parameter.numel() * linear.parameter.element_size() for linear in linears)
    batches = -(-len(windows) // batch_size)
    return Cost(
        bytes=maps,
        other_bytes=0,
        memory_bytes=2 * total + maps + largest,
        seconds=seconds * batches * passes,
    )
