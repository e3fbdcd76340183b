"""Statistics of the activations that a stage of matrices reads, gathered while batches go by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import ops
from .._C import InvalidArgumentError
from ..methods import Statistics
from ..models import LinearWeight
from ..models.finiteness import demand_finite_samples
from ..models.gradients import add_squared_gradient, gradients_to, next_token_nll

_log = logging.getLogger(__name__)

SAMPLED = 512
"""At least so many tokens of the text are kept as activations, where it has them; less than twice as many."""


class Gatherer:
    """Gathers what is asked for about the inputs that the matrices of a stage share.

    Args:
        needs: which of ``quantrature.methods.STATISTICS``.
        tokens: of the whole text; ``None`` for what is routed to an expert, where that is not known before: then
            every second of the activations is dropped whenever they are twice :data:`SAMPLED`. Hessians are gathered
            where the inputs are, but those of experts on the CPU: a device may have no room for so many.
    """

    def __init__(self, needs: Iterable[str], tokens: int | None) -> None:
        self._needs = set(needs)
        self._many = tokens is None
        self._step = max(1, (tokens or 0) // SAMPLED)
        self._hessian: torch.Tensor | None = None
        self._activations: list[torch.Tensor] = []
        self._tokens = 0

    def take(self, x: torch.Tensor) -> None:
        """One batch of inputs, (..., in_features)."""
        rows = x.reshape(-1, x.shape[-1])
        if "hessian" in self._needs:
            if self._hessian is None:
                place = rows.device if rows.is_cuda and not self._many else torch.device("cpu")
                self._hessian = torch.zeros(rows.shape[1], rows.shape[1], device=place)
            ops.hessian_accumulate(self._hessian, rows.to(self._hessian.device).contiguous())
        if "activations" in self._needs:
            self._activations.append(rows[-self._tokens % self._step :: self._step].float().cpu())
            while self._many and sum(map(len, self._activations)) >= 2 * SAMPLED:
                self._activations = [torch.cat(self._activations)[::2].clone()]
                self._step *= 2
        self._tokens += len(rows)

    def statistics(self) -> Statistics:
        """What was gathered."""
        return Statistics(
            hessian=None if self._hessian is None else self._hessian.div_(max(1, self._tokens)),
            activations=torch.cat(self._activations) if self._activations else None,
            tokens=self._tokens,
        )


def filled_up(members: Sequence[LinearWeight], own: Sequence[Statistics]) -> list[Statistics]:
    """Statistics of experts, of which some have seen few tokens.

    What fewer tokens reach than it has inputs is filled up to so many: in its Hessian the mean of all stands for those
    that are missing, (n H + (m - n) mean H) / m for n tokens and m inputs; to its activations come some of all, spread
    evenly, until there are m of them, or :data:`SAMPLED`.

    Args:
        members: the experts of one parameter.
        own: of each, by what is routed to it.

    Raises:
        InvalidArgumentError: naming the parameter when no token reaches any of them.
    """
    tokens = sum(s.tokens for s in own)
    parameter = members[0].name.rpartition(".")[0]
    if not tokens:
        raise InvalidArgumentError(f"[quantize] no calibration text reaches the experts of {parameter}")
    width = members[0].in_features
    few = [(linear, s) for linear, s in zip(members, own, strict=True) if s.tokens < width]
    if not few:
        return list(own)
    _log.warning(
        "%s: fewer calibration tokens than its %d inputs reach some experts, which are filled up from all: %s",
        parameter,
        width,
        ", ".join(f"{linear.name} ({s.tokens})" for linear, s in few),
    )
    hessian: torch.Tensor | None = None
    for s in own:
        if s.hessian is not None:
            hessian = torch.zeros(width, width) if hessian is None else hessian
            hessian.add_(s.hessian, alpha=s.tokens / tokens)
    every = [s.activations for s in own if s.activations is not None]
    activations = torch.cat(every) if every else None
    filled = []
    for s in own:
        if s.tokens < width:
            share = s.tokens / width
            if hessian is not None:
                s = replace(s, hessian=(1 - share) * hessian + (0 if s.hessian is None else share * s.hessian))
            if activations is not None:
                have = activations[:0] if s.activations is None else s.activations
                missing = max(0, min(width, SAMPLED) - len(have))
                places = torch.arange(missing) * len(activations) // max(1, missing)
                s = replace(s, activations=torch.cat([have, activations[places]]))
        filled.append(s)
    return filled


def fisher(
    model: torch.nn.Module,
    linears: Sequence[LinearWeight],
    windows: torch.Tensor,
    report: Callable[[int], Any],
) -> dict[str, torch.Tensor]:
    """The diagonal Fisher information of some matrices of the model as it is.

    Returns:
        Matrix name to float32 (out_features, in_features): the sum over the windows of the squared gradient of each
        one's mean loss (SqueezeLLM, arXiv 2306.07629, section 4.1). An expert that no token reaches has the mean of
        the experts of its parameter that are asked for.

    Raises:
        QuantratureError: naming matrix and sample where a gradient is not finite.
    """
    if not linears:
        return {}
    sums = {linear.name: torch.zeros(linear.out_features, linear.in_features) for linear in linears}
    sample = 0

    def take(linear: LinearWeight, gradient: torch.Tensor) -> None:
        gradient = gradient.mT if linear.transposed else gradient
        demand_finite_samples(f"the gradient of {linear.name} is", gradient, sample)
        add_squared_gradient(sums[linear.name], gradient.cpu())

    with torch.enable_grad(), gradients_to(model, linears, take):
        for sample in range(len(windows)):
            (next_token_nll(model, windows[sample : sample + 1]) / (windows.shape[1] - 1)).backward()
            report(1)
    of_one: dict[tuple[int, str], list[LinearWeight]] = {}
    for linear in linears:
        if linear.expert is not None:
            of_one.setdefault((id(linear.module), linear.attribute), []).append(linear)
    for members in of_one.values():
        idle = [linear.name for linear in members if not sums[linear.name].any()]
        if idle and len(idle) < len(members):
            mean = torch.stack([sums[linear.name] for linear in members]).mean(0)
            _log.warning(
                "no calibration text reaches some experts, which are given the mean of all: %s", ", ".join(idle)
            )
            sums |= {name: mean for name in idle}
    return sums
