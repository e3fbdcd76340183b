"""Compute the loss of a model on calibration windows, and the gradients of its weight matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import ops
from .linears import Linears, LinearWeight
from .ranks import rank_of
from .running import logits


def next_token_nll(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood of all tokens but the first of each window, float32, in nats."""
    predicted = logits(model, tokens)[:, :-1]
    targets = tokens[:, 1:].to(predicted.device).flatten()
    return torch.nn.functional.cross_entropy(predicted.float().flatten(0, 1), targets, reduction="sum")


class Share:
    """The calibration windows of this process in ``torch.distributed``: every ``world_size``-th window."""

    def __init__(self, windows: torch.Tensor) -> None:
        self._rank, self._ranks = rank_of()
        self.windows = windows[self._rank :: self._ranks]

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, range]]:
        """Yield batches of windows, each with the indices of its calibration samples."""
        for first in range(0, len(self.windows), batch_size):
            yield self.batch(first, batch_size)

    def batch(self, first: int, batch_size: int) -> tuple[torch.Tensor, range]:
        """Return the batch that begins with window ``first`` of the share, and its calibration sample indices."""
        tokens = self.windows[first : first + batch_size]
        start = self._rank + first * self._ranks
        return tokens, range(start, start + len(tokens) * self._ranks, self._ranks)


GradientSink = Callable[[LinearWeight, torch.Tensor], None]
"""Function that receives a matrix and its gradient, in the order of the parameter.

It may overwrite the gradient, but must not keep it.
"""


@contextmanager
def gradients_to(model: torch.nn.Module, linears: Iterable[LinearWeight], sink: GradientSink) -> Iterator[None]:
    """Inside the ``with`` block, backward passes hand each matrix's gradient to ``sink`` and free it at once.

    Other parameters get no gradient. Besides activations, peak memory is the gradient of one parameter.
    """
    members: dict[torch.nn.Parameter, list[LinearWeight]] = {}
    for linear in linears:
        members.setdefault(linear.parameter, []).append(linear)
    before = [(p, p.requires_grad) for p in model.parameters()]
    handles = []
    try:
        for p, _ in before:
            p.requires_grad_(p in members)

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for linear in members[parameter]:  # type: ignore[index]
                sink(linear, linear.stored(gradient))

        handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in members]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in before:
            p.requires_grad_(flag)


def add_squared_gradient(fisher: torch.Tensor, gradient: torch.Tensor, scale: float = 1.0) -> None:
    """Add ``scale * gradient**2`` to the diagonal Fisher information of a matrix, in place.

    Args:
        fisher: float32, contiguous, zeros before the first call.
        gradient: gradient of the mean loss of one window, of the shape and on the device of ``fisher``.
        scale: 1 for the sum over windows (SqueezeLLM, arXiv 2306.07629, section 4.1), one over their number for the
            mean.
    """
    ops.pqi_accumulate(fisher, gradient.detach().float().square_().contiguous(), scale)


@contextmanager
def computing_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the ``with`` block, convert floating-point parameters and buffers to ``dtype``; then restore them."""
    before = {name: tensor.dtype for name, tensor in _tensors(model) if tensor.is_floating_point()}
    model.to(dtype)
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            if name in before and tensor.is_floating_point() and tensor.dtype == dtype:
                tensor.data = tensor.data.to(before[name])


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def gradient_checkpointing(model: torch.nn.Module, linears: Linears, wanted: bool) -> Iterator[None]:
    """Inside the ``with`` block, if ``wanted``, the backward pass recomputes each block's activations.

    transformers checkpoints only blocks in training mode, which also enables dropout. Therefore only the blocks
    themselves, not the modules inside, are set to training mode, and their own dropout probability is set to 0.
    """
    if not wanted:
        yield
        return
    blocks = [block for stack in linears.stacks for block in model.get_submodule(stack).children()]
    typed: Any = model
    enable, disable = (
        getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
        for verb in ("enable", "disable")  # transformers 5 renamed these methods between releases
    )
    enable({"use_reentrant": False})
    dropouts = [(b, b.dropout) for b in blocks if isinstance(getattr(b, "dropout", None), float)]
    try:
        for block in blocks:
            block.training = True
        for block, _ in dropouts:
            block.dropout = 0.0  # type: ignore[assignment]
        yield
    finally:
        for block, probability in dropouts:
            block.dropout = probability
        for block in blocks:
            block.training = False
        typed.disable_input_require_grads()
        disable()
