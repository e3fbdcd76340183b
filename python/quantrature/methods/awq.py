"""AWQ: scale input channels by their activations and clip each group before rounding (arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import ops
from ..ops._arrays import dtype_name
from ..packed import QuantizedMatrix
from .method import Method, Statistics, grid_settings, kept_beside

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

STEPS = 20
"""Step of both searches: exponents 0, 0.05, ..., 0.95; clipping factors 1, 0.95, ..., 0.55."""
CLIPPED = STEPS // 2
SMALLEST = 1e-4
"""Smallest scale before the scales are centred around 1."""
UNCLIPPED = ("q_", "k_", "query", "key", "qkv", "c_attn")
"""Matrices whose names contain one of these are not clipped, because attention scores depend on them."""


def candidates(activations: torch.Tensor, repeats: tuple[int, int] = (0, 1)) -> list[torch.Tensor]:
    """Return the input channel scales to try: mean absolute activation to the power 0, 0.05, ..., 0.95, centred at 1.

    Args:
        activations: float32 (tokens, in_features).
        repeats: size of an attention head, and how many times in a row each head is repeated (grouped-query
            attention). Repeated channels share one scale.

    Returns:
        One float32 tensor (in_features,) per power.
    """
    size = activations.abs().mean(0)
    head, times = repeats
    if times > 1:
        size = size.view(-1, times, head).mean(1)
    found = []
    for step in range(STEPS):
        scale = size.pow(step / STEPS).clamp_(min=SMALLEST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scale[~scale.isfinite()] = 1
        if times > 1:
            scale = scale[:, None].expand(-1, times, -1).reshape(-1)
        found.append(scale)
    return found


def _on_grid(scaled: torch.Tensor, entry: PlanEntry, outliers: Any) -> Any:
    return ops.quantize(scaled, **grid_settings(entry), meta_bits=entry.meta_bits, exclude=outliers)


def clipped(scaled: torch.Tensor, entry: PlanEntry, activations: torch.Tensor, outliers: Any) -> torch.Tensor:
    """Clip each group of weights to the fraction of its largest magnitude that gives the smallest output error.

    The error of a group is its part of the output error: mean over the tokens of (sum of x_c (w~_c - w_c))^2.

    Args:
        scaled: weights times the scale, float32 (out_features, in_features).
        entry: bits, group size and symmetry.
        activations: inputs divided by the scale, float32 (tokens, in_features).
        outliers: sparse matrix of weights that are kept unquantized. They do not count for the largest magnitude and
            have no error.

    Returns:
        The clipped weights, float32 (out_features, in_features).
    """
    import torch

    rows, cols = scaled.shape
    size = cols if entry.group_size == -1 else min(entry.group_size, cols)
    groups = -(-cols // size)
    pad = groups * size - cols
    keep = torch.zeros(rows, cols, dtype=torch.bool)
    if outliers is not None:
        keep.view(-1)[outliers.positions()] = True

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, pad)).view(len(x), groups, size)

    free = scaled.masked_fill(keep, 0.0)
    largest = grouped(free).abs().amax(2)
    inputs = grouped(activations).transpose(0, 1).contiguous()  # groups, tokens, size
    gram = inputs.mT @ inputs / len(activations)
    least = torch.full((rows, groups), torch.inf)
    best = largest.clone()
    for step in range(CLIPPED):
        limit = largest * (1 - step / STEPS)
        bound = limit.repeat_interleave(size, 1)[:, :cols]
        tried = free.clamp(-bound, bound)
        image = _on_grid(torch.where(keep, scaled, tried).contiguous(), entry, outliers).dequantize("float32")
        apart = grouped((image - scaled).masked_fill_(keep, 0.0)).transpose(0, 1)  # groups, rows, size
        error = ((apart @ gram) * apart).sum(2).T
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, limit, best)
    bound = best.repeat_interleave(size, 1)[:, :cols]
    return torch.where(keep, scaled, scaled.clamp(-bound, bound))


def activation_aware(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize a matrix after scaling its input channels and clipping its groups.

    If the scale cannot be folded into the layer before, it is stored with the matrix: the scale with the smallest
    error of the matrix's output (equation 4 of the paper). If it was folded, ``weight`` includes it already, and
    ``scale`` in the options of the entry is false.
    """
    import torch

    settings = AWQ.settings(entry)
    x = statistics.activations
    assert x is not None
    outliers = kept_beside(weight, entry, kept)
    # The factor of the inputs is stored as float16; the weights are scaled by the inverse of the rounded factor.
    factor = torch.ones(weight.shape[1], dtype=torch.float16)
    if settings["scale"]:
        factor = (1 / best_scale(weight, entry, x, outliers)).to(torch.float16)
    scale = 1 / factor.float()
    scaled = (weight.float() * scale).contiguous()
    if settings["clip"] and not any(part in statistics.name.rpartition(".")[2] for part in UNCLIPPED):
        scaled = clipped(scaled, entry, x * factor, outliers).contiguous()
    dense = replace(_on_grid(scaled, entry, outliers), dtype=dtype_name(weight))
    return QuantizedMatrix(dense, outliers, None if bool((factor == 1).all()) else factor)


def best_scale(weight: torch.Tensor, entry: PlanEntry, x: torch.Tensor, outliers: Any) -> torch.Tensor:
    """Return the candidate scale with the smallest mean squared error of the matrix's output."""
    return _best([(weight, entry, outliers)], x)


def shared_scale(
    matrices: Sequence[tuple[torch.Tensor, PlanEntry]], x: torch.Tensor, repeats: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    """Return the candidate scale with the smallest squared output error, summed over all matrices."""
    return _best([(weight, entry, kept_beside(weight, entry, None)) for weight, entry in matrices], x, repeats)


def _best(
    matrices: Sequence[tuple[torch.Tensor, PlanEntry, Any]], x: torch.Tensor, repeats: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    exact = [(weight.float(), entry, outliers) for weight, entry, outliers in matrices]
    best, least = None, float("inf")
    for scale in candidates(x, repeats):
        error = sum(_error(weight, entry, outliers, scale, x) for weight, entry, outliers in exact)
        if error < least:
            best, least = scale, error
    assert best is not None
    return best


def _error(weight: torch.Tensor, entry: PlanEntry, outliers: Any, scale: torch.Tensor, x: torch.Tensor) -> float:
    """Squared error of the matrix's output, mean over the tokens, if its inputs are scaled by ``scale``."""
    apart = _on_grid((weight * scale).contiguous(), entry, outliers).dequantize("float32") / scale - weight
    if outliers is not None:
        apart.view(-1)[outliers.positions()] = 0.0
    return float((x @ apart.T).square().sum() / len(x))


def _of_sample(apart: torch.Tensor, statistics: Statistics) -> float:
    """Squared error of the outputs, mean over the sampled tokens."""
    x = statistics.activations
    assert x is not None
    return float((x @ apart.T).square_().sum() / max(1, len(x)))


AWQ = Method(
    "scales input channels by their activations and clips groups, both for the smallest output error",
    activation_aware,
    needs=("activations",),
    options={"scale": True, "clip": True, "fold": True},
    input_scale=shared_scale,
    seqlen=512,
    objective=_of_sample,
)
