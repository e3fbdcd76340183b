"""Quantize a model block by block; the calibration inputs of a block come from the quantized blocks before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..methods import METHODS, Comparison, Statistics, quantize_matrix
from ..models import Linears, LinearWeight
from ..models.blocks import Blocks
from ..models.folding import Fold, changed_by, fold, restored
from ..models.part_outputs import PartOutputs
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
    """Result of :func:`calibrate`.

    Attributes:
        matrices: matrix name to quantized matrix.
        statistics: matrix name to calibration statistics; empty without ``keep_statistics``.
        folds: scales that the quantized matrices include. The caller must fold them into the layers that compute the
            inputs of these matrices (:func:`quantrature.models.folding.fold`).
        entries: matrix name to the plan entry that was used. If a scale was folded, its option ``scale`` is false.
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
    """Quantize the matrices that have a plan entry, block by block.

    The inputs of a block are computed by the quantized blocks before it. With ``true_sequential``, the inputs of a
    matrix are also computed by the quantized matrices before it in the same block, as in GPTQ (arXiv 2210.17323).
    Matrices that read the same activations are quantized together: q, k and v; o; gate and up; down. Each fused expert
    is calibrated on the tokens that are routed to it. If rtn has a smaller error than the chosen method, in the measure
    that the method minimizes, a warning names the matrix. At the end, the model has its original weights, bit for bit.

    Args:
        model: the model.
        linears: its quantizable matrices.
        entries: matrix name to plan entry; each entry must quantize its matrix.
        windows: token ids of the calibration text, (windows, tokens).
        batch_size: windows per forward pass of a block.
        true_sequential: whether matrices of a block are calibrated on the quantized matrices before them.
        state: folder in which finished blocks are saved, and from which they are read when a run resumes.
        keep_statistics: whether to return the calibration statistics, on the CPU, so that matrices can be quantized
            again. Blocks that are read from ``state`` have none.
        weight_of: function that returns the weight to quantize, contiguous; by default the weight in the model.
        report: function that is called with an amount of finished work, of :func:`units` in all, and its description.

    Raises:
        InvalidArgumentError: for a matrix that no calibration text reaches, or that its method cannot quantize; the
            message names it.
        QuantratureError: if activations or gradients are not finite; the message names module and sample.
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
    """State of one call of :func:`calibrate`.

    Attributes:
        model, linears, true_sequential, state, keep_statistics, weight_of, report: as in :func:`calibrate`.
        entries: matrix name to plan entry. If a scale was folded, its option ``scale`` is false.
        matrices: quantized matrices of the blocks so far.
        kept: their statistics, with ``keep_statistics``.
        folds: the folds of the blocks so far.
        comparison: comparison of each matrix with rtn.
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
        """Find the matrices with a plan entry, and the statistics that their methods need."""
        self.chosen = [linear for linear in self.linears if linear.name in self.entries]
        self.needs = {linear.name: METHODS[self.entries[linear.name].method].needs for linear in self.chosen}
        self._folder = Folder(self.model, self.linears, self.entries)

    def begin(self, windows: torch.Tensor, batch_size: int, whole: ExitStack) -> None:
        """Compute the Fisher information for methods that need it, then the inputs of the first block."""
        self.blocks = Blocks(self.model, self.linears, self.chosen, windows, batch_size)
        sensitive = [linear for linear in self.chosen if "fisher" in self.needs[linear.name]]
        self._fishers = fisher(self.model, sensitive, windows, self._reporting("the Fisher information"))
        whole.enter_context(apart(self.chosen))
        self.blocks.enter()

    def _reporting(self, what: str, passes: int = 1) -> Callable[[float], Any]:
        return lambda count: self.report(count / passes, what)

    def block(self, number: int, whole: ExitStack, of_block: ExitStack) -> None:
        """Quantize the matrices of a block, or read them from ``state``, and compute the inputs of the next block.

        Args:
            number: index of the block.
            whole: restores weights at the end of the calibration; used for weights that other blocks share.
            of_block: restores weights at the end of the block.
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
            self.blocks.advance(number, self._reporting(f"{self.blocks.name(number)}, resumed"))
            self._taken_up += 1
            return
        if self._taken_up == number > 0 and self.state is not None:
            _log.warning(
                "%d of %d blocks are read from %s, where an earlier run saved them",
                number,
                len(self.blocks),
                self.state.folder,
            )
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
        kept = PartOutputs(self.blocks.module(number))
        for step in steps:
            pending = [linear for linear in members if linear.name not in found]
            found |= self._quantized(number, step, folds, done, kept, pending)
            for linear in (linear for stage in step for linear in stage):
                _move(linear, found[linear.name])
        self.matrices |= found
        if self.state is not None and members:
            self.state.save(number, FinishedBlock(found, tuple(folds)))
        self.blocks.advance(number, done, kept)

    def _fold(self, found: Sequence[Fold], of_block: ExitStack) -> None:
        """Fold scales into the model until the end of the block; set the option ``scale`` of the consumers to false."""
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
        kept: PartOutputs,
        pending: Sequence[LinearWeight],
    ) -> dict[str, QuantizedMatrix]:
        """Quantize the matrices of some stages of a block, with statistics from one pass over the text."""
        copies: _Copies = {}
        found = {}
        for linear, statistics in _gathered(self.blocks, number, stages, self.needs, report, kept, pending):
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
    """Gather calibration statistics of matrices in the original model, for comparing settings of a method.

    Args:
        model, linears, windows, batch_size: as in :func:`calibrate`.
        needs: matrix name to the ``STATISTICS`` to gather.
        report: function that is called with an amount of finished work.

    Returns:
        Matrix name to statistics, on the CPU.
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
            kept = PartOutputs(blocks.module(number))
            if members:
                stages = blocks.stages(number, members)
                copies: _Copies = {}
                gathered = _gathered(blocks, number, stages, needs, lambda count: report(count / 2), kept)
                for linear, statistics in gathered:
                    found[linear.name] = _on_cpu(replace(statistics, fisher=fishers.get(linear.name)), copies)
            blocks.advance(number, lambda count: report(count / 2), kept)
    return found


