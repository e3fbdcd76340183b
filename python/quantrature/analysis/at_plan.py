"""Integrate the path to a plan, where each matrix has a setting of its own, and add the result to an analysis."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..files.resume import check_resume
from ..methods import Statistics
from ..models import check_loaded, find_linears, fingerprint
from ..models.running import not_training
from ..plan import Plan
from ..plan.option import Option
from ..progress import progress as progress_bar
from ._analyze import Snapshots, statistics_for, towards
from .path import WeightPath, homes_of
from .proving import Effort, Prover
from .sensitivity import AtPlan, Sensitivity


def integrate_plan(
    model: torch.nn.Module,
    windows: torch.Tensor,
    sensitivity: Sensitivity,
    plan: Plan,
    *,
    statistics: Mapping[str, Statistics] | None = None,
    resume_folder: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool | None = None,
) -> Sensitivity:
    """Predict and measure the loss change of a plan, and add both to an analysis.

    An analysis integrates at settings that are the same for all matrices. Far from them, predictions are
    extrapolations. :func:`quantrature.allocate` takes the loss changes at plans into account, so the next plan is
    chosen with prices that were integrated near it.

    Args:
        model: the model that was analyzed.
        windows: token ids of the calibration text of the analysis, int64 (samples, seqlen).
        sensitivity: the analysis. Objective, quadrature rule, number of nodes and batch size are taken from it.
        plan: a plan for this model.
        statistics: matrix name to calibration statistics, for methods that need them; by default they are collected on
            ``windows``.
        resume_folder, resume, progress: as in :func:`quantrature.analyze`.

    Returns:
        The analysis with one more item in :attr:`Sensitivity.plans`. The model is unchanged.

    Raises:
        InvalidArgumentError: for another model or text than those of the analysis, and for a plan with a matrix that
            the analysis does not have.
        QuantratureError: if a loss or gradient is not finite; the message names matrix, sample and node.
    """
    check_resume("integrate_plan", resume, resume_folder)
    linears = find_linears(model, experts=False)
    check_loaded("integrate_plan", linears)
    known = {m.name for m in sensitivity.matrices}
    for name, _ in plan:
        if name not in known:
            raise InvalidArgumentError(f"[integrate_plan] plan must have matrices of the analysis: got {name!r}")
    linears = replace(linears, matrices=tuple(linear for linear in linears if linear.name in known))
    if fingerprint.of_matrices(linears) != sensitivity.model:
        raise InvalidArgumentError(
            "[integrate_plan] model must be the model that was analyzed, with its original weights"
        )
    if fingerprint.of_tokens(windows) != sensitivity.calibration:
        raise InvalidArgumentError("[integrate_plan] windows must be those of the analysis")
    settings = sensitivity.settings
    effort = Effort(settings["rule"], settings["nodes"], settings["tol"], objective=sensitivity.objective)
    prover = Prover(model, windows, int(settings["batch_size"]), effort)
    entries = {name: entry for name, entry in plan if not entry.keeps}
    about: dict[str, Any] = {
        **settings,
        "model": sensitivity.model,
        "calibration": sensitivity.calibration,
        "plan": {name: str(entry) for name, entry in entries.items()},
    }
    label = f"plan {len(sensitivity.plans) + 1}"
    snapshots = Snapshots(resume_folder, resume, about)
    with not_training(model), progress_bar("integrating", effort.nodes * len(prover.share), progress) as bar:
        given = statistics_for(prover, linears, entries) if statistics is None else statistics
        moved = towards(linears, homes_of(linears), entries, given)
        with WeightPath(model, moved) as path:
            keeping = functools.partial(snapshots.of, label.replace(" ", "-"))
            methods = "+".join(sorted({entry.method for entry in entries.values()}))
            integral, proof = prover.prove(path, label, methods, bar.advance, keeping)
    snapshots.discard()
    chosen = {name: Option(e.bits, e.group_size, e.outlier_fraction).key for name, e in entries.items()}
    return replace(sensitivity, plans=(*sensitivity.plans, AtPlan(proof, chosen, dict(integral.signed))))
