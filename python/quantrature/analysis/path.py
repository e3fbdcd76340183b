"""The straight way from a model's weights to their quantized images, and gradients along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._C import cuda_device_count
from ..models.running import logits
from ..models import LinearWeight
from ..models.finiteness import check_loss
from ..models.ranks import add_over_ranks, rank_of

Image = Callable[[], torch.Tensor]
"""Makes the quantized image of a weight, (out_features, in_features); called at every node and dropped after use."""


@dataclass(frozen=True)
class Moved:
    """A weight matrix on its way: where it is, and how to make its quantized image."""

    linear: LinearWeight
    image: Image

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.linear.name

    @property
    def device(self) -> torch.device:
        """Where its gradients are added up: where the model has it, if the core works there, else the CPU."""
        device = self.linear.parameter.device
        return device if device.type == "cuda" and cuda_device_count()[0] else torch.device("cpu")

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """What of a tensor shaped like the parameter belongs to this matrix, in the order the parameter stores it."""
        return tensor if self.linear.expert is None else tensor[self.linear.expert]

    def stored_image(self) -> torch.Tensor:
        """The quantized image in the order the parameter stores it."""
        image = self.image()
        return image.mT.contiguous() if self.linear.transposed else image


class WeightPath:
    """Puts a model's weights anywhere between the originals (t = 0) and their quantized images (t = 1).

    v(t) = w + t * (w~ - w) is formed in float32 and rounded to the parameter's dtype. All matrices move together.
    The originals are kept on the CPU in their own dtype and come back, bit for bit, when the ``with`` block ends.

    Args:
        model: on any device.
        moved: its matrices.
        folder: keep the originals in files there, which the system pages, instead of in memory.
    """

    def __init__(self, model: torch.nn.Module, moved: Sequence[Moved], folder: Path | None = None) -> None:
        self.model = model
        self.moved = list(moved)
        self._folder = folder
        self._originals: dict[str, torch.Tensor] = {}

    def __enter__(self) -> WeightPath:
        for number, m in enumerate(self.moved):
            weight = self._in_model(m)
            kept = new_on_cpu(weight.shape, weight.dtype, self._folder, f"original-{number:05d}", named=False)
            self._originals[m.name] = kept.copy_(weight)
        return self

    def __exit__(self, *_: object) -> None:
        self.move_to(0)
        self._originals.clear()

    @staticmethod
    def _in_model(m: Moved) -> torch.Tensor:
        return m.stored(m.linear.parameter.detach())

    def original(self, m: Moved) -> torch.Tensor:
        """The matrix as it was, on the CPU, in the order the parameter stores it."""
        return self._originals[m.name]

    def ends(self, m: Moved, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix as it was and its quantized image, on a device, in the order the parameter stores them."""
        return self.original(m).to(device), m.stored_image().to(device)

    def move_to(self, t: float) -> None:
        """Put every matrix at v(t)."""
        for m in self.moved:
            place, original = self._in_model(m), self.original(m)
            if t == 0:
                place.copy_(original)
            elif place.device.type == "cpu":
                ops.interpolate(original, m.stored_image(), t, place)
            else:  # formed where the core runs: the same bits on every device
                place.copy_(ops.interpolate(original, m.stored_image(), t))


def new_on_cpu(
    shape: torch.Size, dtype: torch.dtype, folder: Path | None, name: str, *, named: bool = True
) -> torch.Tensor:
    """A tensor of zeros in memory, or in a file of a folder that the system pages.

    Args:
        shape, dtype: of the tensor.
        folder: ``None`` for memory.
        name: of the file; processes of one run have files of their own.
        named: leave the file there; else it goes with the tensor.
    """
    if folder is None:
        return torch.zeros(shape, dtype=dtype)
    rank, ranks = rank_of()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"{name}-of-rank-{rank}" if ranks > 1 else name)
    file.unlink(missing_ok=True)
    mapped = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype).view(shape)
    if not named:
        file.unlink()
    return mapped


def next_token_nll(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all tokens but the first of each window, float32, in nats."""
    predicted = logits(model, tokens)[:, :-1]
    targets = tokens[:, 1:].to(predicted.device).flatten()
    return torch.nn.functional.cross_entropy(predicted.float().flatten(0, 1), targets, reduction="sum")


class Share:
    """The calibration windows that this process takes in ``torch.distributed``: every world_size-th of them."""

    def __init__(self, windows: torch.Tensor) -> None:
        self._rank, self._ranks = rank_of()
        self.windows = windows[self._rank :: self._ranks]

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, range]]:
        """Windows, and which calibration samples they are."""
        for first in range(0, len(self.windows), batch_size):
            yield self.batch(first, batch_size)

    def batch(self, first: int, batch_size: int) -> tuple[torch.Tensor, range]:
        """The batch that begins with window ``first`` of the share."""
        tokens = self.windows[first : first + batch_size]
        start = self._rank + first * self._ranks
        return tokens, range(start, start + len(tokens) * self._ranks, self._ranks)


def mean_nll(model: torch.nn.Module, windows: torch.Tensor, batch_size: int, t: float = 0.0) -> float:
    """Mean negative log-likelihood in nats per token over calibration windows: the loss F of the analysis.

    Args:
        model: at node t of the path.
        windows: token ids, divided between the processes of ``torch.distributed``.
        batch_size: windows of one forward pass.
        t: for messages.

    Raises:
        QuantratureError: naming the module, node and sample where it is not finite.
    """
    total = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for tokens, samples in Share(windows).batches(batch_size):
            loss = float(next_token_nll(model, tokens))
            check_loss(loss, model, tokens, t, samples)
            total += loss
    add_over_ranks([total])
    return float(total) / windows[:, 1:].numel()


GradientSink = Callable[[Moved, torch.Tensor], None]
"""Receives a matrix and its gradient in the parameter's order, which it may overwrite but must not keep."""


@contextmanager
def gradients_to(model: torch.nn.Module, moved: Sequence[Moved], sink: GradientSink) -> Iterator[None]:
    """While inside, backward passes hand each matrix's gradient to sink and free it at once.

    Other parameters get no gradient. Peak memory beside the activations is one parameter's gradient.
    """
    members: dict[torch.nn.Parameter, list[Moved]] = {}
    for m in moved:
        members.setdefault(m.linear.parameter, []).append(m)
    before = [(p, p.requires_grad) for p in model.parameters()]
    handles = []
    try:
        for p, _ in before:
            p.requires_grad_(p in members)

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            for m in members[parameter]:  # type: ignore[index]
                sink(m, m.stored(gradient))

        handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in members]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in before:
            p.requires_grad_(flag)


@contextmanager
def computing_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While inside, parameters and buffers of floating point have this dtype; those that remain get theirs back."""
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
def gradient_checkpointing(model: torch.nn.Module, blocks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While inside, the backward pass recomputes each block's activations instead of keeping them.

    transformers checkpoints only blocks in training mode; that mode would also switch dropout on, so only the blocks
    themselves enter it, and their own dropout probability is 0 meanwhile.
    """
    typed: Any = model
    enable, disable = (
        getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
        for verb in ("enable", "disable")  # transformers 5 renamed them on its way
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