def units(linears: Linears, entries: Mapping[str, PlanEntry], windows: int) -> int:
    """Return the total work that :func:`calibrate` reports: for each window, one unit per block and one for Fisher."""
    blocks = sum(1 + max(x.block for x in linears if x.name.startswith(f"{s}.")) for s in _stacks(linears, entries))
    fishers = any("fisher" in METHODS[entry.method].needs for entry in entries.values())
    return windows * (blocks + fishers)


def _stacks(linears: Linears, entries: Mapping[str, PlanEntry]) -> list[str]:
    """Return the stacks of blocks that have matrices with a plan entry."""
    return [stack for stack in linears.stacks if any(name.startswith(f"{stack}.") for name in entries)]


def peak_bytes(
    linears: Linears, entries: Mapping[str, PlanEntry], windows: int, seqlen: int, keep_statistics: bool = False
) -> int:
    """Estimate the memory that :func:`calibrate` needs, in bytes, besides the model and the quantized matrices.

    The estimate includes:

    - the activations between two blocks, and as much again for the outputs of a part of the block, such as its
      attention, that already has its final weights. If there are several stacks of blocks (an encoder-decoder), the
      outputs of an earlier stack are held twice: by themselves, and as arguments of the next stack's blocks;
    - a copy of the weights of one block, and two in float32 if scales may be folded;
    - the statistics of one stage, or of all stages with ``keep_statistics``. All experts of one parameter are one
      stage, and each has statistics of its own;
    - the working memory of the method: for a Hessian, its size in float64;
    - the Fisher information of all matrices, if their method needs it.
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
        needs = METHODS[entries[linear.name].method].needs
        copies = size + 2 * 4 * (METHODS[entries[linear.name].method].input_scale is not None)
        place_of = linear.name.removesuffix(linear.role)
        sums[place_of] = sums.get(place_of, 0) + linear.numel * copies
        hessian = 4 * linear.in_features**2 * ("hessian" in needs)
        sampled = 4 * linear.in_features * min(2 * SAMPLED, windows * seqlen) * ("activations" in needs)
        total += hessian + sampled
        others = 0  # statistics of the earlier experts of the same parameter, which are gathered together
        if linear.expert is not None:
            place = (id(linear.module), linear.attribute)
            others = experts.get(place, 0)
            experts[place] = others + hessian + sampled
        largest = max(largest, others + 3 * (hessian + sampled))
        fishers += 4 * linear.numel * ("fisher" in needs)
    return (
        windows * seqlen * hidden * size * 2 * len(_stacks(linears, entries))
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
    kept: PartOutputs | None = None,
    pending: Sequence[LinearWeight] = (),
) -> list[tuple[LinearWeight, Statistics]]:
    """Gather the statistics of the matrices of some stages in one pass over the text."""
    tokens = blocks.tokens
    gatherers: dict[str, Gatherer] = {}
    watched: list[LinearWeight] = []
    for stage in stages:
        asked = {need for linear in stage for need in needs[linear.name]}
        readers = stage if stage[0].expert is not None else stage[:1]
        gatherers |= {x.name: Gatherer(asked, None if x.expert is not None else tokens) for x in readers}
        watched += readers
    if _asks(stages, needs):
        blocks.watch(number, watched, lambda linear, x, _: gatherers[linear.name].take(x), report, kept, pending)
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
"""``id`` of a Hessian to the Hessian and its copy on the CPU: matrices with the same inputs share one copy."""


def _on_cpu(statistics: Statistics, copies: _Copies) -> Statistics:
    hessian = statistics.hessian
    if hessian is not None:
        statistics = replace(statistics, hessian=copies.setdefault(id(hessian), (hessian, hessian.cpu()))[1])
    return statistics


def _move(linear: LinearWeight, matrix: QuantizedMatrix) -> None:
    linear.weight.copy_(matrix.dequantize("float32"))
