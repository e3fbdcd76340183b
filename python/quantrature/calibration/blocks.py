"""The decoder blocks of a model, run one at a time on activations that are held for one block only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from .._C import InvalidArgumentError, QuantratureError
from ..evaluate._forward import logits
from ..models import Linears, LinearWeight

Watcher = Callable[[LinearWeight, torch.Tensor, int], None]
"""Receives a matrix, its inputs (windows, tokens, in_features), and the number of the first window."""


class _EnoughError(Exception):
    """Ends a forward pass when all that was wanted of it has happened."""


class Blocks:
    """The blocks of a model and the activations that enter the next of them.

    The activations are on the CPU; each batch of them visits the device of the block that it goes through. What a
    block is told beside them (masks, positions) is recorded from one pass through the whole model.

    Args:
        model: causal language model; its weights may change between the calls.
        linears: its quantizable matrices.
        windows: token ids, (windows, tokens).
        batch_size: windows that go through a block at once.
    """

    def __init__(self, model: torch.nn.Module, linears: Linears, windows: torch.Tensor, batch_size: int) -> None:
        if batch_size < 1:
            raise InvalidArgumentError(f"[quantize] batch_size must be at least 1: got batch_size={batch_size}")
        if len(linears.stacks) != 1:
            raise InvalidArgumentError(
                f"[quantize] methods that need calibration go through one stack of blocks: got {len(linears.stacks)}"
            )
        (self._stack,) = linears.stacks
        self.modules = list(model.get_submodule(self._stack).children())
        self._model, self._windows = model, windows
        self._firsts = list(range(0, len(windows), batch_size))
        self._batch_size = batch_size
        self._hidden: list[torch.Tensor] = []
        self._given: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = [{} for _ in self.modules]

    @property
    def tokens(self) -> int:
        """How many tokens all windows have."""
        return self._windows.numel()

    def name(self, number: int) -> str:
        """Full name of a block."""
        return f"{self._stack}.{number}"

    def enter(self) -> None:
        """Embed the windows: what enters the first block."""
        known: set[int] = set()
        with torch.no_grad():
            for first in self._firsts:
                batch = self._windows[first : first + self._batch_size]
                with self._recording(len(batch), whole=len(batch) not in known), suppress(_EnoughError):
                    logits(self._model, batch)
                known.add(len(batch))
        if any(not given for given in self._given):
            missing = next(i for i, given in enumerate(self._given) if not given)
            raise QuantratureError(f"[quantize] the model's forward pass never reached {self.name(missing)}")
        self._check("the embeddings are")

    @contextmanager
    def _recording(self, size: int, whole: bool) -> Iterator[None]:
        """Keep what the first block is given; with whole also what each block is given beside activations."""

        def hook(number: int) -> Callable[..., None]:
            def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, rest, named = _apart(args, kwargs)
                if number == 0:
                    self._hidden.append(hidden.detach().cpu())
                self._given[number].setdefault(size, (rest, named))
                if not whole:
                    raise _EnoughError

            return record

        chosen = self.modules if whole else self.modules[:1]
        handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(chosen)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def outputs(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Run a block on every batch; numbers of the first windows, and what comes out, where the block is."""
        for first, hidden in zip(self._firsts, self._hidden, strict=True):
            with torch.no_grad():
                yield first, self._run(number, hidden)

    def _run(self, number: int, hidden: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        block = self.modules[number]
        device = next(block.parameters()).device
        rest, named = self._given[number][len(hidden)]
        if dtype is not None:
            rest, named = _as_floats(rest, dtype), _as_floats(named, dtype)
        out = block(hidden.to(device), *rest, **named)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def advance(self, number: int, report: Callable[[int], Any]) -> None:
        """Put the outputs of a block in the place of its inputs.

        Raises:
            QuantratureError: naming block and sample where they are not finite.
        """
        for i, (_, out) in enumerate(self.outputs(number)):
            self._hidden[i] = out.cpu()
            report(len(out))
        self._check(f"the output of {self.name(number)} is")

    def _check(self, what: str) -> None:
        for first, hidden in zip(self._firsts, self._hidden, strict=True):
            demand_finite(what, hidden, first)

    def trial(self, number: int) -> torch.Tensor:
        """What comes out of a block, whose weights are float32, for the first batch; all that goes in as float32."""
        hidden = self._hidden[0]
        with torch.no_grad():
            return self._run(number, hidden.float(), torch.float32)

    def stages(self, number: int, matrices: Sequence[LinearWeight]) -> list[list[LinearWeight]]:
        """The matrices of a block in the order they are reached; those that read the same activations together.

        All experts of one parameter are together, though each reads what is routed to it.

        Raises:
            InvalidArgumentError: naming a matrix that no text reaches.
        """
        stages: list[tuple[Any, list[LinearWeight]]] = []
        for linear, place in self._reached(number, matrices):
            if not stages or stages[-1][0] != place:
                stages.append((place, []))
            stages[-1][1].append(linear)
        return [stage for _, stage in stages]

    def readers(self, number: int, matrices: Sequence[LinearWeight]) -> list[list[LinearWeight]]:
        """The same, where those that read the same activations are together even if others come between."""
        found: dict[Any, list[LinearWeight]] = {}
        for linear, place in self._reached(number, matrices):
            found.setdefault(place, []).append(linear)
        return list(found.values())

    def _reached(self, number: int, matrices: Sequence[LinearWeight]) -> list[tuple[LinearWeight, Any]]:
        """The matrices in the order they are reached, each with where its inputs are."""
        found: list[tuple[LinearWeight, Any]] = []

        def note(linear: LinearWeight, x: torch.Tensor, first: int) -> None:
            if not any(linear is other for other, _ in found):
                found.append((linear, (x.data_ptr(), tuple(x.shape), tuple(x.stride()))))
                kept.append(x)  # so that its memory is not given to the next activations

        kept: list[torch.Tensor] = []

        def enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Which experts a batch reaches is up to its text; those of a module go together, the last projection last.
            for linear in sorted(experts, key=lambda linear: linear.attribute.startswith("down")):
                if linear.module is module and not any(linear is other for other, _ in found):
                    found.append((linear, (id(module), linear.attribute)))

        experts = [linear for linear in matrices if linear.expert is not None]
        modules = {id(linear.module): linear.module for linear in experts}.values()
        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
        try:
            with _watching([x for x in matrices if x.expert is None], note, lambda: 0), torch.no_grad():
                self._run(number, self._hidden[0])
        finally:
            for handle in handles:
                handle.remove()
        for linear in matrices:
            if not any(linear is other for other, _ in found):
                raise InvalidArgumentError(f"[quantize] no calibration text reaches {linear.name}")
        return found

    def watch(
        self, number: int, matrices: Sequence[LinearWeight], watcher: Watcher, report: Callable[[int], Any]
    ) -> None:
        """Run a block up to the last of some matrices on every batch and show their inputs.

        Raises:
            QuantratureError: naming matrix and sample where they are not finite.
        """
        first = 0
        waiting: set[str] = set()

        def see(linear: LinearWeight, x: torch.Tensor, at: int) -> None:
            demand_finite(f"the input of {linear.name} is", x, at)
            watcher(linear, x, at)
            waiting.discard(linear.name)
            if not waiting:
                raise _EnoughError

        with _watching(matrices, see, lambda: first), torch.no_grad():
            for at, hidden in zip(self._firsts, self._hidden, strict=True):
                first = at
                waiting.update(linear.name for linear in matrices)
                with suppress(_EnoughError):
                    self._run(number, hidden)
                report(len(hidden))


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The activations among the arguments of a block, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def _as_floats(given: Any, dtype: torch.dtype) -> Any:
    """What a block is given, floating-point tensors in another dtype."""
    if isinstance(given, torch.Tensor):
        return given.to(dtype) if given.is_floating_point() else given
    if isinstance(given, dict):
        return {name: _as_floats(value, dtype) for name, value in given.items()}
    return type(given)(_as_floats(value, dtype) for value in given) if type(given) in (tuple, list) else given


@contextmanager
def _watching(matrices: Sequence[LinearWeight], watcher: Watcher, first: Callable[[], int]) -> Iterator[None]:
    """Call the watcher with the inputs of the matrices while inside."""

    def hook(linear: LinearWeight) -> Callable[..., None]:
        def see(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            watcher(linear, args[0].detach(), first())

        return see

    handles = [linear.layer.register_forward_pre_hook(hook(linear)) for linear in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def demand_finite(what: str, values: torch.Tensor, first: int) -> None:
    """Stop where the values of a sample are not finite; values has samples along its first dimension.

    Raises:
        QuantratureError: naming what it is and the sample.
    """
    finite = values.flatten(1).isfinite().all(dim=1) if values.ndim > 2 else values.isfinite().all()[None]
    if not finite.all():
        sample = first + int(finite.logical_not().nonzero()[0])
        raise QuantratureError(f"[quantize] {what} not finite in calibration sample {sample}")
