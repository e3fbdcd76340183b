"""Losses and gradients that are not finite: where they come from, in one error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .._C import QuantratureError
from .running import Span, logits


class GradientCheck:
    """Stops where a gradient is not finite, naming the matrix, the node and the calibration samples of the batch.

    On the CPU that is before the gradient is used. On a device, :func:`quantrature.ops.pqi_accumulate` looks at each
    number that it adds up, and :meth:`settle` asks once for all gradients of a backward pass: an answer is waited for
    until all work queued before it is done.

    Args:
        names: of all matrices.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._flags: dict[torch.device, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._waiting: list[tuple[str, torch.device]] = []

    def __call__(self, name: str, gradient: torch.Tensor, t: float, samples: Sequence[int]) -> torch.Tensor | None:
        """Check one on the CPU; of a device, what ``pqi_accumulate`` is to take as ``not_finite``."""
        device = gradient.device
        if device.type == "cpu":
            if not math.isfinite(float(gradient.sum(dtype=torch.float32))) and not bool(gradient.isfinite().all()):
                self._stop(name, t, samples)
            return None
        if device not in self._flags:
            flags = torch.zeros(len(self._places), dtype=torch.int32, device=device)
            self._flags[device] = flags, flags.split(1)
        self._waiting.append((name, device))
        return self._flags[device][1][self._places[name]]

    def settle(self, t: float, samples: Sequence[int]) -> None:
        """Stop at the first gradient that came and was not finite."""
        waiting, self._waiting = self._waiting, []
        found = {device: flags.tolist() for device, (flags, _) in self._flags.items()}
        for name, device in waiting:
            if found[device][self._places[name]]:
                self._flags.clear()
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


def demand_finite_windows(op: str, what: str, values: torch.Tensor, batch: Sequence[Span], first: int) -> None:
    """Stop where the values of a window, (windows, tokens), are not finite.

    Raises:
        QuantratureError: naming the window and its tokens.
    """
    wrong = _first_wrong(values)
    if wrong is not None:
        span = batch[wrong]
        raise QuantratureError(
            f"[{op}] {what} is not finite in window {first + wrong} (tokens {span.start} to {span.stop - 1})"
        )


def demand_finite_samples(what: str, values: torch.Tensor, first: int) -> None:
    """Stop where the values of a calibration sample, (samples, tokens, features), or of one alone, are not finite.

    Raises:
        QuantratureError: naming the sample.
    """
    wrong = _first_wrong(values if values.ndim > 2 else values[None])
    if wrong is not None:
        raise QuantratureError(f"[quantize] {what} not finite in calibration sample {first + wrong}")


def _first_wrong(values: torch.Tensor) -> int | None:
    """Index along the first dimension of the first part that is not finite."""
    finite = values.flatten(1).isfinite().all(dim=1)
    return None if bool(finite.all()) else int(finite.logical_not().nonzero()[0])
