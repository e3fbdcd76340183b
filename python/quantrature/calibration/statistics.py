"""Statistics of the activations that a stage of matrices reads, gathered while batches go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .. import ops
from ..analysis.path import Moved, gradients_to, next_token_nll
from ..methods import Statistics
from ..models import LinearWeight
from .blocks import demand_finite

SAMPLED = 512
"""At least so many tokens of the text are kept as activations, where it has them; less than twice as many."""


class Gatherer:
    """Gathers what is asked for about the inputs that the matrices of a stage share.

    Args:
        needs: which of ``quantrature.methods.STATISTICS``.
        tokens: of the whole text.
    """

    def __init__(self, needs: Iterable[str], tokens: int) -> None:
        self._needs = set(needs)
        self._step = max(1, tokens // SAMPLED)
        self._hessian: torch.Tensor | None = None
        self._activations: list[torch.Tensor] = []
        self._tokens = 0

    def take(self, x: torch.Tensor) -> None:
        """One batch of inputs, (..., in_features)."""
        rows = x.reshape(-1, x.shape[-1])
        if "hessian" in self._needs:
            if self._hessian is None:
                self._hessian = torch.zeros(rows.shape[1], rows.shape[1])
            ops.hessian_accumulate(self._hessian, rows.cpu().contiguous())
        if "activations" in self._needs:
            self._activations.append(rows[-self._tokens % self._step :: self._step].float().cpu())
        self._tokens += len(rows)

    def statistics(self) -> Statistics:
        """What was gathered."""
        return Statistics(
            hessian=None if self._hessian is None else self._hessian.div_(max(1, self._tokens)),
            activations=torch.cat(self._activations) if self._activations else None,
            tokens=self._tokens,
        )


def fisher(
    model: torch.nn.Module,
    linears: Sequence[LinearWeight],
    windows: torch.Tensor,
    report: Callable[[int], Any],
) -> dict[str, torch.Tensor]:
    """The diagonal Fisher information of some matrices of the model as it is.

    Returns:
        Matrix name to float32 (out_features, in_features): the sum over the windows of the squared gradient of each
        one's mean loss (SqueezeLLM, arXiv 2306.07629, section 4.1).

    Raises:
        QuantratureError: naming matrix and sample where a gradient is not finite.
    """
    if not linears:
        return {}
    sums = {linear.name: torch.zeros(linear.out_features, linear.in_features) for linear in linears}
    sample = 0

    def take(m: Moved, gradient: torch.Tensor) -> None:
        gradient = m.linear.view(gradient) if m.linear.expert is None else gradient
        demand_finite(f"the gradient of {m.name} is", gradient, sample)
        sums[m.name].add_(gradient.detach().float().cpu().square_())

    moved = [Moved(linear, lambda linear=linear: linear.weight) for linear in linears]  # type: ignore[misc]
    with torch.enable_grad(), gradients_to(model, moved, take):
        for sample in range(len(windows)):
            (next_token_nll(model, windows[sample : sample + 1]) / (windows.shape[1] - 1)).backward()
            report(1)
    return sums
