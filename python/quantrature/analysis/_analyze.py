"""The function ``analyze``: estimate how much quantizing each matrix changes the loss."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..files.resume import check_resume
from ..methods import METHODS, Statistics, check_method
from ..models import Linears, LinearWeight, check_loaded, find_linears, fingerprint
from ..models.gradients import gradient_checkpointing
from ..models.ranks import rank_of
from ..models.running import not_training
from ..ops._arrays import dtype_name
from ..plan import PlanEntry
from ..plan.option import Option
from ..progress import progress as progress_bar
from ..quantization import collect
from ..text import CalibrationText
from .errors import Outcome, candidates, outcomes
from .integral import Integral
from .metrics import METRICS, activation_error, gradient_scores, weight_scores
from .path import WeightPath, homes_of, towards
from .proving import Effort, Prover
from .sensitivity import MatrixSensitivity, Proof, Sensitivity
from .snapshot import Snapshot


def analyze(
    model: torch.nn.Module,
    tokens: Any,
    *,
    objective: str = "nll",
    metrics: Sequence[str] = ("pqi", "kurtosis"),
    bits: int | Sequence[int] = 3,
    group_size: int = 64,
    method: str = "rtn",
    sym: bool = False,
    zero: str = "float",
    scale_dtype: str = "auto",
    statistics: Mapping[str, Statistics] | None = None,
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
    """Estimate how much the loss changes when each matrix is quantized, without changing the model.

    During the analysis, the weights move on a straight path to the quantized weights. At the end, they are restored
    bit for bit. The sum of the signed PQI of all weights predicts the loss change. The loss change is also measured on
    the same text, to check the prediction (arXiv 2503.01901; see :mod:`quantrature.analysis.integral`).

    Args:
        model: causal language model from transformers, on any device.
        tokens: calibration text; any source that :func:`quantrature.text.token_windows` takes.
        objective: the function whose change is predicted, a name from ``OBJECTIVES``. ``nll`` is the loss, as in the
            papers. ``kl`` is the KL divergence from the predictions of the original model; "loss change" then means the
            change of this divergence. Metrics other than ``pqi`` do not depend on ``objective``.
        metrics: names from ``METRICS``.
        bits: bits per weight of the quantized weights, 1 to 8; one value, or several to predict the loss change at
            each. Scores and maps are computed at the first value.
        group_size, method, sym, zero, scale_dtype: how to quantize, as in :func:`quantrature.quantize`. A method that
            needs calibration gets statistics of the original model.
        statistics: for such a method: matrix name to calibration statistics (:func:`quantrature.quantization.collect`).
            By default they are collected on the same text.
        ignore: matrices not to analyze, as in :func:`quantrature.models.find_linears`.
        tokenizer, nsamples, seqlen, seed, bos, text_column: how to cut the calibration text, as in ``token_windows``;
            ``nsamples=None`` uses all windows.
        batch_size: windows per forward pass.
        rule, nodes: as in :func:`quantrature.analysis.quadrature`; ``nodes`` is the number of gradient evaluations per
            window.
        tol: largest difference between predicted and measured loss change, relative to the measured one. ``nodes``
            is doubled until the difference is small enough. ``None`` for no limit.
        max_nodes: largest number of nodes. If the difference is above ``tol`` even then, ``Proof.within_tolerance`` is
            false.
        abs_mode: as in :func:`quantrature.analysis.integrate`.
        checkpointing: whether to recompute activations in the backward pass, block by block. This takes less memory
            and more time.
        map_folder: folder for the gradient sums; by default they are kept on the devices of the weights.
        resume_folder: folder to save the state of the integral in; the files are removed at the end.
        resume: ``auto`` resumes an interrupted run with the same arguments, if there is one; ``required`` fails without
            one; ``never`` starts over. The result is bit-identical to that of an uninterrupted run.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Returns:
        The scores of all matrices, the comparison of prediction and measurement, and the maps of single weights.

    Raises:
        InvalidArgumentError: for an invalid argument; the message names it.
        QuantratureError: if a loss or gradient is not finite (the message names matrix, sample and node), or the
            weights of a matrix are not (the message names it).
    """
    for metric in metrics:
        if metric not in METRICS:
            raise InvalidArgumentError(f"[analyze] metrics must be among {', '.join(METRICS)}: got {metric!r}")
    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder), objective)
    effort.check("analyze")
    check_method(method)
    of_bits = [bits] if isinstance(bits, int) else list(bits)
    entries = [PlanEntry(b, group_size, sym, method, zero=zero, scale_dtype=scale_dtype) for b in of_bits]
    check_resume("analyze", resume, resume_folder)
    linears = find_linears(model, ignore, experts=False)
    check_loaded("analyze", linears)
    text = CalibrationText(tokens, tokenizer, nsamples, seqlen, seed, bos, text_column)
    windows = text.windows(model)
    settings: dict[str, Any] = {
        "metrics": list(metrics),
        "bits": of_bits,
        "group_size": group_size,
        "method": method,
        "sym": sym,
        "zero": zero,
        "scale_dtype": scale_dtype,
        **effort.settings,
        "batch_size": batch_size,
        **text.settings(windows, model),
    }
    prints = fingerprint.of_matrices(linears), fingerprint.of_tokens(windows)
    snapshots = Snapshots(resume_folder, resume, {**settings, "model": prints[0], "calibration": prints[1]})
    prover = Prover(model, windows, batch_size, effort)
    homes = homes_of(linears, effort.map_folder)
    if statistics is None:
        with not_training(model):
            statistics = statistics_for(prover, linears, dict.fromkeys((linear.name for linear in linears), entries[0]))
    of_settings = _outcomes(linears, homes, entries, statistics, progress) if "pqi" in metrics else {}
    job = _Job(model, linears, metrics, entries, method, prover, homes, statistics, of_settings)
    with progress_bar("analyzing", job.passes, progress) as bar:
        found = job.run(snapshots, bar.advance, checkpointing)
    snapshots.discard()
    matrices = tuple(found.of(linear, metrics) for linear in linears)
    return Sensitivity(matrices, tuple(found.proofs), settings, *prints, found.maps)


@dataclass(frozen=True)
class _Job:
    """The work of :func:`analyze`, after it has checked its arguments.

    Attributes:
        model: the model to analyze.
        linears: its matrices.
        metrics: names of the scores to compute.
        entries: settings of the quantized weights; the first one is used for scores and maps.
        method: quantization method of all settings.
        prover: computes integrals and measures loss changes on the calibration text.
        homes: device of each matrix's sums and quantized weights.
        statistics: calibration statistics of the matrices, if the method needs them.
        outcomes: error and size of each matrix at each setting that a plan can use, if PQI is computed.
    """

    model: torch.nn.Module
    linears: Linears
    metrics: Sequence[str]
    entries: Sequence[PlanEntry]
    method: str
    prover: Prover
    homes: Mapping[str, torch.device]
    statistics: Mapping[str, Statistics]
    outcomes: Mapping[str, Mapping[str, Outcome]]

    @property
    def gradient_metrics(self) -> list[str]:
        """The metrics that need one gradient per window, at the original weights."""
        return [metric for metric in self.metrics if metric in ("first_order", "fisher")]

    @property
    def passes(self) -> int:
        """Number of forward or gradient passes over single windows, for all metrics and settings together."""
        of_window = bool(self.gradient_metrics) + ("activation_error" in self.metrics)
        of_window += ("pqi" in self.metrics) * self.prover.effort.nodes * len(self.entries)
        return of_window * len(self.prover.share)

    def run(self, snapshots: Snapshots, advance: Callable[[int], Any], checkpointing: bool) -> _Found:
        """Compute all scores; the model is restored at the end."""
        found, linears, windows = _Found(outcomes=self.outcomes), self.linears, self.prover.windows
        names = [linear.name for linear in linears]
        with not_training(self.model):
            moved = towards(linears, self.homes, dict.fromkeys(names, self.entries[0]), self.statistics)
            found.scores |= weight_scores(moved, [m for m in self.metrics if m in ("magnitude", "error", "kurtosis")])
            with (
                WeightPath(self.model, moved, self.prover.effort.map_folder) as path,
                gradient_checkpointing(self.model, linears, checkpointing),
            ):
                if "activation_error" in self.metrics:
                    found.scores["activation_error"] = activation_error(path, windows, self.prover.batch_size, advance)
                if self.gradient_metrics:
                    scores, maps = gradient_scores(path, windows, self.gradient_metrics, advance)
                    found.scores |= scores
                    found.maps |= maps
                for number, entry in enumerate(self.entries) if "pqi" in self.metrics else ():
                    if number:
                        path.moved = towards(linears, self.homes, dict.fromkeys(names, entry), self.statistics)
                    keeping = functools.partial(snapshots.of, entry.setting)
                    found.add(*self.prover.prove(path, entry.setting, self.method, advance, keeping))
        return found


class Snapshots:
    """The files to which the integrals of an analysis save their state.

    Args:
        folder: folder of the files; ``None`` saves nothing.
        resume: as in :func:`analyze`.
        about: settings and fingerprints of the analysis.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, resume: str, about: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._resume, self._about = resume, about
        self._made: list[Snapshot] = []

    def of(self, setting: str, nodes: int) -> Snapshot | None:
        """Return the file for the integral of a setting with this number of nodes; ``None`` without a folder."""
        if self._folder is None:
            return None
        rank, ranks = rank_of()
        of_rank = f".rank-{rank}-of-{ranks}" if ranks > 1 else ""
        file = self._folder / f"integral-{setting}{of_rank}.safetensors"
        self._made.append(Snapshot(file, {**self._about, "nodes": nodes}, self._resume))
        return self._made[-1]

    def discard(self) -> None:
        """Remove the files. Call this when the analysis is complete."""
        for snapshot in self._made:
            snapshot.discard()


