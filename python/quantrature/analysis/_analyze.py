"""The analysis: quantize in mind, follow the way there, and write down what each matrix costs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..files.resume import check_resume
from ..methods import SOLVERS, Statistics, image_of, solver_of
from ..models import Linears, check_loaded, find_linears, fingerprint
from ..models.gradients import Share, gradient_checkpointing
from ..models.ranks import rank_of
from ..models.running import not_training
from ..ops._arrays import dtype_name
from ..plan import PlanEntry
from ..plan.option import Option
from ..progress import progress as progress_bar
from ..quantization import collect
from ..text import bos_of, token_windows
from .errors import Outcome, candidates, outcomes
from .metrics import METRICS, activation_error, gradient_scores, weight_scores
from .path import Moved, WeightPath, homes_of
from .proving import Effort, Prover
from .quadrature import quadrature
from .sensitivity import MatrixSensitivity, Proof, Sensitivity
from .snapshot import Snapshot


def analyze(
    model: torch.nn.Module,
    tokens: Any,
    *,
    metrics: Sequence[str] = ("pqi", "kurtosis"),
    bits: int | Sequence[int] = 3,
    group_size: int = 64,
    method: str = "rtn",
    sym: bool = False,
    ignore: str | Iterable[str] = (),
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
    resume_folder: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool | None = None,
) -> Sensitivity:
    """Find out what quantizing each matrix of a model costs, before anything is quantized.

    The model's weights move along the straight way to their quantized images and back; at the end they are, bit for
    bit, what they were. PQI comes with a proof: the sum of its signed values, which must be the loss change, and the
    loss change as measured on the same text (arXiv 2503.01901; see :mod:`quantrature.analysis.integral`).

    Args:
        model: causal language model from transformers, on any device.
        tokens: calibration text: whatever :func:`quantrature.text.token_windows` takes.
        metrics: names out of ``METRICS``.
        bits: of the images; several give PQI at several settings, of which the first makes the maps.
        group_size, method, sym: of the images; methods are those of ``METHODS``. One that needs calibration is given
            what the text says of the model as it is.
        ignore: matrices to leave alone, as in :func:`quantrature.models.find_linears`.
        tokenizer, nsamples, seqlen, seed, bos, text_column: of the calibration text; all windows of it when nsamples
            is ``None``.
        batch_size: windows of one forward pass.
        rule, nodes: of :func:`quantrature.analysis.quadrature`; nodes are gradient evaluations per sample.
        tol: largest relative distance of prediction and measurement; nodes are doubled until it holds.
        max_nodes: where to stop doubling; the proof then says that the tolerance was missed.
        abs_mode: of :func:`quantrature.analysis.integrate`.
        checkpointing: recompute activations in the backward pass, block by block.
        map_folder: keep the accumulators in files there instead of on the devices of the weights.
        resume_folder: save the state of the integral there from time to time, and remove it in the end.
        resume: ``auto`` goes on where a run of the same arguments was interrupted, to the same bits; ``required``
            fails where there is nothing to go on from, ``never`` starts over.
        progress: show a bar; ``None`` for when stderr is a terminal.

    Raises:
        InvalidArgumentError: naming the argument.
        QuantratureError: naming matrix, sample and node where a loss or gradient is not finite, or the matrix whose
            weights are not.
    """
    settings: dict[str, Any] = {
        "metrics": list(metrics),
        "bits": [bits] if isinstance(bits, int) else list(bits),
        "group_size": group_size,
        "method": method,
        "sym": sym,
        "rule": rule,
        "nodes": nodes,
        "tol": tol,
        "abs_mode": abs_mode,
        "batch_size": batch_size,
    }
    for metric in metrics:
        if metric not in METRICS:
            raise InvalidArgumentError(f"[analyze] metrics must be among {', '.join(METRICS)}: got {metric!r}")
    if tol is not None and tol <= 0:
        raise InvalidArgumentError(f"[analyze] tol must be above 0: got {tol}")

    solver = solver_of(method)
    entries = [PlanEntry(b, group_size, sym=sym, solver=solver) for b in settings["bits"]]
    quadrature(rule, nodes, "analyze")
    check_resume("analyze", resume, resume_folder)
    linears = find_linears(model, ignore, experts=False)
    check_loaded("analyze", linears)
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, bos=bos, text_column=text_column, model=model
    )
    settings |= {
        "nsamples": len(windows),
        "seqlen": windows.shape[1],
        "seed": seed,
        "bos": bos_of(windows, tokenizer, model),
    }
    model_print, text_print = fingerprint.of_matrices(linears), fingerprint.of_tokens(windows)

    prover = Prover(model, windows, batch_size)
    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder))
    gradients = [metric for metric in metrics if metric in ("first_order", "fisher")]
    total = len(Share(windows).windows) * (
        bool(gradients) + ("activation_error" in metrics) + ("pqi" in metrics) * nodes * len(entries)
    )
    blocks = [block for stack in linears.stacks for block in model.get_submodule(stack).children()]
    checkpointed = gradient_checkpointing(model, blocks) if checkpointing else contextlib.nullcontext()
    scores: dict[str, Mapping[str, float]] = {}
    maps: dict[str, Mapping[str, torch.Tensor]] = {}
    ways: dict[str, dict[str, Outcome]] = {}
    proofs: list[Proof] = []
    changes: dict[str, Mapping[str, float]] = {}
    snapshots: list[Snapshot] = []
    with not_training(model), progress_bar("analyzing", total, progress) as bar:
        needs = {linear.name: SOLVERS[solver].needs for linear in linears}
        given = collect(model, linears, needs, windows, batch_size=batch_size) if SOLVERS[solver].needs else {}
        homes = homes_of(linears, effort.map_folder)
        moved = _towards(linears, homes, entries[0], given)
        scores |= weight_scores(moved, [m for m in metrics if m in ("magnitude", "error", "kurtosis")])
        if "pqi" in metrics:
            options = sorted({*candidates(group_size), *(Option(e.bits, e.group_size) for e in entries)})
            for linear in linears:
                weight = linear.weight.to(homes[linear.name]).contiguous()
                ways[linear.name] = outcomes(
                    linear.name,
                    weight,
                    options,
                    lambda option: option.entry(solver, sym),
                    statistics=given.get(linear.name),
                )
        with WeightPath(model, moved, effort.map_folder) as path, checkpointed:
            if "activation_error" in metrics:
                scores["activation_error"] = activation_error(path, windows, batch_size, bar.advance)
            if gradients:
                found, maps_at_w = gradient_scores(path, windows, gradients, bar.advance)
                scores |= found
                maps |= maps_at_w
            if "pqi" in metrics:
                for number, entry in enumerate(entries):
                    if number:
                        path.moved = _towards(linears, homes, entry, given)

                    def snapshot(nodes: int, setting: str = entry.setting) -> Snapshot | None:
                        if resume_folder is None:
                            return None
                        about = {**settings, "nodes": nodes, "model": model_print, "calibration": text_print}
                        rank, ranks = rank_of()
                        of_rank = f".rank-{rank}-of-{ranks}" if ranks > 1 else ""
                        file = Path(resume_folder) / f"integral-{setting}{of_rank}.safetensors"
                        snapshots.append(Snapshot(file, about, resume))
                        return snapshots[-1]

                    integral, proof = prover.prove(path, entry.setting, method, effort, bar.advance, snapshot)
                    proofs.append(proof)
                    changes[entry.setting] = integral.signed
                    if number == 0:
                        scores["pqi"] = {name: float(values.double().mean()) for name, values in integral.maps.items()}
                        maps["pqi"] = {name: values.cpu() for name, values in integral.maps.items()}
                    del integral  # and with it accumulators on devices
    for saved in snapshots:
        saved.discard()
    matrices = tuple(
        MatrixSensitivity(
            linear.name,
            linear.role,
            linear.block,
            linear.out_features,
            linear.in_features,
            {metric: scores[metric][linear.name] for metric in metrics},
            {setting: signed[linear.name] for setting, signed in changes.items()},
            {setting: found.error for setting, found in ways.get(linear.name, {}).items()},
            {setting: found.nbytes for setting, found in ways.get(linear.name, {}).items()},
            dtype_name(linear.parameter),
        )
        for linear in linears
    )
    return Sensitivity(matrices, tuple(proofs), settings, model_print, text_print, maps)


def _towards(
    linears: Linears, homes: Mapping[str, torch.device], entry: PlanEntry, given: Mapping[str, Statistics]
) -> list[Moved]:
    """All matrices on their way to the images of one plan entry, which are made in their homes."""
    return [
        Moved(linear, image_of(linear.name, linear.weight.to(home), entry, given.get(linear.name)), home)
        for linear, home in ((linear, homes[linear.name]) for linear in linears)
    ]
