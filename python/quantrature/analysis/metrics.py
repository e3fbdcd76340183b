"""Compute the metrics other than PQI that estimate how much quantizing a matrix harms the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import ops
from .._C import UnsupportedError
from ..models import LinearWeight
from ..models.finiteness import GradientCheck, check_loss
from ..models.gradients import Share, add_squared_gradient, gradients_to, next_token_nll
from ..models.ranks import add_over_ranks
from .integral import zeros_for
from .path import Moved, WeightPath

METRICS = {
    "pqi": "Post-quantization Integral: mean over the weights of abs((w~ - w) * mean gradient on the path to w~)",
    "first_order": "sum of (w~ - w) * gradient at the original weights; nats per token",
    "fisher": "half the sum of (w~ - w)^2 * mean squared gradient at the original weights; nats per token",
    "magnitude": "mean of abs(w)",
    "error": "sum of (w~ - w)^2",
    "activation_error": "sum of (w~ - w)^2 * mean square of its input: the squared output error per token",
    "kurtosis": "fourth standardized moment of the weights (Pearson, population)",
}
"""Values of the argument ``metrics``, each with a one-line description."""


def weight_scores(moved: Sequence[Moved], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compute the metrics that need only the weights. Return metric to matrix name to score."""
    scores: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    for m in moved:
        weight = m.linear.weight.to(m.home).contiguous()
        if "magnitude" in scores:
            scores["magnitude"][m.name] = float(weight.float().abs().mean())
        if "kurtosis" in scores:
            scores["kurtosis"][m.name] = float(ops.kurtosis(weight, fisher=False))
        if "error" in scores:
            scores["error"][m.name] = float((m.image() - weight.float()).double().square().sum())
    return scores


def activation_error(
    path: WeightPath, windows: torch.Tensor, batch_size: int, advance: Callable[[int], Any]
) -> dict[str, float]:
    """Compute the squared output error per token of each matrix, with inputs from the original model.

    The elements of the input are treated as uncorrelated: the error is the sum over all weights of (w~ - w)^2 times the
    mean square of the weight's input.

    Raises:
        UnsupportedError: for a matrix of fused experts, whose inputs cannot be recorded; the message names it.
    """
    squares = {m.name: torch.zeros(m.linear.in_features, dtype=torch.float64, device=m.home) for m in path.moved}
    tokens = {m.name: torch.zeros(1, dtype=torch.int64) for m in path.moved}

    def watch(m: Moved) -> Any:
        def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            squares[m.name] += x.square().sum(0, dtype=torch.float64).to(m.home)
            tokens[m.name] += len(x)

        return m.linear.module.register_forward_pre_hook(see)

    for m in path.moved:
        if m.linear.expert is not None:
            raise UnsupportedError(
                f"[analyze] activation_error does not support fused experts, such as {m.name}: remove it from metrics"
            )
    hooks = [watch(m) for m in path.moved]
    try:
        with torch.no_grad():
            for batch, samples in Share(windows).batches(batch_size):
                next_token_nll(path.model, batch)
                advance(len(samples))
    finally:
        for hook in hooks:
            hook.remove()
    add_over_ranks([*squares.values(), *tokens.values()])
    scores = {}
    for m in path.moved:
        per_column = (m.image() - m.linear.weight.to(m.home).float()).double().square().sum(0)
        # A matrix that no token reaches has the score 0.
        scores[m.name] = float(per_column @ squares[m.name]) / max(1, int(tokens[m.name]))
    return scores


def gradient_scores(
    path: WeightPath, windows: torch.Tensor, metrics: Sequence[str], advance: Callable[[int], Any]
) -> tuple[dict[str, dict[str, float]], dict[str, Mapping[str, torch.Tensor]]]:
    """Compute the metrics ``first_order`` and ``fisher`` from one gradient per sample at the original weights.

    Args:
        path: path from the original to the quantized weights, inside its ``with`` block.
        windows: token ids, (samples, seqlen).
        metrics: ``first_order``, ``fisher`` or both.
        advance: function that is called with 1 after each sample, for progress.

    Returns:
        Scores: metric to matrix name to score. Maps: metric to matrix name to float32 (out_features, in_features), on
        the CPU: abs((w~ - w) * mean gradient) for ``first_order``, the mean squared gradient for ``fisher``.

    Raises:
        QuantratureError: if a loss or gradient is not finite; the message names module or matrix, and sample.
    """
    first = zeros_for(path) if "first_order" in metrics else {}
    second = zeros_for(path) if "fisher" in metrics else {}
    samples = range(0)
    check = GradientCheck(m.name for m in path.moved)

    def take(linear: LinearWeight, gradient: torch.Tensor) -> None:
        m = path.of(linear)
        gradient = gradient.to(m.device)
        flag = check(m.name, gradient, 0.0, samples)
        if first:
            ops.pqi_accumulate(first[m.name], gradient, 1 / len(windows), flag)
        elif flag is not None:  # check before squaring, which can overflow
            flag.logical_or_(gradient.isfinite().all().logical_not())
        if second:
            add_squared_gradient(second[m.name], gradient, 1 / len(windows))

    with gradients_to(path.model, [m.linear for m in path.moved], take):
        for tokens, samples in Share(windows).batches(1):
            loss = next_token_nll(path.model, tokens)
            check_loss(float(loss.detach()), path.model, tokens, 0.0, samples)
            (loss / (windows.shape[1] - 1)).backward()
            check.settle(0.0, samples)
            advance(1)
    add_over_ranks([*first.values(), *second.values()])

    scores: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    for m in path.moved:
        original, image = path.ends(m, m.device)
        if first:
            scores["first_order"][m.name] = ops.pqi_sum(first[m.name], original, image)
            ops.pqi_finalize(first[m.name], original, image)
        if second:
            moved_by = (image.float() - original.float()).double()
            scores["fisher"][m.name] = 0.5 * float((second[m.name].double() * moved_by.square()).sum())
        if m.linear.transposed:
            for maps in (first, second):
                if maps:
                    maps[m.name] = maps[m.name].mT
    maps_of = {"first_order": first, "fisher": second}
    return scores, {
        metric: {name: values.cpu() for name, values in maps.items()} for metric, maps in maps_of.items() if maps
    }
