"""Outputs of the parts of a block that have their final weights, so that later passes do not compute them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .linears import LinearWeight


@dataclass(frozen=True)
class _Output:
    """The output of a submodule, on the CPU: tensors with their devices; ``None`` for an output that is ``None``."""

    tensors: Sequence[tuple[torch.Tensor, torch.device] | None]
    single: bool

    @classmethod
    def of(cls, output: Any) -> _Output | None:
        """Keep an output; return ``None`` if it is neither a tensor nor a tuple of tensors."""
        single = isinstance(output, torch.Tensor)
        parts = (output,) if single else output
        if type(parts) is not tuple or not all(x is None or isinstance(x, torch.Tensor) for x in parts):
            return None
        return cls([None if x is None else (x.detach().cpu(), x.device) for x in parts], single)

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Return the output as the submodule would; arguments are ignored."""
        parts = tuple(None if x is None else x[0].to(x[1]) for x in self.tensors)
        return parts[0] if self.single else parts


class PartOutputs:
    """Keeps the outputs of a block's direct submodules, such as its attention, for each batch.

    An output is final when no matrix that is still to be quantized has run before it in the block. It is then the same
    in each pass over the text. Outputs are kept on the CPU: for each submodule as much memory as the activations
    between two blocks. Not kept are those of submodules without a matrix, such as norms, of submodules that run several
    times in a block, and outputs that are not tensors.

    Args:
        block: the block.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        self._parts = [part for part in block.children() if any(p.ndim > 1 for p in part.parameters())]
        self._kept: dict[tuple[torch.nn.Module, int], _Output] = {}

    @contextmanager
    def recorded(self, batch: int, pending: Sequence[LinearWeight]) -> Iterator[None]:
        """Inside the ``with`` block, reuse the outputs that are kept for a batch, and keep those that are final.

        Args:
            batch: index of the batch that the block runs on.
            pending: matrices of the block that are still to be quantized.
        """
        final: dict[torch.nn.Module, list[Any]] = {}
        changing = False

        def changes(*_: Any) -> None:
            nonlocal changing
            changing = True

        def keep(part: torch.nn.Module, args: Any, out: Any) -> None:
            if not changing:
                final.setdefault(part, []).append(out)

        modules = {id(m): m for m in (x.layer if x.expert is None else x.module for x in pending)}
        handles = [module.register_forward_hook(changes) for module in modules.values()]
        handles += [part.register_forward_hook(keep) for part in self._parts if (part, batch) not in self._kept]
        try:
            with self.reused(batch):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for part, outputs in final.items():  # also if the pass ended early
                output = _Output.of(outputs[0])
                if len(outputs) == 1 and output is not None:
                    self._kept[part, batch] = output

    @contextmanager
    def reused(self, batch: int) -> Iterator[None]:
        """Inside the ``with`` block, submodules whose outputs are kept for a batch return them, and do not run."""
        before: list[tuple[torch.nn.Module, Any]] = []
        for part in self._parts:
            if (part, batch) in self._kept:
                before.append((part, vars(part).get("forward")))  # accelerate has put its own there
                vars(part)["forward"] = self._kept[part, batch]
        try:
            yield
        finally:
            for part, forward in before:
                del vars(part)["forward"]
                if forward is not None:
                    vars(part)["forward"] = forward
