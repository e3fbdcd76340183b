"""Quantize a model block by block, each on what the quantized blocks before it put out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..methods import SOLVERS, Comparison, Statistics, quantize_matrix
from ..models import Linears, LinearWeight
from ..models.blocks import Blocks
from ..models.folding import Fold, changed_by, fold, restored
from ..models.running import not_training
from ..nn.experts import apart
from ..packed import QuantizedMatrix
from ..plan import PlanEntry
from .folds import Folder
from .state import BlockState, FinishedBlock
from .statistics import SAMPLED, Gatherer, filled_up, fisher

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibrated:
    """What calibration comes to.

    Attributes:
        matrices: matrix name to its quantized form.
        statistics: matrix name to what it was quantized by; empty unless it was to be kept.
        folds: scales that are in the quantized matrices, and still to be folded into what makes their inputs.
        entries: matrix name to the entry it was quantized by: without a scale of its own where one was folded.
    """

    matrices: dict[str, QuantizedMatrix]
    statistics: dict[str, Statistics]
    folds: tuple[Fold, ...] = ()
    entries: Mapping[str, PlanEntry] = field(default_factory=dict)


def calibrate(
    model: torch.nn.Module,
    linears: Linears,
    entries: Mapping[str, PlanEntry],
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    true_sequential: bool = True,
    state: BlockState | None = None,
    keep_statistics: bool = False,
    weight_of: Callable[[LinearWeight], torch.Tensor] | None = None,
    report: Callable[[float, str], Any] = lambda units, note: None,
) -> Calibrated:
    """Quantize the matrices that have an entry, in the order of the blocks.

    The inputs of a block come from the blocks before it in their quantized form, and with ``true_sequential`` those of
    a matrix also from the quantized matrices before it in its block, as in GPTQ (arXiv 2210.17323): matrices that read
    the same activations are quantized together (q, k and v; o; gate and up; down). Of fused
    experts each is quantized on what is routed to it. A warning names the matrices for which rtn would have had the
    smaller error, by what their method minimizes. Afterwards the model is, bit for
    bit, what it was.

    Args:
        model, linears: the model and its quantizable matrices.
        entries: matrix name to plan entry; no entry keeps.
        windows: token ids of the calibration text, (windows, tokens).
        batch_size: windows that go through a block at once.
        true_sequential: see above.
        state: where finished blocks are saved and taken up again.
        keep_statistics: return them, on the CPU, for matrices that are to be quantized again; not those of blocks taken
            up.
        weight_of: makes the weight that is quantized, contiguous; by default that of the model, where it is.
        report: called with work that is done, :func:`units` in all, and what it was.

    Raises:
        InvalidArgumentError: naming a matrix that no text reaches, or that its method cannot do.
        QuantratureError: naming module and sample where activations or gradients are not finite.
    """
    run = _Run(model, linears, dict(entries), true_sequential, state, keep_statistics, weight_of or _as_it_is, report)
    with not_training(model), ExitStack() as whole:
        run.begin(windows, batch_size, whole)
        for number in range(len(run.blocks)):
            with ExitStack() as of_block:
                run.block(number, whole, of_block)
    run.comparison.report()
    matrices = {linear.name: run.matrices[linear.name] for linear in run.chosen}
    return Calibrated(matrices, run.kept, tuple(run.folds), run.entries)


def _as_it_is(linear: LinearWeight) -> torch.Tensor:
    return linear.weight.contiguous()


@dataclass
class _Run:
    """Calibration on its way from block to block.

    Attributes:
        model, linears, true_sequential, state, keep_statistics, weight_of, report: as in :func:`calibrate`.
        entries: matrix name to the entry that it is quantized by; without a scale of its own where one was folded.
        matrices, kept, folds: what came of the blocks so far.
    """

    model: torch.nn.Module
    linears: Linears
    entries: dict[str, PlanEntry]
    true_sequential: bool
    state: BlockState | None
    keep_statistics: bool
    weight_of: Callable[[LinearWeight], torch.Tensor]
    report: Callable[[float, str], Any]
    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)
    kept: dict[str, Statistics] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    comparison: Comparison = field(default_factory=Comparison)
    _taken_up: int = 0

    def __post_init__(self) -> None:
        """Find the matrices with an entry, and what their methods need."""
        self.chosen = [linear for linear in self.linears if linear.name in self.entries]
        self.needs = {linear.name: SOLVERS[self.entries[linear.name].solver].needs for linear in self.chosen}
        self._folder = Folder(self.model, self.linears, self.entries)

    def begin(self, windows: torch.Tensor, batch_size: int, whole: ExitStack) -> None:
        """Take gradients where a method needs them, and stand before the first block."""
        self.blocks = Blocks(self.model, self.linears, self.chosen, windows, batch_size)
        sensitive = [linear for linear in self.chosen if "fisher" in self.needs[linear.name]]
        self._fishers = fisher(self.model, sensitive, windows, self._reporting("the Fisher information"))
        whole.enter_context(apart(self.chosen))
        self.blocks.enter()

    def _reporting(self, what: str, passes: int = 1) -> Callable[[float], Any]:
        return lambda count: self.report(count / passes, what)

    def block(self, number: int, whole: ExitStack, of_block: ExitStack) -> None:
        """Quantize the matrices of a block, or take them up, and go on to the next.

        Args:
            number: of the block.
            whole, of_block: what ends with the calibration, and with the block: weights are then what they were.
        """
        members = self.blocks.members(number, self.chosen)
        for linear in members:
            (whole if linear.aliases else of_block).enter_context(restored([linear.weight]))
        finished = None if self.state is None else self.state.load(number)
        if finished is not None and set(finished.matrices) == {linear.name for linear in members}:
            self._fold(finished.folds, of_block)
            for linear in members:
                _move(linear, finished.matrices[linear.name])
            self.matrices |= finished.matrices
            self.blocks.advance(number, self._reporting(f"{self.blocks.name(number)}, taken up"))
            self._taken_up += 1
            return
        if self._taken_up == number > 0 and self.state is not None:
            _log.warning("%d of %d blocks are taken up from %s", number, len(self.blocks), self.state.folder)
        stages = self.blocks.stages(number, members) if members else []
        steps = [[stage] for stage in stages] if self.true_sequential else [stages] if stages else []
        groups = self._folder.groups(self.blocks, number, members) if self._folder.wanted(members) else []
        passes = sum(1 for step in steps if _asks(step, self.needs)) + bool(groups) + 1
        done = self._reporting(self.blocks.name(number), passes)
        folds: list[Fold] = []
        if groups:
            seen = {linear.name: x for linear, x in _gathered(self.blocks, number, groups, self.needs, done)}
            folds = self._folder.folds(self.blocks, number, groups, seen)
            self._fold(folds, of_block)
        found: dict[str, QuantizedMatrix] = {}
        for step in steps:
            found |= self._quantized(number, step, folds, done)
            for linear in (linear for stage in step for linear in stage):
                _move(linear, found[linear.name])
        self.matrices |= found
        if self.state is not None and members:
            self.state.save(number, FinishedBlock(found, tuple(folds)))
        self.blocks.advance(number, done)

    def _fold(self, found: Sequence[Fold], of_block: ExitStack) -> None:
        """Fold scales into the model while the block lasts; its matrices then need none of their own."""
        of_block.enter_context(restored(changed_by(self.model, self.linears, found)))
        fold(self.model, self.linears, found)
        for name in (name for each in found for name in each.consumers):
            options = {**self.entries[name].options, "scale": False}
            self.entries[name] = replace(self.entries[name], options=options)
        self.folds.extend(found)

    def _quantized(
        self,
        number: int,
        stages: Sequence[Sequence[LinearWeight]],
        folds: Sequence[Fold],
        report: Callable[[float], Any],
    ) -> dict[str, QuantizedMatrix]:
        """The matrices of some stages of a block, by what one pass over the text says of their inputs."""
        copies: _Copies = {}
        found = {}
        for linear, statistics in _gathered(self.blocks, number, stages, self.needs, report):
            statistics = replace(statistics, fisher=self._fishers.get(linear.name))
            matrix = quantize_matrix(
                linear.name,
                self.weight_of(linear),
                self.entries[linear.name],
                statistics=statistics,
                comparison=self.comparison,
                scale=next((f.scale for f in folds if linear.name in f.consumers), None),
            )
            found[linear.name] = matrix.to("cpu")
            if self.keep_statistics:
                self.kept[linear.name] = _on_cpu(statistics, copies)
        return found


def collect(
    model: torch.nn.Module,
    linears: Linears,
    needs: Mapping[str, Sequence[str]],
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    report: Callable[[float], Any] = lambda units: None,
) -> dict[str, Statistics]:
    """Statistics of matrices in the model as it is, for methods whose settings are still to be compared; on the CPU.

    Args:
        model, linears, windows, batch_size, report: as in :func:`calibrate`.
        needs: matrix name to what is asked for.
    """
    chosen = [linear for linear in linears if needs.get(linear.name)]
    found: dict[str, Statistics] = {}
    with not_training(model), ExitStack() as whole:
        blocks = Blocks(model, linears, chosen, windows, batch_size)
        fishers = fisher(model, [x for x in chosen if "fisher" in needs[x.name]], windows, report)
        whole.enter_context(apart(chosen))
        blocks.enter()
        for number in range(len(blocks)):
            members = blocks.members(number, chosen)
            if members:
                stages = blocks.stages(number, members)
                copies: _Copies = {}
                for linear, statistics in _gathered(blocks, number, stages, needs, lambda count: report(count / 2)):
                    found[linear.name] = _on_cpu(replace(statistics, fisher=fishers.get(linear.name)), copies)
            blocks.advance(number, lambda count: report(count / 2))
    return found


def units(linears: Linears, entries: Mapping[str, PlanEntry], windows: int) -> int:
    """How much work :func:`calibrate` reports in all."""
    blocks = sum(1 + max(x.block for x in linears if x.name.startswith(f"{s}.")) for s in _stacks(linears, entries))
    fishers = any("fisher" in SOLVERS[entry.solver].needs for entry in entries.values())
    return windows * (blocks + fishers)


def _stacks(linears: Linears, entries: Mapping[str, PlanEntry]) -> list[str]:
    """The stacks that hold matrices with an entry."""
    return [stack for stack in linears.stacks if any(name.startswith(f"{stack}.") for name in entries)]


def peak_bytes(
    linears: Linears, entries: Mapping[str, PlanEntry], windows: int, seqlen: int, keep_statistics: bool = False
) -> int:
    """Memory that :func:`calibrate` takes beside the model and the quantized matrices.

    The activations between two blocks, a copy of the weights of one block (of scales that may be folded, two more in
    float32), the statistics of one stage (with ``keep_statistics`` of all), and what its method works with: for a
    Hessian once more the same in float64. Of several stacks, what each puts out is kept twice: as it is, and as the
    blocks of the next are told of it. All experts of a parameter are one stage, each with statistics of its own.
    """
    chosen = [linear for linear in linears if linear.name in entries]
    if not chosen:
        return 0
    width = max(linear.in_features for linear in linears if linear.block == chosen[0].block)
    first = [linear for linear in linears if linear.block == chosen[0].block]
    hidden = min(linear.in_features for linear in [x for x in first if x.expert is None] or first)
    size = chosen[0].parameter.element_size()
    sums: dict[str, int] = {}
    experts: dict[tuple[int, str], int] = {}
    largest = total = fishers = 0
    for linear in chosen:
        needs = SOLVERS[entries[linear.name].solver].needs
        copies = size + 2 * 4 * (SOLVERS[entries[linear.name].solver].input_scale is not None)
        place_of = linear.name.removesuffix(linear.role)
        sums[place_of] = sums.get(place_of, 0) + linear.numel * copies
        hessian = 4 * linear.in_features**2 * ("hessian" in needs)
        sampled = 4 * linear.in_features * min(2 * SAMPLED, windows * seqlen) * ("activations" in needs)
        total += hessian + sampled
        others = 0  # statistics of all experts of a parameter are gathered together
        if linear.expert is not None:
            place = (id(linear.module), linear.attribute)
            others = experts.get(place, 0)
            experts[place] = others + hessian + sampled
        largest = max(largest, others + 3 * (hessian + sampled))
        fishers += 4 * linear.numel * ("fisher" in needs)
    return (
        windows * seqlen * hidden * size * (2 * len(_stacks(linears, entries)) - 1)
        + seqlen * width * 8
        + max(sums.values())
        + largest
        + fishers
        + (total if keep_statistics else 0)
    )


def _asks(step: Sequence[Sequence[LinearWeight]], needs: Mapping[str, Sequence[str]]) -> bool:
    return any(set(needs[linear.name]) - {"fisher"} for stage in step for linear in stage)


def _gathered(
    blocks: Blocks,
    number: int,
    stages: Sequence[Sequence[LinearWeight]],
    needs: Mapping[str, Sequence[str]],
    report: Callable[[float], Any],
) -> list[tuple[LinearWeight, Statistics]]:
    """The matrices of some stages, each with what was gathered in one pass over the text."""
    tokens = blocks.tokens
    gatherers: dict[str, Gatherer] = {}
    watched: list[LinearWeight] = []
    for stage in stages:
        asked = {need for linear in stage for need in needs[linear.name]}
        readers = stage if stage[0].expert is not None else stage[:1]
        gatherers |= {x.name: Gatherer(asked, None if x.expert is not None else tokens) for x in readers}
        watched += readers
    if _asks(stages, needs):
        blocks.watch(number, watched, lambda linear, x, _: gatherers[linear.name].take(x), report)
    found: list[tuple[LinearWeight, Statistics]] = []
    for stage in stages:
        if stage[0].expert is None:
            statistics = gatherers[stage[0].name].statistics()
            found += [(linear, statistics) for linear in stage]
        else:
            own = [gatherers[linear.name].statistics() for linear in stage]
            found += zip(stage, filled_up(stage, own) if _asks([stage], needs) else own, strict=True)
    return found


_Copies = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Hessians by their identity, each with its copy: matrices that read the same inputs share one."""


def _on_cpu(statistics: Statistics, copies: _Copies) -> Statistics:
    hessian = statistics.hessian
    if hessian is not None:
        statistics = replace(statistics, hessian=copies.setdefault(id(hessian), (hessian, hessian.cpu()))[1])
    return statistics


def _move(linear: LinearWeight, matrix: QuantizedMatrix) -> None:
    linear.weight.copy_(matrix.dequantize("float32"))
