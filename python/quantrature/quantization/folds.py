"""Find the norm or matrix that computes the inputs of a matrix, so that a scale of the inputs can be folded into it.

This does not depend on a list of architectures. Each norm of the right width, and each matrix with enough rows, is a
candidate producer. For each candidate, the block runs in float32 with scales folded into it. The scales are powers of
two, so that they cause no rounding. If the block's output does not change, the fold is valid. The output does change if
another layer also reads the norm, if a nonlinearity or clamp lies in between, or if the rows are in another order.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..methods import METHODS, Statistics
from ..models import Linears, LinearWeight
from ..models.blocks import Blocks
from ..models.folding import NORM, ROWS, SHIFTED_NORM, Fold, as_rounded, changed_by, fold, restored, spread
from ..plan import PlanEntry

SOUND = 1e-3
"""Largest change of the block's output by a valid fold, relative to the change if only the consumers are scaled."""
LARGEST = 6
"""The scales in a trial are powers of two from 2^-6 to 2^6."""

Pair = tuple[str, str, tuple[int, int]]
"""Kind of the fold, name of the producer inside the block (for experts, without the index), and ``Fold.repeats``."""


class Folder:
    """Finds valid folds in the blocks of a model.

    Args:
        model: the model.
        linears: its quantizable matrices.
        entries: matrix name to plan entry.
    """

    def __init__(self, model: torch.nn.Module, linears: Linears, entries: Mapping[str, PlanEntry]) -> None:
        self._model, self._linears, self._entries = model, linears, entries
        self._uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._known: dict[tuple[str, ...], Pair] = {}
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        # The layers of Gemma 4 differ in these settings, and reading one from the whole configuration raises an error.
        layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
        self._heads = dict.fromkeys(_heads(layer) for layer in layers)

    def wanted(self, members: Sequence[LinearWeight]) -> bool:
        """Return whether any of the matrices has a scale that may be folded."""
        return any(self._scales(linear) for linear in members)

    def _scales(self, linear: LinearWeight) -> bool:
        entry = self._entries[linear.name]
        method = METHODS[entry.method]
        settings = method.settings(entry)
        return (
            method.input_scale is not None
            and settings["scale"]
            and settings["fold"]
            and not linear.aliases
            and (linear.expert is None or any(self._before_in_expert(linear)))
        )

    def _before_in_expert(self, linear: LinearWeight) -> Iterator[LinearWeight]:
        """Yield the earlier matrices of the same expert, which may compute the inputs of this one."""
        for other in itertools.takewhile(lambda other: other is not linear, self._linears):
            if other.module is linear.module and other.expert == linear.expert:
                yield other

    def groups(self, blocks: Blocks, number: int, members: Sequence[LinearWeight]) -> list[list[LinearWeight]]:
        """Return the matrices of a block whose scale may be folded, grouped by common input."""
        return [group for group in blocks.readers(number, members) if all(map(self._scales, group))]

    def folds(
        self,
        blocks: Blocks,
        number: int,
        groups: Sequence[Sequence[LinearWeight]],
        statistics: Mapping[str, Statistics],
    ) -> list[Fold]:
        """Find the valid folds of a block, and compute their scales from the inputs of the matrices.

        All experts of a module are tested together, because the same code runs them. Then each gets a scale of its own.

        Args:
            blocks: the blocks; the activations are the inputs of this block.
            number: index of the block.
            groups: matrices with a common input, as :meth:`groups` returns them.
            statistics: matrix name to statistics, which must have ``activations``.
        """
        prefix = blocks.name(number) + "."
        found = []
        with _in_float32(blocks.module(number)):
            exact = blocks.trial(number)
            pairs = [self._proven(blocks, number, prefix, group, exact) for group in groups]
        taken: set[str] = set()
        for group, pair in zip(groups, pairs, strict=True):
            if pair is None or pair[1] in taken:
                continue
            taken.add(pair[1])
            for readers in _readers(group):
                method = METHODS[self._entries[readers[0].name].method]
                activations = statistics[readers[0].name].activations
                assert method.input_scale is not None
                assert activations is not None
                weights = [(linear.weight.cpu().contiguous(), self._entries[linear.name]) for linear in readers]
                scale = method.input_scale(weights, activations, pair[2])
                found.append(as_rounded(self._model, _fold(pair, prefix, readers, scale)))
        return found

    def _proven(
        self, blocks: Blocks, number: int, prefix: str, group: Sequence[LinearWeight], exact: torch.Tensor
    ) -> Pair | None:
        """Return the producer that a scale of the group's inputs can be folded into; ``None`` if none is found."""
        width = group[0].in_features
        roles = tuple(linear.role for linear in group)
        powers = torch.randint(-LARGEST, LARGEST + 1, (width,), generator=torch.Generator().manual_seed(0))

        def change(pair: Pair | None) -> float:
            repeats = (0, 1) if pair is None else pair[2]
            scale = spread(torch.exp2(powers)[: width // repeats[1]], repeats)
            tried = [_fold(pair or (NORM, "", repeats), prefix, readers, scale) for readers in _readers(group)]
            producers = pair is not None
            with restored(changed_by(self._model, self._linears, tried, producers=producers)):
                fold(self._model, self._linears, tried, rounded=False, producers=producers)
                return float((blocks.trial(number) - exact).norm())

        alone = change(None)
        if not alone:
            return None  # a trial would prove nothing, for example if no token reaches these experts
        known = [self._known[roles]] if roles in self._known else []
        for pair in (*known, *self._candidates(blocks.module(number), prefix, group, width)):
            if change(pair) <= SOUND * alone:
                self._known[roles] = pair
                return pair
        return None

    def _candidates(
        self, block: torch.nn.Module, prefix: str, group: Sequence[LinearWeight], width: int
    ) -> Iterator[Pair]:
        if group[0].expert is not None:
            for linear in self._before_in_expert(group[0]):
                if linear.out_features >= width:
                    yield ROWS, linear.role, (0, 1)
            return
        counts = [(width, (0, 1))]
        for size, number in self._heads:
            shared = size * number
            if 0 < shared < width and width % shared == 0:
                counts.append((shared, (size, width // shared)))
        before = itertools.takewhile(lambda linear: linear.name != group[0].name, self._linears)
        for linear in reversed([x for x in before if x.name.startswith(prefix) and x.expert is None and not x.aliases]):
            for count, repeats in counts:
                if linear.out_features >= count:
                    yield ROWS, linear.name.removeprefix(prefix), repeats
        for name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.nn.Parameter) and weight.shape == (width,) and self._uses[id(weight)] == 1:
                for kind in (NORM, SHIFTED_NORM):
                    yield kind, name, (0, 1)


def _heads(config: Any) -> tuple[int, int]:
    """Return the head size and the number of key-value heads; 0 if the configuration has none."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return size, getattr(config, "num_key_value_heads", None) or heads


def _readers(group: Sequence[LinearWeight]) -> list[Sequence[LinearWeight]]:
    """Split a group into matrices that read the same activations: experts one by one, other matrices together."""
    return [group] if group[0].expert is None else [[linear] for linear in group]


def _fold(pair: Pair, prefix: str, readers: Sequence[LinearWeight], scale: torch.Tensor) -> Fold:
    kind, producer, repeats = pair
    number = "" if readers[0].expert is None else f".{readers[0].expert}"
    return Fold(kind, prefix + producer + number, tuple(linear.name for linear in readers), scale, repeats)


@contextmanager
def _in_float32(block: torch.nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, replace the parameters and buffers of a block by float32 copies."""
    held = [(t, t.data) for t in itertools.chain(block.parameters(), block.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.to(torch.float32, copy=True)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
