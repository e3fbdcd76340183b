"""The function ``requant``: ReQuant with any quantization method."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..analysis.path import CPU, homes_of
from ..analysis.proving import Effort, Prover
from ..analysis.quadrature import quadrature
from ..methods import SOLVERS
from ..models import Linears, LinearWeight, check_loaded, fingerprint
from ..models.folding import Fold, folded, narrowest
from ..models.gradients import gradient_checkpointing
from ..models.running import not_training
from ..packed import QuantizedMatrix
from ..plan import Plan, PlanEntry
from ..progress import progress as progress_bar
from ..quantization import calibrate
from ..quantization.model import check_weight, declare, plan_for, put
from ..text import CalibrationText
from .exact import ExactWeights
from .journal import Journal
from .matrices import QUANTIZED, Matrices
from .outliers import TEMPERATURES, split
from .record import KeptWeights, Requantization
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
        tokenizer, nsamples, seqlen, seed, bos, text_column: how to cut the calibration text, as in ``token_windows``;
            ``nsamples=None`` uses all windows.
        batch_size, rule, nodes, tol, max_nodes, abs_mode, checkpointing, map_folder: how to compute PQI, as in
            :func:`quantrature.analyze`.
        prove: whether to compute PQI once more at the end, to compare the predicted loss change with the measured one.
        resume_folder: folder to save intermediate results in; the files are removed at the end.
        resume: ``auto`` resumes an interrupted run with the same arguments, if there is one; ``required`` fails without
            one; ``never`` starts over. The result is bit-identical to that of an uninterrupted run.
        progress: whether to show a progress bar; by default if stderr is a terminal.

    Returns:
        The same model with quantized layers, and the record.

    Raises:
        InvalidArgumentError: for an invalid argument or plan entry, or a matrix whose weights are not finite; the
            message names it, and the model is unchanged.
        QuantratureError: if a loss or gradient is not finite; the message names matrix, sample and node, and the model
            is unchanged.
    """
    exact = ExactWeights(outlier_fraction, significant_fraction, steps, selection, temperatures, max_outlier_fraction)
    quadrature(rule, nodes, "requant")
    linears, plan = plan_for(
        model,
        bits=bits,
        group_size=group_size,
        method=method,
        sym=sym,
        meta_bits=meta_bits,
        outlier_fraction=0.0,
        plan=plan,
        ignore=ignore,
        experts=False,
        caller="requant",
    )
    chosen, entries = _chosen(linears, plan)
    text = CalibrationText(tokens, tokenizer, nsamples, seqlen, seed, bos, text_column)
    windows = text.windows(model)
    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder))
    settings: dict[str, Any] = {
        "grids": [entry.setting for entry in dict.fromkeys(entries.values())],
        "solvers": sorted({entry.solver for entry in entries.values()}),
        "outlier_fraction": outlier_fraction,
        "significant_fraction": significant_fraction,
        "steps": steps,
        "selection": selection,
        "max_outlier_fraction": max_outlier_fraction,
        **effort.settings,
        "batch_size": batch_size,
        **text.settings(windows, model),
    }
    budgets = exact.counts(sum(linear.numel for linear in chosen))
    split(budgets[0], [linear.numel for linear in chosen], [1.0] * len(chosen), math.inf, max_outlier_fraction)
    prints = fingerprint.of_matrices(chosen), fingerprint.of_tokens(windows)
    about = {
        **settings,
        "prove": prove,
        "plan": {name: asdict(entry) for name, entry in entries.items()},
        "model": prints[0],
        "calibration": prints[1],
    }
    journal = Journal(resume_folder, about, resume, "requant")
    integrals = bool(budgets[0]) + steps * bool(budgets[1]) + prove
    prover = Prover(model, windows, batch_size)
    with (
        not_training(model),
        progress_bar("requantizing", integrals * nodes * len(prover.share), progress) as bar,
        contextlib.ExitStack() as undone_on_failure,
    ):
        start = _start(model, linears, chosen, entries, prover, effort, journal, budgets[0])
        undone_on_failure.enter_context(folded(model, linears, start.folds))
        with (
            gradient_checkpointing(model, linears, checkpointing),
            Matrices(
                prover,
                start.quantizer.homes,
                chosen,
                start.stored,
                start.quantizer.original,
                effort,
                journal,
                bar.advance,
            ) as matrices,
        ):
            stage, mean_pqi, selected = QUANTIZED, {}, Selected([0] * len(chosen))
            if budgets[0]:
                mean_pqi = matrices.mean_pqi(stage)
                stage = "outliers"
                selected = select(matrices, journal, start.quantizer, mean_pqi, exact)
            significant, predicted = matrices.detach_stepwise(stage, budgets[1], steps, prove=prove)
            found, stages = matrices.stored, tuple(matrices.stages)
    journal.discard()
    declare(model, {linear.name: put(model, linear, found[linear.name]) for linear in chosen}, start.folds)
    kept = tuple(
        KeptWeights(
            linear.name,
            linear.numel,
            count,
            significant[linear.name],
            mean_pqi.get(linear.name),
            None if predicted is None else predicted[linear.name],
        )
        for linear, count in zip(chosen, selected.counts, strict=True)
    )
    sizes = (sum(m.nbytes for m in found.values()), sum(m.dense.nbytes for m in found.values()))
    return model, Requantization(kept, stages, selected.trials, selected.temperature, *sizes, settings, *prints)


def _chosen(linears: Linears, plan: Plan) -> tuple[list[LinearWeight], dict[str, PlanEntry]]:
    """The matrices that the plan quantizes, checked, and how, by name."""
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
class _Start:
    """The matrices as they are first quantized, before any weight is kept exactly.

    Attributes:
        quantizer: quantizes them again.
        stored: by name; empty where an interrupted run has found out already what they are needed for.
        folds: scales that are folded into the model, which then is the original.
    """

    quantizer: Quantizer
    stored: Mapping[str, QuantizedMatrix]
    folds: Sequence[Fold] = ()


def _start(
    model: torch.nn.Module,
    linears: Linears,
    chosen: Sequence[LinearWeight],
    entries: Mapping[str, PlanEntry],
    prover: Prover,
    effort: Effort,
    journal: Journal,
    outliers: int,
) -> _Start:
    homes = homes_of(chosen, effort.map_folder)
    if any(SOLVERS[entry.solver].needs for entry in entries.values()):
        found = calibrate(
            model,
            linears,
            entries,
            prover.windows,
            batch_size=prover.batch_size,
            keep_statistics=True,
            weight_of=lambda linear: narrowest(linear.weight.to(CPU).contiguous()),
        )
        quantizer = Quantizer(chosen, homes, dict(found.entries), found.statistics)
        return _Start(quantizer, found.matrices, found.folds)
    quantizer = Quantizer(chosen, homes, entries, {})
    known = outliers > 0 and QUANTIZED in journal
    return _Start(quantizer, {} if known else quantizer.all([0] * len(chosen)))
