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
"""Integer units per MiB for the integer program: 1024 per byte."""


@dataclass(frozen=True)
class TableChoice:
    """The configuration chosen for each matrix of a cost table.

    Attributes:
        chosen: one configuration per matrix in ``table.matrices``.
        objective: sum of the Frobenius norms; NaN if the table has none.
        memory_mib: size of the choice in MiB, as in the table.
        budget_mib: the budget in MiB, ``avg_bits`` per weight.
        bits_per_weight: of the choice.
        gap: bound on the relative distance of the objective from the optimum; ``None`` without an optimization.
        flagged: module to the boosted layers, strongest first; empty without a boost.
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
        """Make a choice and compute its sums over the table."""
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
        """Return what ``quantrature plan --table`` prints."""
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
    """Choose the configurations with the smallest sum of Frobenius norms (not squared), within a budget.

    Args:
        table: cost table with Frobenius norms.
        avg_bits: budget in bits per weight.

    Raises:
        InvalidArgumentError: for a table without norms, or a budget that is too small; the message names the smallest.
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
    """Choose one base configuration for all matrices, and a larger one for layers whose scores stand out.

    The base is the largest configuration whose label is within ``avg_bits``. The boost comes on top of it: no other
    matrix gets smaller, so the result can exceed ``avg_bits``.

    Args:
        table: cost table, with sensitivities for ``sensiboost`` or kurtosis for ``kurtboost``.
        strategy: ``sensiboost`` or ``kurtboost``.
        avg_bits: budget of the base, in bits per weight.
        stops: by how many steps the boosted configuration is larger; limited by the largest configuration.
        top_m: largest number of layers to boost in each module; 0 for all that stand out.

    Raises:
        InvalidArgumentError: for an invalid argument, or a score that the table lacks; the message names it.
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
    """Check that a table has the scores that a strategy needs."""
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
            f"[boost] every sensitivity must be above 0, because ratios are computed: got {scores.min()} "
            f"for {module} of layer {layer}"
        )
