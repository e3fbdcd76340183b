"""Quantize a model in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from . import ops
from ._C import InvalidArgumentError
from .methods import quantize_matrix, solver_of
from .models import Linears, LinearWeight, check_loaded, find_linears
from .nn import QuantLinear, quantized_layers, replace_module
from .plan import Plan, PlanEntry
from .progress import progress as progress_bar
from .storage import MatrixSpec, QuantizedMatrix

_log = logging.getLogger(__name__)


def quantize(
    model: torch.nn.Module,
    *,
    bits: int | None = None,
    group_size: int = 64,
    method: str = "rtn",
    sym: bool = False,
    meta_bits: int | None = None,
    outliers: float = 0.0,
    plan: Plan | None = None,
    ignore: str | Iterable[str] = (),
    progress: bool | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Replace the linear layers of a model's blocks by quantized ones.

    Give bits for the same grid everywhere, or a plan, which says it for each matrix.

    Args:
        model: causal language model from transformers; float32, float16 or bfloat16, on any device. It is changed.
        bits: 1 to 8.
        group_size: numbers that share a scale, along the input dimension; -1 for one group per output channel.
        method: one of ``quantrature.methods.METHODS``: ``rtn``, ``mse``, ``hqq``, ...
        sym: a grid symmetric around zero, which stores no zero point.
        meta_bits: quantize scales and zeros to so many bits.
        outliers: share of the weights kept exactly, the largest in magnitude.
        plan: in place of the six arguments before; matrices it does not name stay as they are.
        ignore: matrices to leave alone, as in :func:`quantrature.models.find_linears`; not with a plan.
        progress: show a bar; ``None`` for when stderr is a terminal.
        **options: settings of the method's own, not with a plan, whose entries have them.

    Returns:
        The same model. ``save_pretrained`` writes a checkpoint that transformers loads where quantrature is imported.

    Raises:
        InvalidArgumentError: naming the argument, the plan's entry, or the matrix whose weights are not finite or of
            another dtype; the model is then as it was.
    """
    linears, plan = plan_for(
        model,
        bits=bits,
        group_size=group_size,
        method=method,
        sym=sym,
        meta_bits=meta_bits,
        outliers=outliers,
        plan=plan,
        ignore=ignore,
        options=options,
    )
    work = [(linears.find(name), entry) for name, entry in plan if not entry.keeps]
    for linear, _ in work:
        check_weight(linear)
    specs = {}
    with progress_bar("quantizing", sum(linear.numel for linear, _ in work), progress) as bar:
        for linear, entry in work:
            matrix = quantize_matrix(linear.name, linear.weight.cpu().contiguous(), entry)
            specs[linear.name] = put(model, linear, matrix)
            bar.advance(linear.numel, linear.name)
    declare(model, specs)
    return model


def plan_for(
    model: torch.nn.Module,
    *,
    bits: int | None,
    group_size: int,
    method: str,
    sym: bool,
    meta_bits: int | None,
    outliers: float,
    plan: Plan | None,
    ignore: str | Iterable[str],
    options: Mapping[str, Any] | None = None,
) -> tuple[Linears, Plan]:
    """The matrices of a model and what :func:`quantize`, whose arguments these are, would do with them.

    Only shapes are looked at: a model on the meta device will do.

    Raises:
        InvalidArgumentError: naming the argument or the plan's entry.
    """
    if quantized_layers(model):
        raise InvalidArgumentError("[quantize] model must not be quantized already")
    if (bits is None) == (plan is None):
        raise InvalidArgumentError("[quantize] either bits or plan must be given, not both")
    if plan is not None and ignore:
        raise InvalidArgumentError("[quantize] ignore does not go with a plan: take the entries out of the plan")
    if plan is not None and options:
        raise InvalidArgumentError(f"[quantize] {next(iter(options))} belongs into the options of the plan's entries")
    linears = find_linears(model, ignore, experts=False)
    experts = sum(skipped.reason == "fused experts" for skipped in linears.skipped)
    if experts:
        _log.warning("%d parameters hold fused experts, which are not quantized yet", experts)
    if plan is not None:
        plan.check_modules(linear.name for linear in linears)
        return linears, plan
    assert bits is not None
    solver = solver_of(method)
    try:
        entry = PlanEntry(bits, group_size, sym, solver, meta_bits, outliers, options=options or {})
    except InvalidArgumentError as e:
        raise InvalidArgumentError(f"[quantize] {e}") from None
    return linears, Plan.uniform((linear.name for linear in linears), entry)


def check_weight(linear: LinearWeight) -> None:
    """Refuse what the ops would refuse, before anything is replaced."""
    check_loaded("quantize", [linear])
    weight = linear.weight
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidArgumentError(
            f"[quantize] {linear.name} must be float32, float16 or bfloat16: got dtype={weight.dtype}"
        )
    if not math.isfinite(float(ops.moments(linear.parameter.detach().cpu()).mean)):
        raise InvalidArgumentError(f"[quantize] {linear.name} must hold finite numbers: it has a NaN or infinity")


def put(model: torch.nn.Module, linear: LinearWeight, matrix: QuantizedMatrix) -> MatrixSpec:
    """Give a matrix's place in the model to its quantized form; returns what config.json will say of it."""
    layer = QuantLinear.replacing(linear, MatrixSpec.of(matrix))
    layer.store(matrix, linear.parameter.device)
    for name in (linear.name, *linear.aliases):
        replace_module(model, name, layer)
    return layer.spec


def declare(model: torch.nn.Module, specs: dict[str, MatrixSpec]) -> None:
    """Tell transformers what the model has become, as if it had been loaded so."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    from .hf import QuantratureConfig, QuantratureHfQuantizer

    typed: Any = model
    config = QuantratureConfig(modules={name: spec.to_json() for name, spec in specs.items()})
    typed.config.quantization_config = config
    typed.hf_quantizer = QuantratureHfQuantizer(config, pre_quantized=True)
    typed.is_quantized = True
    typed.quantization_method = config.quant_method
