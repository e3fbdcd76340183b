"""Integrate the path to a plan, where each matrix has a setting of its own, or only measure at its end."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..files.resume import check_resume
from ..methods import Statistics
from ..models import Linears, check_loaded, find_linears, fingerprint
from ..models.running import not_training
from ..plan import Plan, PlanEntry
from ..plan.option import Option
from ..progress import progress as progress_bar
from ._analyze import Snapshots, statistics_for
from .path import WeightPath, homes_of, towards
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
    job = _Job.of(model, windows, sensitivity, plan)
    about: dict[str, Any] = {
        **sensitivity.settings,
        "model": sensitivity.model,
        "calibration": sensitivity.calibration,
        "plan": {name: str(entry) for name, entry in job.entries.items()},
    }
    label = f"plan {len(sensitivity.plans) + 1}"
    snapshots = Snapshots(resume_folder, resume, about)
    passes = job.prover.effort.nodes * len(job.prover.share)
    with progress_bar("integrating", passes, progress) as bar, job.path(statistics) as path:
        keeping = functools.partial(snapshots.of, label.replace(" ", "-"))
        methods = "+".join(sorted({entry.method for entry in job.entries.values()}))
        integral, proof = job.prover.prove(path, label, methods, bar.advance, keeping)
    snapshots.discard()
    chosen = {name: Option(e.bits, e.group_size, e.outlier_fraction).key for name, e in job.entries.items()}
    return replace(sensitivity, plans=(*sensitivity.plans, AtPlan(proof, chosen, dict(integral.signed))))


def measure_plan(
    model: torch.nn.Module,
    windows: torch.Tensor,
    sensitivity: Sensitivity,
    plan: Plan,
    *,
    statistics: Mapping[str, Statistics] | None = None,
) -> float:
    """Measure the loss change of a plan, in nats per token, without an integral. The model is unchanged.

    Args:
        model, windows, sensitivity, plan, statistics: as in :func:`integrate_plan`.

    Raises:
        InvalidArgumentError: as :func:`integrate_plan`.
    """
    job = _Job.of(model, windows, sensitivity, plan)
    with job.path(statistics) as path:
        return job.prover.measure(path)


@dataclass(frozen=True)
class _Job:
    """The matrices that a plan quantizes, and what integrates and measures on the way to it."""

    linears: Linears
    entries: Mapping[str, PlanEntry]
    prover: Prover

    @classmethod
    def of(cls, model: torch.nn.Module, windows: torch.Tensor, sensitivity: Sensitivity, plan: Plan) -> _Job:
        """Check that model, text and plan belong to an analysis."""
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
        return cls(linears, {name: entry for name, entry in plan if not entry.keeps}, prover)

    @contextmanager
    def path(self, statistics: Mapping[str, Statistics] | None) -> Iterator[WeightPath]:
        """Yield the path from the original weights to those of the plan."""
        with not_training(self.prover.model):
            given = statistics_for(self.prover, self.linears, self.entries) if statistics is None else statistics
            moved = towards(self.linears, homes_of(self.linears), self.entries, given)
            with WeightPath(self.prover.model, moved) as path:
                yield path