@dataclass
class _Found:
    """The results of an analysis so far.

    Attributes:
        scores: ``scores[metric][matrix]`` is a score.
        maps: ``maps[metric][matrix]`` is a tensor with a value for each weight.
        outcomes: ``outcomes[matrix][setting]`` is the quantization error and the size.
        proofs: comparison of the predicted and the measured loss change, for each setting.
        changes: ``changes[setting][matrix]`` is the predicted loss change, in nats per token.
    """

    scores: dict[str, Mapping[str, float]] = field(default_factory=dict)
    maps: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    outcomes: Mapping[str, Mapping[str, Outcome]] = field(default_factory=dict)
    proofs: list[Proof] = field(default_factory=list)
    changes: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def add(self, integral: Integral, proof: Proof) -> None:
        """Add the integral of a setting; the first one gives the scores and the maps of PQI."""
        if not self.proofs:
            self.scores["pqi"] = {name: float(values.double().mean()) for name, values in integral.maps.items()}
            self.maps["pqi"] = {name: values.cpu() for name, values in integral.maps.items()}
        self.proofs.append(proof)
        self.changes[proof.setting] = integral.signed

    def of(self, linear: LinearWeight, metrics: Sequence[str]) -> MatrixSensitivity:
        """Return the results for one matrix."""
        outcomes = self.outcomes.get(linear.name, {})
        return MatrixSensitivity(
            linear.name,
            linear.role,
            linear.block,
            linear.out_features,
            linear.in_features,
            {metric: self.scores[metric][linear.name] for metric in metrics},
            {setting: signed[linear.name] for setting, signed in self.changes.items()},
            {setting: outcome.error for setting, outcome in outcomes.items()},
            {setting: outcome.nbytes for setting, outcome in outcomes.items()},
            dtype_name(linear.parameter),
        )


