"""Compare the predicted loss change of plans with the measured one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._C import InvalidArgumentError
from ..analysis.objective import at_start, check_objective, mean_over
from ..analysis.path import WeightPath, homes_of, towards
from ..analysis.sensitivity import Sensitivity
from ..models import find_linears
from ..models.running import not_training
from ..plan import Plan
from ..plan.fusion import fusion_groups
from ..progress import progress as progress_bar
from ..text import token_windows
from ._allocate import allocate


@dataclass(frozen=True)
class Validation:
    """Predicted and measured loss changes of several plans, in nats per token.

    Attributes:
        predicted, measured: one value per plan.
        spearman: rank correlation of predicted and measured values; NaN for fewer than two plans.
        median_relative_error: median over plans of the error of the prediction relative to the measurement.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def spearman(self) -> float:
        """Rank correlation."""
        from scipy.stats import spearmanr

        if len(self.predicted) < 2:
            return float("nan")
        return float(spearmanr(self.predicted, self.measured).statistic)

    @property
    def median_relative_error(self) -> float:
        """Median over the plans of the relative error of the prediction."""
        predicted, measured = np.array(self.predicted), np.array(self.measured)
        return float(np.median(np.abs(predicted - measured) / np.abs(measured)))

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "plans": len(self.predicted),
            "spearman": self.spearman,
            "median_relative_error": self.median_relative_error,
            "predicted": list(self.predicted),
            "measured": list(self.measured),
        }


def measured_loss_changes(
    model: torch.nn.Module,
    tokens: Any,
    plans: Sequence[Plan],
    *,
    objective: str = "nll",
    tokenizer: Any = None,
    seqlen: int | None = None,
    nsamples: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    text_column: str | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> list[float]:
    """Measure the loss change of a model for each plan, in nats per token. The model is unchanged afterwards.

    Args:
        model: causal language model from transformers.
        tokens, tokenizer, seqlen, nsamples, seed, bos, text_column: text, as in :func:`quantrature.text.token_windows`.
        plans: plans for this model.
        objective: what to measure, as in :func:`quantrature.analyze`.
        batch_size: windows per forward pass.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Raises:
        InvalidArgumentError: for a plan with a matrix that the model does not have.
    """
    check_objective(objective, "measured_loss_changes")
    linears = find_linears(model, experts=False)
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, bos=bos, text_column=text_column, model=model
    )
    for plan in plans:
        plan.check_modules(linear.name for linear in linears)
    changes: list[float] = []
    homes = homes_of(linears)
    with not_training(model), progress_bar("measuring plans", len(plans) + 1, progress) as bar:
        measured, before = at_start(objective, model, windows, batch_size)
        bar.advance()
        for plan in plans:
            moved = towards(linears, homes, {name: entry for name, entry in plan if not entry.keeps}, {})
            with WeightPath(model, moved) as path:
                path.move_to(1)
                changes.append(mean_over(measured, model, windows, batch_size) - before)
            bar.advance()
    return changes


def random_plans(
    sensitivity: Sensitivity, count: int, bits: Sequence[int] = (2, 3, 4), seed: int = 0, **wishes: Any
) -> list[Plan]:
    """Make plans with random bits for each fusion group, with predicted loss changes.

    Args:
        sensitivity: the analysis of the model.
        count: number of plans, at least 1.
        bits: bits to draw from.
        seed: random seed; draws the same plans on every platform.
        wishes: further arguments of :func:`allocate`.

    Raises:
        InvalidArgumentError: if ``count`` is below 1.
    """
    if count < 1:
        raise InvalidArgumentError(f"[random_plans] count must be at least 1: got {count}")
    names = [m.name for m in sensitivity.matrices]
    chance = random.Random(seed)
    plans = []
    for _ in range(count):
        pin: dict[str, int | str] = {}
        for members in fusion_groups(names):
            setting = f"b{chance.choice(bits)}g{sensitivity.settings['group_size']}"
            pin |= {names[i]: setting for i in members}
        plans.append(allocate(sensitivity, strategy="pqi", avg_bits=32, pin=pin, **wishes))
    return plans


def validate(
    model: torch.nn.Module,
    tokens: Any,
    sensitivity: Sensitivity,
    *,
    count: int = 20,
    bits: Sequence[int] = (2, 3, 4),
    seed: int = 0,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Validation:
    """Compare predicted and measured loss changes of :func:`random_plans`.

    Args:
        model: the model that was analyzed.
        tokens: text to measure on, as in :func:`quantrature.text.token_windows`. With the calibration text of the
            analysis, the result shows only the error of the prediction, not the difference between texts.
        sensitivity: the analysis of the model.
        count, bits, seed: as in :func:`random_plans`.
        batch_size: windows per forward pass.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.
    """
    plans = random_plans(sensitivity, count, bits, seed)
    measured = measured_loss_changes(
        model, tokens, plans, objective=sensitivity.objective, batch_size=batch_size, progress=progress
    )
    return Validation(tuple(plan.predicted_loss_change or 0.0 for plan in plans), tuple(measured))
