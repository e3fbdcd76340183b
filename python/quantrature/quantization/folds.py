"""What the scales of a block's inputs can be folded into, found out by trying it on the block.

No architecture is known by name. A norm of the right width or a matrix with rows enough may make the inputs of some
matrices: a fold with scales that are powers of two, which leave no rounding behind, is tried on it in float32, and
where the block's output then stays what it was, the fold is sound. A second reader of a norm, a nonlinearity that a
scale does not pass, a clamp, rows in another order all show in the output.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..methods import SOLVERS, Statistics
from ..models import Linears, LinearWeight
from ..models.blocks import Blocks
from ..models.folding import NORM, ROWS, SHIFTED_NORM, Fold, as_rounded, changed_by, fold, restored, spread
from ..plan import PlanEntry

SOUND = 1e-3
"""A fold leaves at most so much of the change that the consumers alone make to the output."""
LARGEST = 6
"""Scales that are tried go from 2 to the power of -6 to 2 to the power of 6."""

Pair = tuple[str, str, tuple[int, int]]
"""Kind, producer's name inside the block (of experts without their numbers), repeats."""


class Folder:
    """Finds the folds of a model's blocks.

    Args:
        model, linears: the model and its quantizable matrices.
        entries: matrix name to plan entry.
    """

    def __init__(self, model: torch.nn.Module, linears: Linears, entries: Mapping[str, PlanEntry]) -> None:
        self._model, self._linears, self._entries = model, linears, entries
        self._uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._known: dict[tuple[str, ...], Pair] = {}
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        # Gemma 4's layers differ in such settings, and its configuration as a whole refuses to name one.
        layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
        self._heads = dict.fromkeys(_heads(layer) for layer in layers)

    def wanted(self, members: Sequence[LinearWeight]) -> bool:
        """Whether any of these matrices has a scale that may be folded."""
        return any(self._scales(linear) for linear in members)

    def _scales(self, linear: LinearWeight) -> bool:
        entry = self._entries[linear.name]
        method = SOLVERS[entry.solver]
        settings = method.settings(entry)
        return (
            method.input_scale is not None
            and settings["scale"]
            and settings["fold"]
            and not linear.aliases
            and (linear.expert is None or any(self._before_in_expert(linear)))
        )

    def _before_in_expert(self, linear: LinearWeight) -> Iterator[LinearWeight]:
        """The matrices of the same expert before one, which may make its inputs."""
        for other in itertools.takewhile(lambda other: other is not linear, self._linears):
            if other.module is linear.module and other.expert == linear.expert:
                yield other

    def groups(self, blocks: Blocks, number: int, members: Sequence[LinearWeight]) -> list[list[LinearWeight]]:
        """The matrices of a block whose scale may be folded, those that read the same together."""
        return [group for group in blocks.readers(number, members) if all(map(self._scales, group))]

    def folds(
        self,
        blocks: Blocks,
        number: int,
        groups: Sequence[Sequence[LinearWeight]],
        statistics: Mapping[str, Statistics],
    ) -> list[Fold]:
        """The folds of a block, with the best scales by the inputs of each group of matrices.

        All experts are one group in the proof, since one program runs them all; each then has a scale of its own.
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
                method = SOLVERS[self._entries[readers[0].name].solver]
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
        """What a scale of the group's inputs can be folded into; ``None`` where nothing is found."""
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
            return None  # nothing is proven by what changes nothing, as with experts that no token reaches
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
    """Size and number of the heads of keys and values; 0 where a configuration has none."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return size, getattr(config, "num_key_value_heads", None) or heads


def _readers(group: Sequence[LinearWeight]) -> list[Sequence[LinearWeight]]:
    """The matrices of a group that read the same activations: all of them, but each expert alone."""
    return [group] if group[0].expert is None else [[linear] for linear in group]


def _fold(pair: Pair, prefix: str, readers: Sequence[LinearWeight], scale: torch.Tensor) -> Fold:
    kind, producer, repeats = pair
    number = "" if readers[0].expert is None else f".{readers[0].expert}"
    return Fold(kind, prefix + producer + number, tuple(linear.name for linear in readers), scale, repeats)


@contextmanager
def _in_float32(block: torch.nn.Module) -> Iterator[None]:
    """Give a block copies in float32 of its parameters and buffers while inside."""
    held = [(t, t.data) for t in itertools.chain(block.parameters(), block.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.to(torch.float32, copy=True)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
