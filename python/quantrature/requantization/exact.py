"""Which weights ReQuant keeps exactly: how many, and how they are chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._C import InvalidArgumentError
from ..models import LinearWeight
from .outliers import SELECTIONS, split


def check_steps(steps: int, caller: str) -> None:
    """Raise an InvalidArgumentError for less than one step."""
    if steps < 1:
        raise InvalidArgumentError(f"[{caller}] steps must be at least 1: got steps={steps}")


@dataclass(frozen=True)
class ExactWeights:
    """How many weights are kept exactly, as :func:`quantrature.requant` is told.

    Attributes:
        outlier_fraction, significant_fraction: of all weights, 0 to 1, for their magnitude and for their PQI.
        steps: integrals over which the significant weights are spread.
        selection: ``temperature`` or ``greedy``, for the outliers of each matrix.
        temperatures: to try.
        max_outlier_fraction: of a matrix, 0 to 1.

    Raises:
        InvalidArgumentError: naming the argument.
    """

    outlier_fraction: float
    significant_fraction: float
    steps: int
    selection: str
    temperatures: Sequence[float]
    max_outlier_fraction: float

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("outlier_fraction", "significant_fraction", "max_outlier_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InvalidArgumentError(f"[requant] {name} must be a fraction between 0 and 1: got {name}={value}")
        both = self.outlier_fraction + self.significant_fraction
        if both > 1:
            raise InvalidArgumentError(
                f"[requant] outlier_fraction and significant_fraction must be at most 1 together: got {both:g}"
            )
        if not both:
            raise InvalidArgumentError(
                "[requant] outlier_fraction and significant_fraction must not both be 0: quantize does without"
            )
        check_steps(self.steps, "requant")
        if self.selection not in SELECTIONS:
            raise InvalidArgumentError(
                f"[requant] selection must be one of {', '.join(SELECTIONS)}: got selection={self.selection!r}"
            )
        if not self.temperatures or not all(temperature > 0 for temperature in self.temperatures):
            raise InvalidArgumentError(
                "[requant] temperatures must be at least one number above 0: got "
                f"temperatures={list(self.temperatures)}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Return the arguments that the record contains."""
        return {
            "outlier_fraction": self.outlier_fraction,
            "significant_fraction": self.significant_fraction,
            "steps": self.steps,
            "selection": self.selection,
            "max_outlier_fraction": self.max_outlier_fraction,
        }

    def counts(self, linears: Sequence[LinearWeight]) -> tuple[int, int]:
        """Return the number of outliers and of significant weights of all these matrices together."""
        weights = sum(linear.numel for linear in linears)
        return round(self.outlier_fraction * weights), round(self.significant_fraction * weights)

    def check_room(self, linears: Sequence[LinearWeight]) -> None:
        """Raise an InvalidArgumentError if ``max_outlier_fraction`` leaves no room for all outliers."""
        sizes = [linear.numel for linear in linears]
        split(self.counts(linears)[0], sizes, [1.0] * len(sizes), math.inf, self.max_outlier_fraction)
