"""The size budget of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._C import InvalidArgumentError
from .sources import Matrix


@dataclass(frozen=True)
class Budget:
    """The size budget of all matrices that are not skipped.

    Attributes:
        limit: bytes.
        weights: number of weights in these matrices.
        asked: name and value of the argument, for messages.
    """

    limit: int
    weights: int
    asked: tuple[str, float]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], avg_bits: float | None, target_bytes: int | None) -> Budget:
        """Make a budget from ``avg_bits`` or ``target_bytes``."""
        weights = sum(matrix.numel for matrix in matrices)
        if (avg_bits is None) == (target_bytes is None):
            both = f"got avg_bits={avg_bits}, target_bytes={target_bytes}"
            raise InvalidArgumentError(f"[allocate] give either avg_bits or target_bytes as the budget: {both}")
        name, value = ("avg_bits", avg_bits) if avg_bits is not None else ("target_bytes", target_bytes)
        assert value is not None
        if not math.isfinite(value) or value <= 0:
            raise InvalidArgumentError(f"[allocate] {name} must be above 0: got {name}={value}")
        limit = value * weights / 8 if name == "avg_bits" else value
        return cls(math.floor(limit + 1e-6), weights, (name, value))

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.asked[1] if self.asked[0] == "avg_bits" else 8 * self.limit / self.weights

    def demand(self, least: int) -> None:
        """Check that the smallest plan, of ``least`` bytes, fits.

        Raises:
            InvalidArgumentError: if not; the message names the smallest possible budget.
        """
        if least > self.limit:
            name, value = self.asked
            enough = f"{math.ceil(8e4 * least / self.weights) / 1e4:.4f}" if name == "avg_bits" else str(least)
            raise InvalidArgumentError(
                f"[allocate] {name} must be at least {enough} for these matrices and settings: got {name}={value}"
            )

    def report(self, used: int) -> dict[str, Any]:
        """Return the fields for plan.json."""
        return {
            "budget": {self.asked[0]: self.asked[1]},
            "budget_bytes": self.limit,
            "bytes": used,
            "slack_bytes": self.limit - used,
            "weights": self.weights,
            "bits_per_weight": 8 * used / self.weights,
        }
