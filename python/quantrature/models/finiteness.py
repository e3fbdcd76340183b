"""Errors for losses, gradients and activations that are not finite, with the place where they first occur."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .._C import QuantratureError
from .running import Span, logits


class GradientCheck:
    """Raises an error for a gradient that is not finite, with the matrix, the node and the calibration samples.

    On the CPU, each gradient is checked before it is used. On a CUDA device, :func:`quantrature.ops.pqi_accumulate`
    checks each value, and :meth:`settle` reads the result once per backward pass, because reading it waits for all
    queued work.

    Args:
        names: names of all matrices.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._flags: dict[torch.device, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._waiting: list[tuple[str, torch.device]] = []

    def __call__(self, name: str, gradient: torch.Tensor, t: float, samples: Sequence[int]) -> torch.Tensor | None:
        """Check a gradient on the CPU; on a device, return the ``not_finite`` tensor for ``pqi_accumulate``."""
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
        """Raise QuantratureError for the first gradient of this backward pass that was not finite."""
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
    """Raise QuantratureError if the loss of a batch is not finite; the message names module, node and sample."""
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
    """Return the name of the first module in a forward pass whose output is not finite."""
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
    """Check that values per token, (windows, tokens), are finite.

    Raises:
        QuantratureError: if not; the message names the window and its tokens.
    """
    wrong = _first_wrong(values)
    if wrong is not None:
        span = batch[wrong]
        raise QuantratureError(
            f"[{op}] {what} is not finite in window {first + wrong} (tokens {span.start} to {span.stop - 1})"
        )


def demand_finite_samples(what: str, values: torch.Tensor, first: int) -> None:
    """Check that the values of calibration samples, (samples, tokens, features) or of one sample, are finite.

    Raises:
        QuantratureError: if not; the message names the sample.
    """
    wrong = _first_wrong(values if values.ndim > 2 else values[None])
    if wrong is not None:
        raise QuantratureError(f"[quantize] {what} not finite in calibration sample {first + wrong}")


def _first_wrong(values: torch.Tensor) -> int | None:
    """Return the first index along dimension 0 whose values are not finite; ``None`` if all are."""
    finite = values.flatten(1).isfinite().all(dim=1)
    return None if bool(finite.all()) else int(finite.logical_not().nonzero()[0])
