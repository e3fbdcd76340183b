"""Scales of a matrix's inputs that are folded into whatever makes these inputs.

Multiplying the columns of a matrix by s and dividing its inputs by s changes nothing. Where a norm or another matrix
makes the inputs, the division is folded into its weights (arXiv 2306.00978, section 3.2), and running the model costs
nothing more. What was folded is kept with a model, so that its source can be brought into the same form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .._C import InvalidArgumentError
from .linears import Linears

NORM, SHIFTED_NORM, ROWS = "norm", "shifted norm", "rows"
KINDS = (NORM, SHIFTED_NORM, ROWS)

FOLDED_SCALE = "folded_scale"
"""Name, after that of the producer, of the tensor that keeps a scale in a checkpoint."""


@dataclass(frozen=True)
class Fold:
    """One scale, what it is folded into, and the matrices whose columns make up for it.

    Attributes:
        kind: ``norm``: the producer multiplies by its weight; ``shifted norm``: by 1 + weight, as Gemma's do;
            ``rows``: it is a matrix, whose last rows make the inputs.
        producer: name of its module, or of the matrix, which may be that of an expert.
        consumers: names of all matrices that read what it makes.
        scale: float32 (in_features,): columns of the consumers are multiplied by it.
        repeats: of ``rows``: each head of so many rows makes the inputs of several heads that follow each other, as
            with grouped queries; then the scale repeats, too. 0 without.
    """

    kind: str
    producer: str
    consumers: tuple[str, ...]
    scale: torch.Tensor
    repeats: tuple[int, int] = (0, 1)

    def to_json(self) -> dict[str, Any]:
        """All but the scale."""
        return {
            "kind": self.kind,
            "producer": self.producer,
            "consumers": list(self.consumers),
            "repeats": list(self.repeats),
        }

    @classmethod
    def from_json(cls, data: Any, scale: torch.Tensor) -> Fold:
        """Read :meth:`to_json`.

        Raises:
            InvalidArgumentError: naming the field that is missing or impossible.
        """
        if not isinstance(data, Mapping) or data.get("kind") not in KINDS:
            raise InvalidArgumentError(f"[checkpoint] kind of a fold must be one of {', '.join(KINDS)}: got {data!r}")
        producer, consumers, repeats = data.get("producer"), data.get("consumers"), data.get("repeats")
        if not isinstance(producer, str):
            raise InvalidArgumentError(f"[checkpoint] producer of a fold must be a name: got {producer!r}")
        if not isinstance(consumers, list) or not all(isinstance(name, str) for name in consumers):
            raise InvalidArgumentError(f"[checkpoint] consumers of a fold must be names: got {consumers!r}")
        if not (
            isinstance(repeats, list)
            and [type(n) for n in repeats] == [int, int]
            and repeats[0] >= 0
            and repeats[1] >= 1
        ):
            raise InvalidArgumentError(f"[checkpoint] repeats of a fold must be two counts: got {repeats!r}")
        return cls(data["kind"], producer, tuple(consumers), scale, (repeats[0], repeats[1]))

    @property
    def made(self) -> torch.Tensor:
        """The scale of what the producer makes: of each number once, where it is read repeatedly."""
        head, times = self.repeats
        return self.scale.view(-1, times, head)[:, 0].reshape(-1) if times > 1 else self.scale


def spread(scale: torch.Tensor, repeats: tuple[int, int]) -> torch.Tensor:
    """The reverse of :attr:`Fold.made`."""
    head, times = repeats
    return scale.view(-1, 1, head).expand(-1, times, -1).reshape(-1) if times > 1 else scale


def narrowest(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers in the 16-bit dtype that holds all of them, where there is one."""
    if weight.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if torch.equal(narrow.float(), weight):
                return narrow
    return weight


def changed_by(
    model: torch.nn.Module, linears: Linears, folds: Iterable[Fold], *, producers: bool = True
) -> list[torch.Tensor]:
    """What :func:`fold` changes, each once: weights and biases of producers, weights of consumers."""
    found: dict[int, torch.Tensor] = {}
    for each in folds:
        changed: list[torch.Tensor | None] = [linears.find(name).weight for name in each.consumers]
        if producers:
            changed += _producer(model, linears, each)
        found |= {tensor.data_ptr(): tensor for tensor in changed if tensor is not None}
    return list(found.values())


def _producer(model: torch.nn.Module, linears: Linears, found: Fold) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of what makes the inputs, sharing the model's memory."""
    if found.kind == ROWS:
        linear = linears.find(found.producer)
        weight, module = linear.weight, linear.module
        if linear.expert is not None:  # fused experts have biases of another shape, with which no fold is proven
            return weight, None
    else:
        module = model.get_submodule(found.producer)
        weight = module.get_parameter("weight").detach()
    bias = getattr(module, "bias", None)
    return weight, bias.detach() if isinstance(bias, torch.Tensor) else None


def fold(
    model: torch.nn.Module, linears: Linears, folds: Iterable[Fold], *, rounded: bool = True, producers: bool = True
) -> None:
    """Change producers and consumers.

    Args:
        model, linears: the model and its quantizable matrices.
        folds: one after the other.
        rounded: round numbers that 16 bits held to such again.
        producers: change these; otherwise the consumers alone, for comparison.

    Raises:
        InvalidArgumentError: naming a producer that the model does not have, or not in that shape.
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
        raise InvalidArgumentError(f"[fold] {by.producer} does not make {count} numbers")
    if by.kind == NORM:
        _set(weight, weight.float() / made, rounded)
    elif by.kind == SHIFTED_NORM:
        _set(weight, (1 + weight.float()) / made - 1, rounded)
    else:
        _set(weight[-count:], weight[-count:].float() / made[:, None], rounded)
    if bias is not None:
        _set(bias[-count:], bias[-count:].float() / made, rounded)


def as_rounded(model: torch.nn.Module, found: Fold) -> Fold:
    """The fold with the scale that its producer, whose weights are rounded, really divides by."""
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
    """Give tensors their values back in the end."""
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
    """Fold, and take it back where what is done inside fails."""
    kept = [(parameter, parameter.clone()) for parameter in changed_by(model, linears, folds)]
    fold(model, linears, folds)
    try:
        yield
    except BaseException:
        _give_back(kept)
        raise


def folds_of(model: Any) -> tuple[Fold, ...]:
    """What was folded into a quantized model."""
    return tuple(getattr(getattr(model, "hf_quantizer", None), "folds", ()))
