"""Compute the Post-quantization Integral (PQI): the contribution of each weight to the loss change (arXiv 2503.01901).

S_i = (w~_i - w_i) * integral over t in [0, 1] of dF/dw_i at w + t (w~ - w), with the original weights w, the quantized
weights w~ and the loss F. The sum of all S_i is F(w~) - F(w). The sensitivity of a weight is the absolute value of S_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._C import InvalidArgumentError
from ..models import LinearWeight
from ..models.finiteness import GradientCheck, check_loss
from ..models.gradients import Share, gradients_to
from ..models.ranks import add_over_ranks
from .objective import Loss, Objective
from .path import WeightPath, new_on_cpu
from .snapshot import Snapshot

ABS_MODES = ("after_mean", "per_sample", "per_node")


@dataclass(frozen=True)
class Integral:
    """Result of :func:`integrate`.

    Attributes:
        maps: matrix name to the sensitivity of each weight, float32 (out_features, in_features), at least 0; on the
            device of the weights, or in files.
        signed: matrix name to the sum of the signed S_i of its weights, in nats per token.
        gradient_evaluations: forward and backward passes per calibration sample.
    """

    maps: Mapping[str, torch.Tensor]
    signed: Mapping[str, float]
    gradient_evaluations: int


@dataclass(frozen=True)
class _Step:
    """One gradient evaluation: index of the first window of the batch, node t, and quadrature weight."""

    first: int
    t: float
    weight: float


def _units(abs_mode: str, nodes: list[tuple[float, float]], firsts: list[int]) -> Iterator[list[_Step]]:
    """Yield the steps in order, in units; a snapshot can be saved after each unit."""
    if abs_mode == "per_sample":
        for first in firsts:
            yield [_Step(first, t, weight) for t, weight in nodes]
    else:
        for t, weight in nodes:
            for first in firsts:
                yield [_Step(first, t, weight)]


def zeros_for(path: WeightPath, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Return a float32 accumulator for each matrix: on the device of the matrix, or in memory-mapped files."""
    return {
        m.name: new_on_cpu(path.original(m).shape, torch.float32, folder, f"accumulator-{number:05d}.f32")
        if folder is not None or m.device.type == "cpu"
        else torch.zeros(path.original(m).shape, dtype=torch.float32, device=m.device)
        for number, m in enumerate(path.moved)
    }


def integrate(
    path: WeightPath,
    windows: torch.Tensor,
    nodes: list[tuple[float, float]],
    *,
    objective: Objective = Loss(),  # noqa: B008 (it has no state)
    batch_size: int = 1,
    abs_mode: str = "after_mean",
    map_folder: Path | None = None,
    snapshot: Snapshot | None = None,
    advance: Callable[[int], Any] = lambda windows: None,
) -> Integral:
    """Compute the PQI of every weight on a path.

    Args:
        path: path from the original to the quantized weights, inside its ``with`` block.
        windows: token ids, (samples, seqlen). With ``torch.distributed``, each process computes every
            ``world_size``-th sample, and all processes return the whole result.
        nodes: pairs (t, weight) of :func:`quadrature`.
        objective: function that returns the sum of F over the tokens of a batch.
        batch_size: windows per gradient evaluation. Always, F is the mean over the tokens of all samples.
        abs_mode: how the absolute value is taken. ``after_mean``: of (w~ - w) * mean gradient; ``per_sample``: of the
            S_i of each sample, then the mean over the samples; ``per_node``: of the integrand at each node and sample,
            then the mean. The last two use batches of one window.
        map_folder: folder for files that hold the accumulators; ``None`` keeps them in memory.
        snapshot: file to resume from, and to save the state to from time to time.
        advance: function that is called with a number of finished windows, for progress.

    Raises:
        QuantratureError: if a loss or gradient is not finite; the message names module or matrix, sample and node.
        InvalidArgumentError: for an unknown ``abs_mode``.
    """
    if abs_mode not in ABS_MODES:
        raise InvalidArgumentError(f"[analyze] abs_mode must be one of {', '.join(ABS_MODES)}: got {abs_mode!r}")
    if abs_mode != "after_mean":
        batch_size = 1
    tokens_in_all = windows[:, 1:].numel()
    share = Share(windows)

    sums = zeros_for(path, map_folder)
    signed = {m.name: 0.0 for m in path.moved}
    of_sample = {name: torch.zeros_like(total) for name, total in sums.items()} if abs_mode == "per_sample" else {}
    step, samples = _Step(0, 0.0, 0.0), range(0)
    check = GradientCheck(sums)

    def take(linear: LinearWeight, gradient: torch.Tensor) -> None:
        m = path.of(linear)
        gradient = gradient.to(sums[m.name].device)
        flag = check(m.name, gradient, step.t, samples)
        if abs_mode == "per_sample":
            ops.pqi_accumulate(of_sample[m.name], gradient, step.weight, flag)
            return
        if abs_mode == "per_node":
            signed[m.name] += step.weight * ops.pqi_sum(gradient.float(), *path.ends(m, gradient.device))
            gradient.abs_()
        ops.pqi_accumulate(sums[m.name], gradient, step.weight, flag)

    units = list(_units(abs_mode, nodes, list(range(0, len(share.windows), batch_size))))
    done = snapshot.restore(sums, signed) if snapshot is not None else 0
    advance(sum(len(share.batch(step.first, batch_size)[1]) for unit in units[:done] for step in unit))
    at: float | None = None
    with gradients_to(path.model, [m.linear for m in path.moved], take):
        for index, unit in enumerate(units[done:], done + 1):
            for step in unit:
                if at != step.t:
                    path.move_to(step.t)
                    at = step.t
                tokens, samples = share.batch(step.first, batch_size)
                loss = objective(path.model, tokens, samples)
                check_loss(float(loss.detach()), path.model, tokens, step.t, samples)
                (loss / tokens_in_all).backward()
                check.settle(step.t, samples)
                advance(len(samples))
            for m in path.moved if abs_mode == "per_sample" else ():
                gradient = of_sample[m.name]
                signed[m.name] += ops.pqi_sum(gradient, *path.ends(m, gradient.device))
                ops.pqi_accumulate(sums[m.name], gradient.abs_(), 1.0)
                gradient.zero_()
            if snapshot is not None:
                snapshot.save(index, sums, signed, last=index == len(units))

    shares = torch.tensor(list(signed.values()), dtype=torch.float64)
    add_over_ranks([*sums.values(), shares])
    signed.update(zip(signed, shares.tolist(), strict=True))
    for m in path.moved:
        total = sums[m.name]
        ends = path.ends(m, total.device)
        if abs_mode == "after_mean":
            signed[m.name] = ops.pqi_sum(total, *ends)
        ops.pqi_finalize(total, *ends)
        if m.linear.transposed:
            sums[m.name] = total.mT
    return Integral(sums, signed, len(nodes))
