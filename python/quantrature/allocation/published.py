"""MXQ (Zhang et al., ICAART 2025), SensiBoost and KurtBoost (arXiv 2503.06518), as their authors run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from .._C import InvalidArgumentError
from .boosts import Rule
from .table import Configuration, CostTable, Floats, ladder

UNITS = 2**30
"""Whole numbers in a MiB, for the knapsack: 1024 in a byte."""


@dataclass(frozen=True)
class TableChoice:
    """A configuration for each matrix of a table.

    Attributes:
        chosen: one for each of ``table.matrices``.
        objective: sum of the Frobenius norms; NaN where the table has none.
        memory_mib: of the choice, as the table counts.
        budget_mib: avg_bits for each weight.
        bits_per_weight: of the choice.
        gap: how far the objective may be from the least, relative to it; ``None`` without an optimisation.
        flagged: module to the layers that a boost flagged, the most conspicuous first; empty without a boost.
    """

    chosen: tuple[Configuration, ...]
    objective: float
    memory_mib: float
    budget_mib: float
    bits_per_weight: float
    gap: float | None
    flagged: dict[str, list[int]]

    @classmethod
    def of(
        cls,
        table: CostTable,
        chosen: Sequence[Configuration],
        avg_bits: float,
        gap: float | None = None,
        flagged: dict[str, list[int]] | None = None,
    ) -> TableChoice:
        """With sums over the table."""
        columns = [table.configurations.index(c) for c in chosen]
        rows = np.arange(len(columns))
        memory = float(table.memory[rows, columns].sum())
        weights = float(table.params.sum())
        return cls(
            tuple(chosen),
            float(table.fnorm[rows, columns].sum()),
            memory,
            avg_bits * weights / 8 / 2**20,
            memory * 8 * 2**20 / weights,
            gap,
            flagged or {},
        )

    def to_json(self, table: CostTable) -> dict[str, Any]:
        """What the verb plan prints for a table."""
        weights = float(table.params.sum())
        hqq = sum(n * c.hqq_bits for n, c in zip(table.params, self.chosen, strict=True)) / weights
        return {
            "objective": self.objective,
            "memory_mib": self.memory_mib,
            "budget_mib": self.budget_mib,
            "bits_per_weight": self.bits_per_weight,
            "hqq_stored_bits_per_weight": float(hqq),
            "gap": self.gap,
            "flagged": self.flagged,
            "allocation": [
                {"layer": layer, "module": module, "bits": c.bits, "group_size": c.group_size}
                for (layer, module), c in zip(table.matrices, self.chosen, strict=True)
            ],
        }


def mxq(table: CostTable, avg_bits: float) -> TableChoice:
    """One configuration for each matrix, the least sum of Frobenius norms (not squared) within the budget.

    Raises:
        InvalidArgumentError: for a table without norms, and naming the least budget that can be met.
    """
    _demand(table, table.fnorm, "fnorm", "mxq")
    weights = float(table.params.sum())
    budget = avg_bits * weights / 8 / 2**20
    least = float(table.memory.min(1).sum())
    if not least <= budget:
        raise InvalidArgumentError(
            f"[mxq] avg_bits must be at least {np.ceil(least * 8 * 2**20 / weights * 1e4) / 1e4:.4f} for these "
            f"matrices and settings: got avg_bits={avg_bits}"
        )
    sizes = np.rint(table.memory * UNITS).astype(np.int64)
    room = max(round(budget * UNITS), int(sizes.min(1).sum()))
    found = ops.multiple_choice_knapsack(table.fnorm.tolist(), sizes.tolist(), room, relative_gap=1e-6)
    return TableChoice.of(table, [table.configurations[k] for k in found.chosen], avg_bits, found.gap)


def boost(table: CostTable, strategy: str, avg_bits: float, stops: int = 2, top_m: int = 0) -> TableChoice:
    """A base configuration for all matrices, and one that is some stops larger for those of conspicuous layers.

    The base is the largest whose label is within avg_bits; what a boost adds comes on top of it, and is taken from no
    other matrix.

    Args:
        table: with sensitivities for ``sensiboost``, with kurtosis for ``kurtboost``.
        strategy: one of the two.
        avg_bits: of the base.
        stops: how far up the ladder of configurations; clipped at its end.
        top_m: boost no more than so many layers of each module, the most conspicuous; 0 for all.

    Raises:
        InvalidArgumentError: naming the argument, or the score that the table lacks.
    """
    name = {"sensiboost": "sensitivity", "kurtboost": "kurtosis"}[strategy]
    scores = table.sensitivity if strategy == "sensiboost" else table.kurtosis
    _demand(table, scores, name, strategy)
    rule = Rule(strategy, stops, top_m, "boost")
    steps = ladder(table.configurations)
    base, boosted = (steps[k] for k in rule.steps([c.label for c in steps], avg_bits))
    chosen = [base] * len(table.matrices)
    flagged = {}
    for module, triples in table.of_modules(scores).items():
        found = [triples[position] for position in rule.flagged([score for _, _, score in triples])]
        for _, i, _ in found:
            chosen[i] = boosted
        if found:
            flagged[module] = [layer for layer, _, _ in found]
    return TableChoice.of(table, chosen, avg_bits, flagged=flagged)


def _demand(table: CostTable, scores: Floats, name: str, strategy: str) -> None:
    """Refuse a table that lacks the scores of a strategy."""
    missing = np.isnan(scores.reshape(len(table.matrices), -1)).any(1)
    if missing.any():
        layer, module = table.matrices[int(np.argmax(missing))]
        raise InvalidArgumentError(
            f"[{'mxq' if strategy == 'mxq' else 'boost'}] strategy {strategy} needs the column {name}: got none for "
            f"{module} of layer {layer}"
        )
    if strategy == "sensiboost" and (scores <= 0).any():
        layer, module = table.matrices[int(np.argmax(scores <= 0))]
        raise InvalidArgumentError(
            f"[boost] every sensitivity must be above 0, for ratios are taken: got {scores.min()} "
            f"for {module} of layer {layer}"
        )
