"""Gather calibration statistics of matrices: Hessian, activations and Fisher information."""

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
"""Least number of tokens whose activations are kept, if the text has that many; fewer than twice as many are kept."""


class Gatherer:
    """Gathers statistics of the common input of some matrices.

    Hessians are summed on the device of the inputs. Hessians of experts are summed on the CPU, because there may be too
    many for the memory of a device.

    Args:
        needs: the ``quantrature.methods.STATISTICS`` to gather.
        tokens: number of tokens in the text. ``None`` for an expert, if the number of tokens that it receives is
            unknown: then, whenever 2 * :data:`SAMPLED` activations are kept, every second one is dropped.
    """

    def __init__(self, needs: Iterable[str], tokens: int | None) -> None:
        self._needs = set(needs)
        self._many = tokens is None
        self._step = max(1, (tokens or 0) // SAMPLED)
        self._hessian: torch.Tensor | None = None
        self._activations: list[torch.Tensor] = []
        self._tokens = 0

    def take(self, x: torch.Tensor) -> None:
        """Add one batch of inputs, (..., in_features)."""
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
        """Return the statistics; call it once, after the last batch."""
        return Statistics(
            hessian=None if self._hessian is None else self._hessian.div_(max(1, self._tokens)),
            activations=torch.cat(self._activations) if self._activations else None,
            tokens=self._tokens,
        )


def filled_up(members: Sequence[LinearWeight], own: Sequence[Statistics]) -> list[Statistics]:
    """Complete the statistics of experts that receive fewer tokens than their matrix has inputs.

    Let n be the number of tokens that an expert receives, H its Hessian, and m > n the number of inputs. Its Hessian
    becomes (n H + (m - n) M) / m, where M is the mean Hessian over the tokens of all experts. Evenly spaced activations
    of all experts are added to its own until there are min(m, :data:`SAMPLED`).

    Args:
        members: the experts of one parameter.
        own: statistics of each expert from the tokens that are routed to it.

    Raises:
        InvalidArgumentError: if no token reaches any of the experts; the message names the parameter.
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
        "%s: some experts receive fewer calibration tokens than their %d inputs; tokens of all experts are added: %s",
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
    """Compute the diagonal Fisher information of matrices, at the current weights of the model.

    Args:
        model: the model.
        linears: the matrices.
        windows: token ids of the calibration text, (windows, tokens).
        report: function that is called with 1 after each window.

    Returns:
        Matrix name to float32 (out_features, in_features): the squared gradient of a window's mean loss, summed over
        the windows (SqueezeLLM, arXiv 2306.07629, section 4.1). An expert that no token reaches gets the mean over the
        given experts of its parameter.

    Raises:
        QuantratureError: if a gradient is not finite; the message names matrix and sample.
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
                "no calibration token reaches some experts; they get the mean Fisher information of all: %s",
                ", ".join(idle),
            )
            sums |= {name: mean for name in idle}
    return sums