def _outcomes(
    linears: Linears,
    homes: Mapping[str, torch.device],
    entries: Sequence[PlanEntry],
    given: Mapping[str, Statistics],
    progress: bool | None,
) -> dict[str, dict[str, Outcome]]:
    """Return the quantization error and the size of each matrix at each candidate setting, by matrix and setting."""
    first = entries[0]
    options = sorted({*candidates(first), *(Option(e.bits, e.group_size) for e in entries)})
    found = {}
    with progress_bar("measuring settings", len(linears) * len(options), progress) as bar:
        for linear in linears:
            found[linear.name] = outcomes(
                linear.name,
                linear.weight.to(homes[linear.name]).contiguous(),
                options,
                lambda option: replace(first, bits=option.bits, group_size=option.group_size),
                bar.advance,
                given.get(linear.name),
            )
    return found


def statistics_for(prover: Prover, linears: Linears, entries: Mapping[str, PlanEntry]) -> Mapping[str, Statistics]:
    """Collect the calibration statistics that the methods of some entries need: matrix name to statistics."""
    needed = {name: METHODS[entry.method].needs for name, entry in entries.items() if METHODS[entry.method].needs}
    if not needed:
        return {}
    return collect(prover.model, linears, needed, prover.windows, batch_size=prover.batch_size)
