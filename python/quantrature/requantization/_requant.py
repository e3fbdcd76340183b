"""ReQuant on any host method."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._C import InvalidArgumentError
from ..analysis.path import CPU, homes_of
from ..analysis.proving import Effort
from ..analysis.quadrature import quadrature
from ..methods import SOLVERS, Statistics, quantize_matrix
from ..models import LinearWeight, check_loaded, fingerprint
from ..models.folding import Fold, folded, narrowest
from ..models.gradients import Share, gradient_checkpointing
from ..models.running import not_training
from ..packed import QuantizedMatrix
from ..plan import Plan, PlanEntry
from ..progress import progress as progress_bar
from ..quantization import calibrate
from ..quantization.model import check_weight, declare, plan_for, put
from ..text import bos_of, token_windows
from .journal import Found, Journal
from .matrices import Matrices
from .outliers import SELECTIONS, SHARES, TEMPERATURES, greedy_split, split
from .record import KeptWeights, Requantization, Trial


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
    """Quantize a model with a host method and keep exactly the weights that cost most (arXiv 2503.01901).

    1. Quantize with the host. 2. Give each matrix a share of the outliers by its mean PQI, at the temperature with
    the lowest calibration loss. 3. Take the largest weights of each matrix out and quantize the rest anew. 4. In some
    steps, integrate from the original weights to the current ones and restore those of the largest PQI, ranked over
    the whole model. Outliers and significant weights of a matrix share one sparse matrix beside its grid, in 16 bits
    where that holds them exactly. PQI is taken as in :func:`quantrature.analyze`, and like there the processes of
    ``torch.distributed`` divide the calibration text; each ends with the same model and record.

    Args:
        model: causal language model from transformers; float32, float16 or bfloat16, on any device. It is changed.
        tokens: calibration text: whatever :func:`quantrature.text.token_windows` takes.
        bits, group_size, method, sym, meta_bits, plan, ignore: the host, as in :func:`quantrature.quantize`; the
            entries of a plan have no outliers of their own. A host that needs calibration is given the same text; what
            it says is found once, with the host alone, and held in memory for all matrices.
        outlier_fraction: fraction of all weights, 0 to 1, that are kept for their magnitude.
        significant_fraction: fraction of all weights, 0 to 1, that are kept for their PQI.
        steps: integrals over which these are spread.
        selection: ``temperature``, or ``greedy``: outliers go where they are predicted to save most PQI, judged by the
            error of each matrix at a few ratios.
        temperatures: to try.
        max_outlier_fraction: fraction of a matrix, 0 to 1, that may be outliers.
        tokenizer, nsamples, seqlen, seed, bos, text_column: of the calibration text; all windows of it when nsamples
            is ``None``.
        batch_size, rule, nodes, tol, max_nodes, abs_mode, checkpointing, map_folder: of the integrals, as in
            :func:`quantrature.analyze`.
        prove: integrate once more at the end, for a prediction of the result beside its measurement.
        resume_folder: keep there, from time to time, what was found out so far, and remove it in the end.
        resume: ``auto`` goes on where a run of the same arguments was interrupted, to the same bits; ``required``
            fails where there is nothing to go on from, ``never`` starts over.
        progress: show a bar; ``None`` for when stderr is a terminal.

    Returns:
        The same model with its layers quantized, and the record.

    Raises:
        InvalidArgumentError: naming the argument, the plan's entry, or the matrix whose weights are not finite; the
            model is then as it was.
        QuantratureError: naming matrix, sample and node where a loss or gradient is not finite; likewise.
    """
    _check(outlier_fraction, significant_fraction, steps, selection, temperatures, max_outlier_fraction)
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
    for name, entry in plan:
        if entry.outlier_fraction:
            raise InvalidArgumentError(f"[requant] the plan must leave outliers to ReQuant: got some for {name!r}")
    entries = {linears.find(name).name: entry for name, entry in plan if not entry.keeps}
    chosen = [linear for linear in linears if linear.name in entries]
    if not chosen:
        raise InvalidArgumentError("[requant] the plan must quantize at least one matrix")
    check_loaded("requant", chosen)
    for linear in chosen:
        check_weight(linear.name, linear.weight, "requant")
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, bos=bos, text_column=text_column, model=model
    )
    settings: dict[str, Any] = {
        "host": [entry.setting for entry in dict.fromkeys(entries.values())],
        "solvers": sorted({entry.solver for entry in entries.values()}),
        "outlier_fraction": outlier_fraction,
        "significant_fraction": significant_fraction,
        "steps": steps,
        "selection": selection,
        "max_outlier_fraction": max_outlier_fraction,
        "rule": rule,
        "nodes": nodes,
        "tol": tol,
        "abs_mode": abs_mode,
        "batch_size": batch_size,
        "nsamples": len(windows),
        "seqlen": windows.shape[1],
        "seed": seed,
        "bos": bos_of(windows, tokenizer, model),
    }
    total = sum(linear.numel for linear in chosen)
    budgets = round(outlier_fraction * total), round(significant_fraction * total)
    split(budgets[0], [linear.numel for linear in chosen], [1.0] * len(chosen), math.inf, max_outlier_fraction)
    model_print, text_print = fingerprint.of_matrices(chosen), fingerprint.of_tokens(windows)
    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder))
    blocks = [block for stack in linears.stacks for block in model.get_submodule(stack).children()]
    integrals = bool(budgets[0]) + steps * bool(budgets[1]) + prove
    journal = Journal(
        resume_folder,
        {
            **settings,
            "prove": prove,
            "plan": {name: asdict(entry) for name, entry in entries.items()},
            "model": model_print,
            "calibration": text_print,
        },
        resume,
        "requant",
    )

    passes = integrals * nodes * len(Share(windows).windows)
    with (
        not_training(model),
        progress_bar("requantizing", passes, progress) as bar,
        contextlib.ExitStack() as undone_on_failure,
    ):
        host = (
            calibrate(
                model, linears, entries, windows, batch_size=batch_size, keep_statistics=True, weight_of=_original
            )
            if any(SOLVERS[entry.solver].needs for entry in entries.values())
            else None
        )
        given = {} if host is None else host.statistics
        homes = homes_of(chosen, effort.map_folder)
        folds: Sequence[Fold] = ()
        if host is not None:
            # From here on, the model with the scales folded in is the original.
            stored, folds, entries = host.matrices, host.folds, dict(host.entries)
            undone_on_failure.enter_context(folded(model, linears, folds))
        elif budgets[0] and "host" in journal:
            stored = {}  # only the matrices without their outliers are still needed
        else:
            stored = _without_outliers(chosen, homes, entries, [0] * len(chosen), given)
        with (
            gradient_checkpointing(model, blocks) if checkpointing else contextlib.nullcontext(),
            Matrices(
                model,
                chosen,
                homes,
                stored,
                lambda linear: _original(linear, homes[linear.name]),
                windows,
                batch_size,
                effort,
                journal,
                bar.advance,
            ) as matrices,
        ):
            state, mean_pqi = "host", {}
            counts: Sequence[int] = [0] * len(chosen)
            trials: list[Trial] = []
            temperature = None
            if budgets[0]:
                mean_pqi = matrices.mean_pqi(state)
                state = "outliers"
                if selection == "greedy":
                    counts = greedy_counts(chosen, homes, entries, mean_pqi, budgets[0], max_outlier_fraction, given)
                    matrices.stored = _without_outliers(chosen, homes, entries, counts, given)
                else:
                    counts, temperature, trials = _search(
                        matrices, journal, entries, mean_pqi, budgets[0], temperatures, max_outlier_fraction, given
                    )
            significant_of, last = matrices.detach_stepwise(state, budgets[1], steps, prove=prove)
            found, stages = matrices.stored, tuple(matrices.stages)
    journal.discard()
    specs = {linear.name: put(model, linear, found[linear.name]) for linear in chosen}
    declare(model, specs, folds)
    kept = tuple(
        KeptWeights(
            linear.name,
            linear.numel,
            count,
            significant_of[linear.name],
            mean_pqi.get(linear.name),
            last[linear.name] if last is not None else None,
        )
        for linear, count in zip(chosen, counts, strict=True)
    )
    return model, Requantization(
        kept,
        stages,
        tuple(trials),
        temperature,
        sum(matrix.nbytes for matrix in found.values()),
        sum(matrix.dense.nbytes for matrix in found.values()),
        settings,
        model_print,
        text_print,
    )


def _check(
    outlier_fraction: float,
    significant_fraction: float,
    steps: int,
    selection: str,
    temperatures: Sequence[float],
    max_outlier_fraction: float,
) -> None:
    for name, value in (
        ("outlier_fraction", outlier_fraction),
        ("significant_fraction", significant_fraction),
        ("max_outlier_fraction", max_outlier_fraction),
    ):
        if not 0 <= value <= 1:
            raise InvalidArgumentError(f"[requant] {name} must be a fraction between 0 and 1: got {name}={value}")
    both = outlier_fraction + significant_fraction
    if both > 1:
        raise InvalidArgumentError(
            f"[requant] outlier_fraction and significant_fraction must be at most 1 together: got {both:g}"
        )
    if not both:
        raise InvalidArgumentError(
            "[requant] outlier_fraction and significant_fraction must not both be 0: quantize does without"
        )
    if steps < 1:
        raise InvalidArgumentError(f"[requant] steps must be at least 1: got steps={steps}")
    if selection not in SELECTIONS:
        raise InvalidArgumentError(
            f"[requant] selection must be one of {', '.join(SELECTIONS)}: got selection={selection!r}"
        )
    if not temperatures or not all(temperature > 0 for temperature in temperatures):
        raise InvalidArgumentError(
            f"[requant] temperatures must be at least one number above 0: got temperatures={list(temperatures)}"
        )


def _original(linear: LinearWeight, home: torch.device = CPU) -> torch.Tensor:
    return narrowest(linear.weight.to(home).contiguous())


def _without_outliers(
    linears: Sequence[LinearWeight],
    homes: Mapping[str, torch.device],
    entries: Mapping[str, PlanEntry],
    counts: Sequence[int],
    given: Mapping[str, Statistics],
) -> dict[str, QuantizedMatrix]:
    """Each matrix quantized in its home, with its largest weights left out of the fit and kept."""
    return {
        linear.name: _with_count(linear, homes[linear.name], entries[linear.name], count, given.get(linear.name))
        for linear, count in zip(linears, counts, strict=True)
    }


def _with_count(
    linear: LinearWeight, home: torch.device, entry: PlanEntry, count: int, statistics: Statistics | None
) -> QuantizedMatrix:
    weight = _original(linear, home)
    places = ops.topk(weight.view(-1), count)[1] if count else None
    return quantize_matrix(linear.name, weight, entry, places, statistics)


def _search(
    matrices: Matrices,
    journal: Journal,
    entries: Mapping[str, PlanEntry],
    mean_pqi: Mapping[str, float],
    budget: int,
    temperatures: Sequence[float],
    largest_share: float,
    given: Mapping[str, Statistics],
) -> tuple[Sequence[int], float, list[Trial]]:
    """Try every temperature; leave the stored forms of the best one in place."""
    sizes = [linear.numel for linear in matrices.linears]
    of_matrices = [mean_pqi[linear.name] for linear in matrices.linears]
    best: tuple[Sequence[int], Trial] | None = None
    stored: dict[str, QuantizedMatrix] = {}
    trials = []
    for temperature in temperatures:
        counts = split(budget, sizes, of_matrices, temperature, largest_share)

        def attempt(counts: Sequence[int] = counts) -> Found:
            matrices.stored = _without_outliers(matrices.linears, matrices.homes, entries, counts, given)
            return matrices.measure(), {}

        known = (step := f"temperature {temperature}") in journal
        trials.append(Trial(temperature, journal.of(step, attempt)[0]))
        if best is None or trials[-1].measured_loss_change < best[1].measured_loss_change:
            best, stored = (counts, trials[-1]), {} if known else matrices.stored
    assert best is not None
    matrices.stored = stored or _without_outliers(matrices.linears, matrices.homes, entries, best[0], given)
    return best[0], best[1].temperature, trials


def greedy_counts(
    linears: Sequence[LinearWeight],
    homes: Mapping[str, torch.device],
    entries: Mapping[str, PlanEntry],
    mean_pqi: Mapping[str, float],
    budget: int,
    largest_share: float,
    given: Mapping[str, Statistics] | None = None,
) -> list[int]:
    """Counts by :func:`greedy_split`, from the error of each matrix at a few shares of outliers."""
    errors = []
    for linear in linears:
        home = homes[linear.name]
        exact = linear.weight.to(home).float()
        by_count = {}
        for share in SHARES:
            count = math.floor(min(share, largest_share) * linear.numel)
            if count not in by_count:
                statistics = (given or {}).get(linear.name)
                image = _with_count(linear, home, entries[linear.name], count, statistics).dequantize("float32")
                by_count[count] = float((image - exact).abs().sum(dtype=torch.float64))
        errors.append(by_count)
    sizes = [linear.numel for linear in linears]
    return greedy_split(
        budget, sizes, [mean_pqi[linear.name] * linear.numel for linear in linears], errors, largest_share
    )
