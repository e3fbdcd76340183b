"""Run the blocks of a model one at a time; activations are kept for one block only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .._C import InvalidArgumentError
from .finiteness import demand_finite_samples
from .linears import Linears, LinearWeight
from .part_outputs import PartOutputs
from .running import outputs

Watcher = Callable[[LinearWeight, torch.Tensor, int], None]
"""Callback. Arguments: a matrix, its inputs (windows, tokens, in_features), and the index of the first window."""


class _EnoughError(Exception):
    """Ends a forward pass early, when the rest of it is not needed."""


@dataclass(frozen=True)
class _Block:
    """A block, its name in the model, and the stack (module list) that it belongs to."""

    name: str
    stack: str
    module: torch.nn.Module


Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block besides activations: positional and keyword arguments."""


class Blocks:
    """The blocks of a model, and the activations that are the input of the next block.

    Stacks of blocks with matrices to quantize are run in the order of the model: in an encoder-decoder first the
    encoder, then the decoder. Other stacks, such as a vision tower, are not run. Activations are kept on the CPU; each
    batch is moved to the device of the block that runs. The other arguments of a block (masks, positions, encoder
    outputs) are recorded in a pass through the whole model. Those that depend on the text are kept for every batch.

    Args:
        model: language model; its weights may change between calls.
        linears: its quantizable matrices.
        chosen: the matrices that will be quantized.
        windows: token ids, int64 (windows, tokens).
        batch_size: windows per forward pass of a block, at least 1.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        linears: Linears,
        chosen: Sequence[LinearWeight],
        windows: torch.Tensor,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise InvalidArgumentError(f"[quantize] batch_size must be at least 1: got batch_size={batch_size}")
        self._model, self._windows = model, windows
        self._firsts = list(range(0, len(windows), batch_size))
        self._batch_size = batch_size
        self._hidden: list[torch.Tensor] = []
        self._finished: dict[torch.nn.Module, list[torch.Tensor]] = {}
        self._given: dict[str, list[Given]] = {}
        stacks = [stack for stack in linears.stacks if any(x.name.startswith(f"{stack}.") for x in chosen)]
        self._blocks = _in_order(
            model,
            [_Block(f"{s}.{i}", s, block) for s in stacks for i, block in model.get_submodule(s).named_children()],
            windows[:1],
        )
        reached = [f"{block.name}." for block in self._blocks]
        for linear in chosen:
            if not any(linear.name.startswith(name) for name in reached):
                raise InvalidArgumentError(
                    f"[quantize] no calibration text reaches {linear.name}; add it to ignore, or quantize it with a "
                    "method that needs no calibration"
                )

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows together."""
        return self._windows.numel()

    def __len__(self) -> int:
        """Number of blocks in all stacks."""
        return len(self._blocks)

    def name(self, number: int) -> str:
        """Return the full name of a block."""
        return self._blocks[number].name

    def module(self, number: int) -> torch.nn.Module:
        """Return a block."""
        return self._blocks[number].module

    def members(self, number: int, matrices: Sequence[LinearWeight]) -> list[LinearWeight]:
        """Return the given matrices that belong to a block."""
        return [linear for linear in matrices if linear.name.startswith(f"{self.name(number)}.")]

    def enter(self) -> None:
        """Compute the inputs of the first block from the windows."""
        if self._blocks:
            self._enter(0)

    def _batch(self, i: int) -> torch.Tensor:
        return self._windows[self._firsts[i] : self._firsts[i] + self._batch_size]

    def _enter(self, number: int) -> None:
        """Replace the activations by the inputs of the stack that a block belongs to."""
        stack = [block for block in self._blocks if block.stack == self._blocks[number].stack]
        self._hidden = []
        self._given = {block.name: [] for block in stack}
        first_of_size: dict[int, int] = {}
        varies: dict[int, bool] = {}  # batch size to whether the other arguments depend on the text
        for i in range(len(self._firsts)):
            batch = self._batch(i)
            reference = first_of_size.setdefault(len(batch), i)
            same_text = reference != i and torch.equal(batch, self._batch(reference))
            whole = reference == i or varies.get(len(batch), not same_text)
            found = self._recorded(stack, i, whole)
            if not whole or reference == i:
                for block in stack:
                    self._given[block.name].append(found.get(block.name) or self._given[block.name][reference])
                continue
            on_cpu: dict[int, torch.Tensor] = {}
            for block in stack:
                told = _shared(found[block.name], self._given[block.name][reference], on_cpu)
                self._given[block.name].append(told)
            varies.setdefault(len(batch), bool(on_cpu))
        self._check("the embeddings are" if number == 0 else f"the input of {self.name(number)} is")

    def _recorded(self, stack: Sequence[_Block], i: int, whole: bool) -> dict[str, Given]:
        """Run the model on a batch and record the input of the first block; with ``whole`` all blocks' arguments."""
        found: dict[str, Given] = {}

        def hook(block: _Block) -> Callable[..., None]:
            def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, rest, named = _apart(args, kwargs)
                if block is stack[0]:
                    self._hidden.append(hidden.detach().cpu())
                if whole:
                    found[block.name] = rest, named
                if not whole or block is stack[-1]:
                    raise _EnoughError

            return record

        def finished(module: torch.nn.Module, args: Any, out: Any) -> Any:
            theirs = out[0] if isinstance(out, tuple) else out
            ours = self._finished[module][i].to(theirs)
            return (ours, *out[1:]) if isinstance(out, tuple) else ours

        handles = [block.module.register_forward_pre_hook(hook(block), with_kwargs=True) for block in stack]
        handles += [module.register_forward_hook(finished) for module in self._finished]
        try:
            with torch.no_grad(), suppress(_EnoughError):
                outputs(self._model, self._batch(i))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _run(self, number: int, i: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Run a block on a batch, with all floating-point inputs converted to ``dtype``."""
        block, hidden = self.module(number), self._hidden[i]
        device = next(block.parameters()).device

        def placed(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, dtype) if dtype is not None and x.is_floating_point() else x.to(device)

        rest, named = _each_tensor(self._given[self.name(number)][i], placed)
        return _activations(block(placed(hidden), *rest, **named))

    def advance(self, number: int, report: Callable[[int], Any], kept: PartOutputs | None = None) -> None:
        """Replace the activations by the outputs of a block, or by the inputs of the next stack.

        Args:
            number: index of the block.
            report: called with the number of windows that are done.
            kept: outputs of parts of the block to reuse.

        Raises:
            QuantratureError: if they are not finite; the message names block and sample.
        """
        kept = kept or PartOutputs(self.module(number))
        for i in range(len(self._firsts)):
            with torch.no_grad(), kept.reused(i):
                self._hidden[i] = self._run(number, i).cpu()
            report(len(self._batch(i)))
        self._check(f"the output of {self.name(number)} is")
        if number + 1 < len(self) and self._blocks[number + 1].stack != self._blocks[number].stack:
            self._finished[self.module(number)] = self._hidden
            self._enter(number + 1)

    def _check(self, what: str) -> None:
        for first, hidden in zip(self._firsts, self._hidden, strict=True):
            demand_finite_samples(what, hidden, first)

    def trial(self, number: int) -> torch.Tensor:
        """Run a block with float32 weights on the first batch, in float32, and return its output."""
        with torch.no_grad():
            return self._run(number, 0, torch.float32)

    def stages(self, number: int, matrices: Sequence[LinearWeight]) -> list[list[LinearWeight]]:
        """Return the matrices of a block in the order in which they run, grouped by common input.

        All experts of one fused parameter form one group, although each gets the tokens that are routed to it.

        Raises:
            InvalidArgumentError: if no text reaches a matrix; the message names it.
        """
        stages: list[tuple[Any, list[LinearWeight]]] = []
        for linear, place in self._reached(number, matrices):
            if not stages or stages[-1][0] != place:
                stages.append((place, []))
            stages[-1][1].append(linear)
        return [stage for _, stage in stages]

    def readers(self, number: int, matrices: Sequence[LinearWeight]) -> list[list[LinearWeight]]:
        """Return the same groups, where matrices with the same input form one group even if others run in between."""
        found: dict[Any, list[LinearWeight]] = {}
        for linear, place in self._reached(number, matrices):
            found.setdefault(place, []).append(linear)
        return list(found.values())

    def _reached(self, number: int, matrices: Sequence[LinearWeight]) -> list[tuple[LinearWeight, Any]]:
        """Return the matrices in the order in which they run, each with an identifier of its input."""
        found: list[tuple[LinearWeight, Any]] = []

        def note(linear: LinearWeight, x: torch.Tensor, first: int) -> None:
            if not any(linear is other for other, _ in found):
                found.append((linear, (x.data_ptr(), tuple(x.shape), tuple(x.stride()))))
                kept.append(x)  # so that later activations cannot have the same address

        kept: list[torch.Tensor] = []

        def enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The text decides which experts run, so all experts of a module are listed together; down projections last.
            for linear in sorted(experts, key=lambda linear: linear.attribute.startswith("down")):
                if linear.module is module and not any(linear is other for other, _ in found):
                    found.append((linear, (id(module), linear.attribute)))

        experts = [linear for linear in matrices if linear.expert is not None]
        modules = {id(linear.module): linear.module for linear in experts}.values()
        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
        try:
            with _watching([x for x in matrices if x.expert is None], note, lambda: 0), torch.no_grad():
                self._run(number, 0)
        finally:
            for handle in handles:
                handle.remove()
        for linear in matrices:
            if not any(linear is other for other, _ in found):
                raise InvalidArgumentError(f"[quantize] no calibration text reaches {linear.name}; add it to ignore")
        return found

    def watch(
        self,
        number: int,
        matrices: Sequence[LinearWeight],
        watcher: Watcher,
        report: Callable[[int], Any],
        kept: PartOutputs | None = None,
        pending: Sequence[LinearWeight] = (),
    ) -> None:
        """Run a block on every batch, up to the last of the matrices, and pass their inputs to ``watcher``.

        Args:
            number: index of the block.
            matrices: matrices to watch.
            watcher: function that gets their inputs.
            report: called with the number of windows that are done.
            kept: outputs of parts of the block to reuse; those that are final are added.
            pending: matrices of the block that are still to be quantized.

        Raises:
            QuantratureError: if an input is not finite; the message names matrix and sample.
        """
        first = 0
        waiting: set[str] = set()

        def see(linear: LinearWeight, x: torch.Tensor, at: int) -> None:
            demand_finite_samples(f"the input of {linear.name} is", x, at)
            watcher(linear, x, at)
            waiting.discard(linear.name)
            if not waiting:
                raise _EnoughError

        with _watching(matrices, see, lambda: first), torch.no_grad():
            for i, first in enumerate(self._firsts):  # noqa: B007
                waiting.update(linear.name for linear in matrices)
                with suppress(_EnoughError), nullcontext() if kept is None else kept.recorded(i, pending):
                    self._run(number, i)
                report(len(self._batch(i)))


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate the activations from the other arguments of a block; drop the cache, which each run would extend."""
    named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    rest = tuple(None if isinstance(value, Cache) else value for value in args[1:])
    hidden: Any = args[0] if args else named.pop("hidden_states")
    return hidden, rest, named


def _activations(out: Any) -> torch.Tensor:
    """Return the activations among the outputs of a block."""
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _each_tensor(given: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``change`` to each tensor in the arguments of a block."""
    if isinstance(given, torch.Tensor):
        return change(given)
    if type(given) is dict:
        return {name: _each_tensor(value, change) for name, value in given.items()}
    return type(given)(_each_tensor(value, change) for value in given) if type(given) in (tuple, list) else given


def _shared(found: Any, known: Any, on_cpu: dict[int, torch.Tensor]) -> Any:
    """Return the arguments of a block for one batch, reusing equal tensors of another batch; others go to the CPU.

    Args:
        found, known: the arguments for this batch, and for the other one.
        on_cpu: collects CPU copies of the tensors that differ, by identity, so that each is stored once.
    """
    if isinstance(found, torch.Tensor):
        if isinstance(known, torch.Tensor) and found.shape == known.shape and torch.equal(found, known):
            return known
        if id(found) not in on_cpu:
            on_cpu[id(found)] = found.detach().cpu()
        return on_cpu[id(found)]
    if type(found) is dict and type(known) is dict and found.keys() == known.keys():
        return {name: _shared(value, known[name], on_cpu) for name, value in found.items()}
    if type(found) in (tuple, list) and type(found) is type(known) and len(found) == len(known):
        return type(found)(_shared(a, b, on_cpu) for a, b in zip(found, known, strict=True))
    return found


def _in_order(model: torch.nn.Module, blocks: Sequence[_Block], window: torch.Tensor) -> list[_Block]:
    """Return the blocks that run on a text, in the order in which they run.

    Raises:
        InvalidArgumentError: if blocks cannot be run one by one: a block does not take the output of the block before
            it, or runs more than once.
    """
    order: list[_Block] = []
    last: torch.Tensor | None = None

    def enters(block: _Block) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if block in order:
                raise InvalidArgumentError(
                    f"[quantize] methods that need calibration must run each block once: {block.name} runs repeatedly; "
                    "use a method without calibration"
                )
            if any(known.stack == block.stack for known in order):
                hidden = _apart(args, kwargs)[0]
                if order[-1].stack != block.stack or last is None or not torch.equal(hidden, last):
                    raise InvalidArgumentError(
                        f"[quantize] methods that need calibration must run block by block: the input of {block.name} "
                        f"is not the output of {order[-1].name}; use a method without calibration"
                    )
            order.append(block)

        return hook

    def leaves(module: torch.nn.Module, args: Any, out: Any) -> None:
        nonlocal last
        last = _activations(out).detach().clone()

    handles = [block.module.register_forward_pre_hook(enters(block), with_kwargs=True) for block in blocks]
    handles += [block.module.register_forward_hook(leaves) for block in blocks]
    try:
        with torch.no_grad():
            outputs(model, window)
    finally:
        for handle in handles:
            handle.remove()
    return order


@contextmanager
def _watching(matrices: Sequence[LinearWeight], watcher: Watcher, first: Callable[[], int]) -> Iterator[None]:
    """Inside the ``with`` block, call ``watcher`` with the inputs of the matrices."""

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
