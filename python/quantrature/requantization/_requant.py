"""The function ``requant``: ReQuant with any quantization method."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..analysis.path import CPU, homes_of
from ..analysis.proving import Effort, Prover
from ..methods import METHODS
from ..models import Linears, LinearWeight, check_loaded, fingerprint
from ..models.folding import Fold, folded, narrowest
from ..models.gradients import gradient_checkpointing
from ..models.running import not_training
from ..packed import QuantizedMatrix
from ..plan import Plan, PlanEntry
from ..progress import progress as progress_bar
from ..quantization import Request, calibrate, check_weight, declare, plan_for, put
from ..text import CalibrationText
from .exact import ExactWeights
from .journal import Journal
from .matrices import QUANTIZED, Matrices, Restored
from .outliers import TEMPERATURES
from .record import Requantization
from .selection import Quantizer, Selected, select


def requant(
    model: torch.nn.Module,
    tokens: Any,
    *,
    bits: int | None = None,
    group_size: int = 64,
    method: str = "rtn",
    sym: bool = False,
    meta_bits: int | None = None,
    plan: Plan | None = None,
    ignore: str | Iterable[str] = (),
    outlier_fraction: float = 0.0045,
    significant_fraction: float = 0.0005,
    steps: int = 2,
    selection: str = "temperature",
    temperatures: Sequence[float] = TEMPERATURES,
    max_outlier_fraction: float = 0.05,
    objective: str = "nll",
    tokenizer: Any = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    text_column: str | None = None,
    batch_size: int = 1,
    rule: str = "gauss",
    nodes: int = 4,
    tol: float | None = None,
    max_nodes: int = 32,
    abs_mode: str = "after_mean",
    checkpointing: bool = False,
    map_folder: str | os.PathLike[str] | None = None,
    prove: bool = True,
    resume_folder: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool | None = None,
) -> tuple[torch.nn.Module, Requantization]:
    """Quantize a model with any method, and keep the weights that cost most unquantized (arXiv 2503.01901).

    1. Quantize the model.
    2. Distribute outliers over the matrices by their mean PQI, at the temperature with the lowest calibration loss.
    3. Take the largest weights out of each matrix as outliers, and quantize the rest again.
    4. In several steps, compute PQI from the original to the current weights, and restore the weights of the largest
       PQI in the whole model ("significant weights").

    Outliers and significant weights of a matrix are stored in one sparse matrix, in 16 bits if that is exact. PQI is
    computed as in :func:`quantrature.analyze`. With ``torch.distributed``, each process takes a share of the
    calibration text; all processes end with the same model and record.

    Args:
        model: causal language model from transformers; float32, float16 or bfloat16, on any device. It is changed in
            place.
        tokens: calibration text; any source that :func:`quantrature.text.token_windows` takes.
        bits, group_size, method, sym, meta_bits, plan, ignore: how to quantize, as in :func:`quantrature.quantize`. The
            entries of a plan must have no outliers. A method that needs calibration uses the same text; its statistics
            are gathered once, before any weight is kept, and held in memory for all matrices.
        outlier_fraction: fraction of all weights, 0 to 1, that stay unquantized because of their magnitude.
        significant_fraction: fraction of all weights, 0 to 1, that stay unquantized because of their PQI.
        steps: number of rounds; each computes PQI again and restores an equal share of the significant weights.
        selection: how to distribute outliers. ``temperature``: by mean PQI; ``greedy``: to the matrices where they are
            predicted to reduce PQI most, from the error of each matrix at a few fractions of outliers.
        temperatures: temperatures to try, above 0.
        max_outlier_fraction: largest fraction of outliers in a matrix, 0 to 1.
        objective: what to integrate and measure, as in :func:`quantrature.analyze`: ``nll``, the loss, as in the paper,
            or ``kl``, the divergence from the predictions of the original model.
        tokenizer, nsamples, seqlen, seed, bos, text_column: how to cut the calibration text, as in ``token_windows``;
            ``nsamples=None`` uses all windows.
        batch_size, rule, nodes, tol, max_nodes, abs_mode, checkpointing, map_folder: how to compute PQI, as in
            :func:`quantrature.analyze`.
        prove: whether to compute PQI once more at the end, to compare the predicted loss change with the measured one.
        resume_folder: folder to save intermediate results in; the files are removed at the end.
        resume: ``auto`` resumes an interrupted run with the same arguments, if there is one; ``required`` fails without
            one; ``never`` starts over. The result is bit-identical to that of an uninterrupted run.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Returns:
        The same model with quantized layers, and the record.

    Raises:
        InvalidArgumentError: for an invalid argument or plan entry, or a matrix whose weights are not finite; the
            message names it, and the model is unchanged.
        QuantratureError: if a loss or gradient is not finite; the message names matrix, sample and node, and the model
            is unchanged.
    """
    exact = ExactWeights(outlier_fraction, significant_fraction, steps, selection, temperatures, max_outlier_fraction)
    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder), objective)
    effort.check("requant")
    request = Request(bits, group_size, method, sym, meta_bits=meta_bits, plan=plan, ignore=ignore)
    linears, plan = plan_for(model, request, experts=False, caller="requant")
    chosen, entries = _chosen(linears, plan)
    text = CalibrationText(tokens, tokenizer, nsamples, seqlen, seed, bos, text_column)
    windows = text.windows(model)
    settings: dict[str, Any] = {
        "grids": [entry.setting for entry in dict.fromkeys(entries.values())],
        "methods": sorted({entry.method for entry in entries.values()}),
        **exact.settings,
        **effort.settings,
        "batch_size": batch_size,
        **text.settings(windows, model),
    }
    exact.check_room(chosen)
    prints = fingerprint.of_matrices(chosen), fingerprint.of_tokens(windows)
    about = {
        **settings,
        "prove": prove,
        "plan": {name: asdict(entry) for name, entry in entries.items()},
        "model": prints[0],
        "calibration": prints[1],
    }
    journal = Journal(resume_folder, about, resume, "requant")
    job = _Job(model, linears, chosen, entries, Prover(model, windows, batch_size, effort), exact, prove, checkpointing)
    with progress_bar("requantizing", job.gradients, progress) as bar:
        done = job.run(journal, bar.advance)
    journal.discard()
    matrices = done.matrices
    declare(model, {linear.name: put(model, linear, matrices.stored[linear.name]) for linear in chosen}, done.folds)
    record = matrices.record(done.selected.counts, done.restored, settings, prints)
    return model, replace(record, trials=done.selected.trials, temperature=done.selected.temperature)


def _chosen(linears: Linears, plan: Plan) -> tuple[list[LinearWeight], dict[str, PlanEntry]]:
    """Return the matrices that the plan quantizes, and their plan entries by name; raise for an invalid one."""
    for name, entry in plan:
        if entry.outlier_fraction:
            raise InvalidArgumentError(
                f"[requant] outlier_fraction must be 0 in the plan's entries: got more for {name!r}"
            )
    entries = {linears.find(name).name: entry for name, entry in plan if not entry.keeps}
    chosen = [linear for linear in linears if linear.name in entries]
    if not chosen:
        raise InvalidArgumentError("[requant] the plan must quantize at least one matrix")
    check_loaded("requant", chosen)
    for linear in chosen:
        check_weight(linear.name, linear.weight, "requant")
    return chosen, entries


@dataclass(frozen=True)
class _Done:
    """The result of :class:`_Job`.

    Attributes:
        matrices: the quantized matrices.
        selected: outliers of each matrix.
        restored: significant weights of each matrix.
        folds: scales that the method folded into the model.
    """

    matrices: Matrices
    selected: Selected
    restored: Restored
    folds: Sequence[Fold]


@dataclass(frozen=True)
class _Job:
    """The work of :func:`requant`, after it has checked its arguments.

    Attributes:
        model: the model to quantize.
        linears: all its matrices.
        chosen: the matrices to quantize.
        entries: matrix name to its plan entry.
        prover: computes integrals and measures loss changes on the calibration text.
        exact: how many weights to keep unquantized.
        prove: whether to compute an integral at the end, to predict the loss change of the result.
        checkpointing: whether to recompute activations in the backward pass.
    """

    model: torch.nn.Module
    linears: Linears
    chosen: Sequence[LinearWeight]
    entries: Mapping[str, PlanEntry]
    prover: Prover
    exact: ExactWeights
    prove: bool
    checkpointing: bool

    @property
    def gradients(self) -> int:
        """Number of gradients that all integrals need, one for each window and node."""
        outliers, significant = self.exact.counts(self.chosen)
        integrals = bool(outliers) + self.exact.steps * bool(significant) + self.prove
        return integrals * self.prover.effort.nodes * len(self.prover.share)

    def run(self, journal: Journal, advance: Callable[[int], Any]) -> _Done:
        """Quantize the matrices and choose the weights to keep; the model itself gets only the folded scales."""
        outliers, significant = self.exact.counts(self.chosen)
        with not_training(self.model), contextlib.ExitStack() as undone_on_failure:
            quantizer, stored, folds = self._start(journal, outliers)
            undone_on_failure.enter_context(folded(self.model, self.linears, folds))
            with (
                gradient_checkpointing(self.model, self.linears, self.checkpointing),
                Matrices(
                    self.prover,
                    quantizer.homes,
                    self.chosen,
                    stored,
                    quantizer.original,
                    journal,
                    advance,
                ) as matrices,
            ):
                stage, selected = QUANTIZED, Selected([0] * len(self.chosen))
                if outliers:
                    mean_pqi = matrices.mean_pqi(stage)
                    stage = "outliers"
                    selected = select(matrices, journal, quantizer, mean_pqi, self.exact)
                restored = matrices.detach_stepwise(stage, significant, self.exact.steps, prove=self.prove)
        return _Done(matrices, selected, restored, folds)

    def _start(
        self, journal: Journal, outliers: int
    ) -> tuple[Quantizer, Mapping[str, QuantizedMatrix], Sequence[Fold]]:
        """Quantize all matrices, before any weight is kept.

        Returns:
            The quantizer; the quantized matrices by name, empty if the interrupted run has already used them; and the
            scales that the method wants folded into the model.
        """
        homes = homes_of(self.chosen, self.prover.effort.map_folder)
        if any(METHODS[entry.method].needs for entry in self.entries.values()):
            found = calibrate(
                self.model,
                self.linears,
                self.entries,
                self.prover.windows,
                batch_size=self.prover.batch_size,
                keep_statistics=True,
                weight_of=lambda linear: narrowest(linear.weight.to(CPU).contiguous()),
            )
            quantizer = Quantizer(self.chosen, homes, dict(found.entries), found.statistics)
            return quantizer, found.matrices, found.folds
        quantizer = Quantizer(self.chosen, homes, self.entries, {})
        known = outliers > 0 and QUANTIZED in journal
        return quantizer, {} if known else quantizer.all([0] * len(self.chosen)), ()
