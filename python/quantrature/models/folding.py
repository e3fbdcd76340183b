"""Fold scales of input channels into the layer that computes the inputs.

Multiplying the columns of a matrix by s and dividing its inputs by s changes nothing. If a norm or another matrix
computes the inputs, the division can be folded into its weights (arXiv 2306.00978, section 3.2). Running the model then
costs nothing more. The folded scales are saved with the model, so that it can be compared with the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, InstanceOf

from .._C import InvalidArgumentError
from ..files.schema import Integer, Must, Natural, OneOf, Text, read
from .linears import Linears

NORM, SHIFTED_NORM, ROWS = "norm", "shifted norm", "rows"
KINDS = (NORM, SHIFTED_NORM, ROWS)

FOLDED_SCALE = "folded_scale"
"""Name of a scale in a checkpoint, after the name of the producer."""


@dataclass(frozen=True)
class Fold:
    """A scale, the layer that is divided by it (producer), and the matrices that are multiplied by it (consumers).

    Attributes:
        kind: type of the producer. ``norm``: a norm that multiplies by its weight; ``shifted norm``: a norm that
            multiplies by 1 + weight, as in Gemma; ``rows``: a matrix, whose last rows compute the inputs.
        producer: name of the norm, or of the matrix, which may be that of an expert.
        consumers: names of all matrices that read the producer's output.
        scale: float32 (in_features,): columns of the consumers are multiplied by it.
        repeats: for ``rows`` with grouped-query attention: the number of rows per head, and how many consecutive heads
            read each head. The scale repeats accordingly. Zeros if nothing repeats.
    """

    kind: Annotated[str, OneOf(*KINDS)]
    producer: Annotated[Text, Must("a name")]
    consumers: Annotated[tuple[Text, ...], Must("names")]
    scale: InstanceOf[torch.Tensor]
    repeats: Annotated[tuple[Annotated[Integer, Field(ge=0)], Natural], Must("two counts")] = (0, 1)

    def to_json(self) -> dict[str, Any]:
        """Return all fields except the scale as a JSON object."""
        return {
            "kind": self.kind,
            "producer": self.producer,
            "consumers": list(self.consumers),
            "repeats": list(self.repeats),
        }

    @classmethod
    def from_json(cls, data: Any, scale: torch.Tensor) -> Fold:
        """Read and check the JSON object of :meth:`to_json`.

        Raises:
            InvalidArgumentError: for a field that is missing or invalid; the message names it.
        """
        fields = {**data, "scale": scale} if isinstance(data, Mapping) else data
        return read(cls, fields, op="checkpoint", what="a fold")

    @property
    def made(self) -> torch.Tensor:
        """The scale per output of the producer: without repetition."""
        head, times = self.repeats
        return self.scale.view(-1, times, head)[:, 0].reshape(-1) if times > 1 else self.scale


def spread(scale: torch.Tensor, repeats: tuple[int, int]) -> torch.Tensor:
    """Repeat a scale per output of the producer for the columns of the consumers; the reverse of :attr:`Fold.made`."""
    head, times = repeats
    return scale.view(-1, 1, head).expand(-1, times, -1).reshape(-1) if times > 1 else scale


def narrowest(weight: torch.Tensor) -> torch.Tensor:
    """Convert to the 16-bit dtype that represents all values exactly; unchanged if there is none."""
    if weight.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if torch.equal(narrow.float(), weight):
                return narrow
    return weight


def changed_by(
    model: torch.nn.Module, linears: Linears, folds: Iterable[Fold], *, producers: bool = True
) -> list[torch.Tensor]:
    """Return the tensors that :func:`fold` changes, each once: weights and biases of producers, consumers' weights."""
    found: dict[int, torch.Tensor] = {}
    for each in folds:
        changed: list[torch.Tensor | None] = [linears.find(name).weight for name in each.consumers]
        if producers:
            changed += _producer(model, linears, each)
        found |= {tensor.data_ptr(): tensor for tensor in changed if tensor is not None}
    return list(found.values())


