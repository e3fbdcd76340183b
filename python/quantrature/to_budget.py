"""Quantize a model to a size in one call: analyze it, plan, quantize, and measure on text that was held out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ._C import InvalidArgumentError
from .allocation import allocate
from .analysis import Sensitivity, analyze, integrate_plan, measure_plan
from .analysis.objective import Divergence
from .files.resume import check_resume
from .methods import METHODS, Statistics, check_method
from .models import find_linears
from .models.gradients import computing_in
from .models.running import not_training
from .plan import Option, Plan
from .quantization import collect, quantize
from .text import CalibrationText

REFERENCE_BITS = (3, 4)
FEWER_BITS = (3, 2, 4)
"""Bits at which the whole model is analyzed before the first plan, for budgets of 3 bits or more and for smaller ones.
At 2 bits many models break, and prices there say little about plans of 3 bits."""

SEQLEN = 512
"""Default number of tokens in a window, unless the context of the model is shorter."""

SMALLEST_BITS, LARGEST_BITS = 1.5, 9.0
"""Average bits per weight between which the smallest model within a divergence is searched."""


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        windows: windows of calibration text to integrate on.
        nodes: gradient evaluations per window and integral.
        rounds: how many times a plan is integrated and made again.
        statistics: windows for calibrated methods. During the analysis they are others than those of the integrals, so
            that a method is not judged on the text that it was fitted to.
        held_out: windows that nothing is chosen on, to measure the result.
    """

    windows: int
    nodes: int
    rounds: int
    statistics: int
    held_out: int = 8


EFFORTS = {"fast": Effort(4, 2, 0, 32), "default": Effort(8, 4, 1, 64), "best": Effort(16, 4, 3, 128)}
"""Values of the argument ``effort``."""


@dataclass(frozen=True)
class Measured:
    """Mean KL divergence from the original model, in nats per token.

    Attributes:
        divergence: mean over the windows.
        standard_error: its standard error, from the differences between windows.
        windows: number of windows.
    """

    divergence: float
    standard_error: float
    windows: int


@dataclass(frozen=True)
class Budgeted:
    """The result of :func:`quantize_to_budget`.

    Attributes:
        model: the quantized model.
        plan: how each matrix was quantized; ``plan.predicted_loss_change`` is the predicted divergence.
        sensitivity: the analysis behind the plan.
        held_out: divergence on windows of the text that nothing was chosen on.
    """

    model: torch.nn.Module
    plan: Plan
    sensitivity: Sensitivity
    held_out: Measured


