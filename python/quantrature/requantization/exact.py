"""How many weights ReQuant keeps unquantized, and how it chooses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._C import InvalidArgumentError
from ..models import LinearWeight
from .outliers import SELECTIONS, split


def check_steps(steps: int, caller: str) -> None:
    """Raise an InvalidArgumentError if ``steps`` is less than 1."""
    if steps < 1:
        raise InvalidArgumentError(f"[{caller}] steps must be at least 1: got steps={steps}")


@dataclass(frozen=True)
class ExactWeights:
    """Arguments of :func:`quantrature.requant` that say how many weights stay unquantized, and how to choose them.

    Attributes:
        outlier_fraction: fraction of all weights, 0 to 1, that stay unquantized because of their magnitude.
        significant_fraction: fraction of all weights, 0 to 1, that stay unquantized because of their PQI.
        steps: number of rounds; each restores an equal share of the significant weights.
        selection: how to distribute the outliers over the matrices, ``temperature`` or ``greedy``.
        temperatures: temperatures to try, above 0.
        max_outlier_fraction: largest fraction of outliers in a matrix, 0 to 1.

    Raises:
        InvalidArgumentError: for an invalid argument; the message names it.
    """

    outlier_fraction: float
    significant_fraction: float
    steps: int
    selection: str
    temperatures: Sequence[float]
    max_outlier_fraction: float

    def __post_init__(self) -> None:
        """Check the arguments."""
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
                "[requant] outlier_fraction and significant_fraction must not both be 0: use quantize instead"
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
        """The arguments to store in the record."""
        return {
            "outlier_fraction": self.outlier_fraction,
            "significant_fraction": self.significant_fraction,
            "steps": self.steps,
            "selection": self.selection,
            "max_outlier_fraction": self.max_outlier_fraction,
        }

    def counts(self, linears: Sequence[LinearWeight]) -> tuple[int, int]:
        """Return the number of outliers and the number of significant weights, each summed over all matrices."""
        weights = sum(linear.numel for linear in linears)
        return round(self.outlier_fraction * weights), round(self.significant_fraction * weights)

    def check_room(self, linears: Sequence[LinearWeight]) -> None:
        """Raise an InvalidArgumentError if ``max_outlier_fraction`` does not allow ``outlier_fraction``."""
        sizes = [linear.numel for linear in linears]
        split(self.counts(linears)[0], sizes, [1.0] * len(sizes), math.inf, self.max_outlier_fraction)
