"""Losses and gradients that are not finite: where they come from, in one error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._C import QuantratureError
from .running import logits


class GradientCheck:
    """Stops where a gradient is not finite, naming the matrix, the node and the calibration samples of the batch.

    On the CPU that is before the gradient is used. A device is asked once for all gradients of a backward pass, by
    :meth:`settle`: an answer is waited for until all work queued before it is done.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, torch.Tensor]] = []

    def __call__(self, name: str, gradient: torch.Tensor, t: float, samples: Sequence[int]) -> None:
        """Check one, or note what is needed to check it later."""
        if gradient.device.type != "cpu":
            self._waiting.append((name, torch.linalg.vector_norm(gradient, math.inf)))
        elif not math.isfinite(float(gradient.sum(dtype=torch.float32))) and not bool(torch.isfinite(gradient).all()):
            self._stop(name, t, samples)

    def settle(self, t: float, samples: Sequence[int]) -> None:
        """Check what was noted, in the order in which it came."""
        waiting, self._waiting = self._waiting, []
        by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
        for name, largest in waiting:
            by_device.setdefault(largest.device, []).append((name, largest))
        for noted in by_device.values():
            largest_of = torch.stack([largest.float() for _, largest in noted]).tolist()
            for (name, _), largest in zip(noted, largest_of, strict=True):
                if not math.isfinite(largest):
                    self._stop(name, t, samples)

    @staticmethod
    def _stop(name: str, t: float, samples: Sequence[int]) -> None:
        raise QuantratureError(
            f"[analyze] the gradient of {name} is not finite at node t={t:.4g}, calibration sample {_listed(samples)}"
        )


def check_loss(loss: float, model: torch.nn.Module, tokens: torch.Tensor, t: float, samples: Sequence[int]) -> None:
    """Stop where the loss of a batch is not finite, naming the module it comes from, the node and the sample."""
    if math.isfinite(loss):
        return
    for sample, window in zip(samples, tokens, strict=True):
        module = _first_not_finite(model, window[None])
        if module is not None:
            raise QuantratureError(
                f"[analyze] the loss is {loss} at node t={t:.4g}, calibration sample {sample}: "
                f"the output of {module} is the first that is not finite"
            )
    raise QuantratureError(f"[analyze] the loss is {loss} at node t={t:.4g}, calibration sample {_listed(samples)}")


def _listed(samples: Sequence[int]) -> str:
    return ", ".join(map(str, samples))


def _first_not_finite(model: torch.nn.Module, tokens: torch.Tensor) -> str | None:
    """Name of the module whose output is the first in a forward pass that is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def see(_: torch.nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if not found and isinstance(first, torch.Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name or type(model).__name__)

        return see

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            logits(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