@dataclass(frozen=True)
class _Windows:
    """Windows of the calibration text.

    Attributes:
        used: windows to choose and quantize on.
        integrals: how many of these are integrated on.
        held_out: windows to measure on.
    """

    used: torch.Tensor
    integrals: int
    held_out: torch.Tensor

    @classmethod
    def of(cls, text: CalibrationText, model: torch.nn.Module, effort: Effort) -> _Windows:
        found = replace(text, nsamples=None).windows(model, SEQLEN)
        if len(found) < 2:
            raise InvalidArgumentError(
                f"[quantize_to_budget] calibration must have at least 2 windows of {found.shape[1]} tokens, one to "
                f"choose on and one to measure on: got {len(found)}; give more text or a smaller seqlen"
            )
        chosen = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(text.seed))]
        held_out = min(effort.held_out, len(chosen) // 2)
        used = chosen[held_out : held_out + effort.windows + effort.statistics]
        return cls(used, min(effort.windows, max(1, len(used) // 2)), chosen[:held_out])

    @property
    def integrated(self) -> torch.Tensor:
        """The windows to integrate on."""
        return self.used[: self.integrals]

    @property
    def statistics(self) -> torch.Tensor:
        """Other windows, for calibrated methods during the analysis; a single window serves both."""
        return self.used[self.integrals :] if len(self.used) > 1 else self.used


def quantize_to_budget(
    model: torch.nn.Module,
    calibration: Any,
    *,
    avg_bits: float | None = None,
    target_bytes: int | None = None,
    max_divergence: float | None = None,
    effort: str = "default",
    method: str = "gptq",
    group_size: int = 128,
    sym: bool = False,
    zero: str = "float",
    scale_dtype: str = "auto",
    ignore: str | Iterable[str] = (),
    tokenizer: Any = None,
    seqlen: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    text_column: str | None = None,
    batch_size: int = 1,
    compute_dtype: torch.dtype = torch.float32,
    resume_folder: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool | None = None,
) -> Budgeted:
    """Quantize a model to a size, or to the smallest size within a divergence, with the least divergence.

    The divergence is the mean KL divergence of the quantized model's predictions from those of the original. It is
    integrated at 3 and 4 bits, for budgets below 3 bits also at 2, and a plan is made (:func:`quantrature.analyze`,
    :func:`quantrature.allocate`). Then the path to this plan is integrated and the plan is made again, so that prices
    are known near it. Of these plans and the uniform settings that fit into a budget, the one with the least measured
    divergence is taken, and measured on windows that nothing was chosen on.

    Args:
        model: causal language model from transformers, not quantized. It is changed in place.
        calibration: calibration text; any source that :func:`quantrature.text.token_windows` takes.
        avg_bits: budget in bits per weight, with scales, zero points and outliers.
        target_bytes: budget as the size of all quantized matrices, instead of ``avg_bits``.
        max_divergence: instead of a budget: the smallest model whose predicted divergence, in nats per token, is at
            most this.
        effort: ``fast``, ``default`` or ``best``: how much is tried (:data:`EFFORTS`).
        method, sym, zero, scale_dtype, ignore: as in :func:`quantrature.quantize`.
        group_size: middle one of the three group sizes to choose from: half, the same and twice as many weights.
        tokenizer, seqlen, seed, bos, text_column: how to cut the text, as in ``token_windows``. The default of
            ``seqlen`` is 512, or the context length if shorter. ``seed`` also draws the windows.
        batch_size: windows per forward pass.
        compute_dtype: dtype in which the model runs during the analysis.
        resume_folder: folder for the state of an interrupted run; its files are removed at the end.
        resume, progress: as in :func:`quantrature.analyze`.

    Returns:
        The quantized model, its plan, the analysis, and the divergence on windows that were held out.

    Raises:
        InvalidArgumentError: for an invalid argument, a budget that no plan fits, a divergence that no plan reaches, or
            a text of fewer than two windows; the message names it.
    """
    wish = _wish(avg_bits=avg_bits, target_bytes=target_bytes, max_divergence=max_divergence)
    if effort not in EFFORTS:
        raise InvalidArgumentError(f"[quantize_to_budget] effort must be one of {', '.join(EFFORTS)}: got {effort!r}")
    check_method(method)
    check_resume("quantize_to_budget", resume, resume_folder)
    steps = EFFORTS[effort]
    sizes = _group_sizes(method, group_size)
    text = CalibrationText(calibration, tokenizer, None, seqlen, seed, bos, text_column)
    windows = _Windows.of(text, model, steps)
    state: dict[str, Any] = {"resume_folder": resume_folder, "resume": resume, "progress": progress}
    with not_training(model):
        original = Divergence(model, windows.held_out, batch_size)
    with computing_in(model, compute_dtype):
        how = {"statistics": _statistics(model, method, ignore, windows, batch_size), **state}
        found = analyze(
            model,
            windows.integrated,
            objective="kl",
            metrics=["pqi"],
            bits=_references(model, wish),
            group_size=sizes[len(sizes) // 2],
            method=method,
            sym=sym,
            zero=zero,
            scale_dtype=scale_dtype,
            ignore=ignore,
            nodes=steps.nodes,
            batch_size=batch_size,
            **how,
        )
        plan = _plan(found, sizes, wish)
        tried: list[tuple[float, Plan]] = []
        for _ in range(steps.rounds):
            found = integrate_plan(model, windows.integrated, found, plan, **how)
            tried.append((found.plans[-1].proof.measured_loss_change, plan))
            before, plan = plan, _plan(found, sizes, wish)
            if _settings(plan) == _settings(before):
                break
        else:
            measured = measure_plan(model, windows.integrated, found, plan, statistics=how["statistics"])
            tried.append((measured, plan))
        if max_divergence is None:  # else the last plan is the smallest one
            plan = min([*tried, *_uniform(found, plan)], key=lambda pair: pair[0])[1]
    folder = None if resume_folder is None else Path(resume_folder) / "blocks"
    quantize(
        model,
        plan=plan,
        calibration=windows.used if METHODS[method].needs else None,
        nsamples=None,
        batch_size=batch_size,
        resume_folder=folder,
        resume=resume,
        progress=progress,
    )
    return Budgeted(model, plan, found, _measured(model, original, windows.held_out))


def _wish(**given: float | None) -> dict[str, Any]:
    """Return the one budget that is given, by the name of its argument."""
    wish = {name: value for name, value in given.items() if value is not None}
    if len(wish) != 1:
        raise InvalidArgumentError(
            f"[quantize_to_budget] give one of {', '.join(given)}: got {', '.join(wish) or 'none'}"
        )
    return wish


def _group_sizes(method: str, group_size: int) -> list[int]:
    """Return the group sizes to choose from."""
    only = METHODS[method].group_size
    if only is not None:
        return [only]
    return [group_size] if group_size < 16 else [group_size // 2, group_size, 2 * group_size]


def _statistics(
    model: torch.nn.Module, method: str, ignore: str | Iterable[str], windows: _Windows, batch_size: int
) -> Mapping[str, Statistics]:
    """Collect the statistics that a method needs, on windows that nothing is integrated or measured on."""
    needs = METHODS[method].needs
    if not needs:
        return {}
    linears = find_linears(model, ignore, experts=False)
    wanted = {linear.name: needs for linear in linears}
    return collect(model, linears, wanted, windows.statistics, batch_size=batch_size)


def _plan(found: Sensitivity, sizes: Sequence[int], wish: Mapping[str, Any]) -> Plan:
    """Return the plan for a budget, or the smallest one within a divergence."""
    if "max_divergence" not in wish:
        return allocate(found, group_sizes=sizes, **wish)
    most = float(wish["max_divergence"])
    if not (math.isfinite(most) and most > 0):
        raise InvalidArgumentError(f"[quantize_to_budget] max_divergence must be above 0: got {most}")
    low, high = SMALLEST_BITS, LARGEST_BITS
    best = allocate(found, group_sizes=sizes, avg_bits=high)
    if _predicted(best) > most:
        raise InvalidArgumentError(
            f"[quantize_to_budget] max_divergence cannot be reached: the least predicted divergence is "
            f"{_predicted(best):.4g}: got {most:g}"
        )
    for _ in range(12):
        middle = (low + high) / 2
        try:
            tried = allocate(found, group_sizes=sizes, avg_bits=middle)
        except InvalidArgumentError:  # nothing is so small
            low = middle
            continue
        if _predicted(tried) <= most:
            best, high = tried, middle
        else:
            low = middle
    return best


def _references(model: torch.nn.Module, wish: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the bits at which the whole model is analyzed."""
    if "max_divergence" in wish:
        return REFERENCE_BITS
    weights = sum(linear.numel for linear in find_linears(model, experts=False))
    bits = wish["avg_bits"] if "avg_bits" in wish else 8 * wish["target_bytes"] / weights
    return REFERENCE_BITS if bits >= 3 else FEWER_BITS


def _uniform(found: Sensitivity, plan: Plan) -> list[tuple[float, Plan]]:
    """Return the settings of the whole model that were measured and fit into the budget of a plan."""
    size = int(plan.allocation["budget_bytes"])
    fitting = []
    for proof in found.proofs:
        option = Option.parse(proof.setting)
        try:
            alike = allocate(found, strategy="pqi", target_bytes=size, pin={m.name: option.key for m in found.matrices})
        except InvalidArgumentError:  # larger than the plan
            continue
        fitting.append((proof.measured_loss_change, alike))
    return fitting


def _predicted(plan: Plan) -> float:
    predicted = plan.predicted_loss_change
    assert predicted is not None
    return predicted


def _settings(plan: Plan) -> dict[str, str]:
    return {name: str(entry) for name, entry in plan}


def _measured(model: torch.nn.Module, original: Divergence, windows: torch.Tensor) -> Measured:
    with torch.no_grad(), not_training(model):
        tokens = windows.shape[1] - 1
        each = torch.tensor([float(original(model, windows[i : i + 1], [i])) / tokens for i in range(len(windows))])
    spread = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Measured(float(each.mean()), spread, len(each))