def _producer(model: torch.nn.Module, linears: Linears, found: Fold) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of the producer; they share memory with the model."""
    if found.kind == ROWS:
        linear = linears.find(found.producer)
        weight, module = linear.weight, linear.module
        if linear.expert is not None:  # a bias of fused experts is not divided: trials refuse the fold
            return weight, None
    else:
        module = model.get_submodule(found.producer)
        weight = module.get_parameter("weight").detach()
    bias = getattr(module, "bias", None)
    return weight, bias.detach() if isinstance(bias, torch.Tensor) else None


def fold(
    model: torch.nn.Module, linears: Linears, folds: Iterable[Fold], *, rounded: bool = True, producers: bool = True
) -> None:
    """Fold scales into a model, in place.

    Args:
        model, linears: the model and its quantizable matrices.
        folds: the scales, which are folded one after the other.
        rounded: if weights were representable in a 16-bit dtype, round the new weights to it again.
        producers: whether to change the producers; if false, only the consumers are changed, for comparison.

    Raises:
        InvalidArgumentError: if the model has no such producer, or not in that shape; the message names it.
    """
    for each in folds:
        consumers = [linears.find(name) for name in each.consumers]
        if producers:
            try:
                weight, bias = _producer(model, linears, each)
            except AttributeError:
                raise InvalidArgumentError(f"[fold] the model has no module {each.producer}") from None
            _divide(weight, bias, each, rounded)
        for linear in consumers:
            if each.scale.shape != (linear.in_features,):
                raise InvalidArgumentError(f"[fold] {linear.name} does not take scales of shape {each.scale.shape}")
            _set(linear.weight, linear.weight.float() * each.scale.to(linear.weight.device), rounded)


def _set(place: torch.Tensor, values: torch.Tensor, rounded: bool) -> None:
    place.copy_(values.to(narrowest(place).dtype) if rounded else values)


def _divide(weight: torch.Tensor, bias: torch.Tensor | None, by: Fold, rounded: bool) -> None:
    made = by.made.to(weight.device)
    count = len(made)
    if len(weight) < count or (by.kind != ROWS and weight.shape != (count,)):
        raise InvalidArgumentError(f"[fold] {by.producer} does not have {count} outputs")
    if by.kind == NORM:
        _set(weight, weight.float() / made, rounded)
    elif by.kind == SHIFTED_NORM:
        _set(weight, (1 + weight.float()) / made - 1, rounded)
    else:
        _set(weight[-count:], weight[-count:].float() / made[:, None], rounded)
    if bias is not None:
        _set(bias[-count:], bias[-count:].float() / made, rounded)


def as_rounded(model: torch.nn.Module, found: Fold) -> Fold:
    """Return the fold with the scale by which the producer, whose weights are rounded, really divides."""
    if found.kind == ROWS:
        return found
    weight = model.get_submodule(found.producer).weight
    assert isinstance(weight, torch.Tensor)
    offset = 1.0 if found.kind == SHIFTED_NORM else 0.0
    factor = weight.detach().float().cpu() + offset
    kept = narrowest(weight.detach().cpu()).dtype
    after = (factor / found.scale - offset).to(kept).float() + offset
    scale = factor / after
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return Fold(found.kind, found.producer, found.consumers, scale, found.repeats)


@contextmanager
def restored(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restore the values of tensors at the end of the ``with`` block."""
    kept = [(parameter, parameter.clone()) for parameter in parameters]
    try:
        yield
    finally:
        _give_back(kept)


def _give_back(kept: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for parameter, values in kept:
        parameter.copy_(values)


@contextmanager
def folded(model: torch.nn.Module, linears: Linears, folds: Sequence[Fold]) -> Iterator[None]:
    """Fold scales; if the ``with`` block raises an error, undo it."""
    kept = [(parameter, parameter.clone()) for parameter in changed_by(model, linears, folds)]
    fold(model, linears, folds)
    try:
        yield
    except BaseException:
        _give_back(kept)
        raise


def folds_of(model: Any) -> tuple[Fold, ...]:
    """Return the scales that were folded into a quantized model."""
    return tuple(getattr(getattr(model, "hf_quantizer", None), "folds", ()))
