"""How a model is to be quantized: what the user asks for, and the plan that follows for a given model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..methods import METHODS, SOLVERS, solver_of
from ..models import Linears, Skipped, find_linears
from ..nn import quantized_layers
from ..nn.experts import can_split
from ..plan import Plan, PlanEntry

_log = logging.getLogger(__name__)

OF_ENTRIES = ("group_size", "method", "sym", "meta_bits", "outlier_fraction")
"""Arguments that a plan sets for each of its entries."""


@dataclass(frozen=True)
class Request:
    """How to quantize a model: one setting for all matrices, or a plan.

    Attributes:
        bits, group_size, method, sym, meta_bits, outlier_fraction, embedding_bits, plan, ignore, options: as in
            :func:`quantrature.quantize`, with the same defaults.
    """

    bits: int | None = None
    group_size: int = 64
    method: str = "rtn"
    sym: bool = False
    meta_bits: int | None = None
    outlier_fraction: float = 0.0
    embedding_bits: int | None = None
    plan: Plan | None = None
    ignore: str | Iterable[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, caller: str) -> None:
        """Raise an InvalidArgumentError for arguments that do not go together, or an unknown method."""
        if (self.bits is None) == (self.plan is None):
            raise InvalidArgumentError(f"[{caller}] give either bits or plan, not both")
        if self.plan is None:
            solver_of(self.method)
            return
        for name, default in ((f.name, f.default) for f in fields(self) if f.name in OF_ENTRIES):
            if (given := getattr(self, name)) != default:
                raise InvalidArgumentError(
                    f"[{caller}] {name} cannot be combined with a plan: set it in the plan's entries: got "
                    f"{name}={given!r}"
                )
        if self.ignore:
            raise InvalidArgumentError(
                f"[{caller}] ignore cannot be combined with a plan: remove the entries from the plan instead"
            )
        if self.options:
            name = next(iter(self.options))
            raise InvalidArgumentError(
                f"[{caller}] {name} cannot be combined with a plan: set it in the options of its entries"
            )

    def entry(self, caller: str) -> PlanEntry:
        """Return the setting for the matrices in the model's blocks, for a request without a plan."""
        assert self.bits is not None
        of_method = METHODS[self.method].group_size
        try:
            return PlanEntry(
                self.bits,
                self.group_size if of_method is None else of_method,
                self.sym,
                solver_of(self.method),
                self.meta_bits,
                self.outlier_fraction,
                options=self.options,
            )
        except InvalidArgumentError as e:
            raise InvalidArgumentError(f"[{caller}] {e}") from None


def plan_for(
    model: torch.nn.Module, request: Request, *, experts: bool = True, caller: str = "quantize"
) -> tuple[Linears, Plan]:
    """Check a request, find the matrices of a model, and return the plan for them.

    The values of the weights are read only if a method distributes outliers over the matrices; otherwise the model may
    be on the meta device. On the meta device, each matrix gets the same fraction of outliers.

    Args:
        model: causal language model from transformers, not quantized.
        request: how to quantize it.
        experts: whether to include fused experts, and embeddings if the plan or ``embedding_bits`` asks for them.
        caller: name of the public function that was called, for messages.

    Returns:
        The quantizable matrices, and the plan: that of the request, or one entry for each matrix to quantize.

    Raises:
        InvalidArgumentError: for an invalid argument or plan entry; the message names it.
    """
    if quantized_layers(model):
        raise InvalidArgumentError(f"[{caller}] model must not be quantized already")
    request.check(caller)
    plan, embedding_bits = request.plan, request.embedding_bits
    if embedding_bits is not None and (plan is not None or not experts):
        raise InvalidArgumentError(f"[{caller}] embedding_bits cannot be combined with a plan or ReQuant: remove it")
    embeddings = experts and (plan is not None or embedding_bits is not None)
    linears = _that_can_run(find_linears(model, request.ignore, experts=experts, embeddings=embeddings))
    if plan is not None:
        _check_plan(plan, linears, caller)
        return linears, plan
    entry = request.entry(caller)
    inside = [linear for linear in linears if linear.in_block]
    made = Plan.uniform((linear.name for linear in inside), entry)
    spread = METHODS[request.method].spread
    if spread is not None and request.outlier_fraction and not any(linear.parameter.is_meta for linear in inside):
        fractions = spread({linear.name: linear.weight for linear in inside}, request.outlier_fraction)
        for name, fraction in fractions.items():
            made = made.replace(name, outlier_fraction=fraction)
    if embedding_bits is not None:
        made = _with_embeddings(made, linears, entry, embedding_bits, caller)
    return linears, made


def _check_plan(plan: Plan, linears: Linears, caller: str) -> None:
    """Refuse entries for matrices that are unknown, cannot be quantized, or not in the way that the entry says."""
    reasons = {skipped.name: skipped.reason for skipped in linears.skipped}
    quantized = [(name, entry) for name, entry in plan if not entry.keeps]
    for name, _ in quantized:
        if name in reasons:
            raise InvalidArgumentError(f"[{caller}] plan entry {name!r} cannot be quantized: {reasons[name]}")
    plan.check_modules(linear.name for linear in linears)
    for name, entry in quantized:
        if not linears.find(name).in_block and (entry.outlier_fraction or SOLVERS[entry.solver].needs):
            raise InvalidArgumentError(
                f"[{caller}] {name}: an embedding cannot have outliers or a method that needs calibration"
            )


def _with_embeddings(plan: Plan, linears: Linears, of_blocks: PlanEntry, bits: int, caller: str) -> Plan:
    outside = [linear.name for linear in linears if not linear.in_block]
    if not outside:
        why = [f"{s.name} is {s.reason}" for s in linears.skipped if "embedding" in s.reason or "tied" in s.reason]
        raise InvalidArgumentError(
            f"[{caller}] embedding_bits: the model has no embedding that can be quantized: {'; '.join(why)}"
        )
    try:
        entry = PlanEntry(bits, -1 if bits == 8 else of_blocks.group_size, of_blocks.sym, meta_bits=of_blocks.meta_bits)
    except InvalidArgumentError as e:
        raise InvalidArgumentError(f"[{caller}] embedding_bits: {e}") from None
    return replace(plan, entries={**plan.entries, **dict.fromkeys(outside, entry)})


def _that_can_run(linears: Linears) -> Linears:
    """Leave out experts whose module cannot run quantized experts; warn of weights that unexpectedly stay dense."""
    reason = "fused experts of a module with a forward of its own"
    alone = [linear for linear in linears if linear.expert is not None and not can_split(linear.module)]
    left = [Skipped(linear.name, (linear.out_features, linear.in_features), reason) for linear in alone]
    kept = tuple(linear for linear in linears if linear not in alone) if alone else linears.matrices
    skipped = (*linears.skipped, *left)
    expected = ("embedding", "output embedding", "outside the blocks", "router")
    strange: dict[tuple[str, str], int] = {}
    for s in skipped:
        if s.reason not in expected and not s.reason.startswith(("tied to", "ignored by")):
            kind = re.sub(r"\b\d+\b", "*", s.name), s.reason
            strange[kind] = strange.get(kind, 0) + 1
    if strange:
        some = "; ".join(f"{count} {name} ({reason})" for (name, reason), count in list(strange.items())[:8])
        more = "; ..." if len(strange) > 8 else ""
        left_out = sum(strange.values())
        _log.warning("%d matrices can be quantized; %d weights stay unquantized: %s%s", len(kept), left_out, some, more)
    return Linears(kept, skipped, linears.stacks)
