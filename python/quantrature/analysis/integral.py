"""The Post-quantization Integral: what each weight contributes to the loss change of quantizing (arXiv 2503.01901).

S_i = (w~_i - w_i) * integral over t in [0, 1] of dF/dw_i at w + t (w~ - w). The S_i of all weights add up to
F(w~) - F(w); the sensitivity of a weight is an absolute value of S_i.
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
        maps: matrix name to the PQI of its weights, float32 of shape (out_features, in_features), not negative; on
            the devices of the weights, if not in files.
        signed: matrix name to the sum of the signed S_i, nats per token.
        gradient_evaluations: forward and backward passes per calibration sample.
    """

    maps: Mapping[str, torch.Tensor]
    signed: Mapping[str, float]
    gradient_evaluations: int


@dataclass(frozen=True)
class _Step:
    """One gradient evaluation: the batch's first window, the node and its weight."""

    first: int
    t: float
    weight: float


def _units(abs_mode: str, nodes: list[tuple[float, float]], firsts: list[int]) -> Iterator[list[_Step]]:
    """Steps in order, in units after which the accumulators are consistent."""
    if abs_mode == "per_sample":
        for first in firsts:
            yield [_Step(first, t, weight) for t, weight in nodes]
    else:
        for t, weight in nodes:
            for first in firsts:
                yield [_Step(first, t, weight)]


def zeros_for(path: WeightPath, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """A float32 accumulator for each moved matrix, where the matrix is, or in files that the system pages."""
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
    """PQI of every moved weight.

    Args:
        path: the model and its quantized images, entered.
        windows: token ids, shape (samples, seqlen). Under ``torch.distributed`` each rank takes every
            world_size-th of them, and all get the whole result.
        nodes: pairs (t, weight) of :func:`quadrature`.
        objective: F, as a sum over the tokens of a batch.
        batch_size: windows of one gradient evaluation; the loss is the mean over all tokens whatever it is.
        abs_mode: ``after_mean``: abs((w~ - w) * mean gradient); ``per_sample``: mean over the samples of the absolute
            S_i of each; ``per_node``: mean over nodes and samples of the absolute integrand. The last two take
            batches of one window.
        map_folder: keep the accumulators in files there instead of in memory.
        snapshot: where to save the state from time to time, and what an earlier run saved.
        advance: called with the number of windows whose gradient was taken, for progress.

    Raises:
        QuantratureError: naming module, sample and node where a loss or gradient is not finite.
        InvalidArgumentError: for an unknown abs_mode.
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
