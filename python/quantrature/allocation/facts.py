"""Size, error and loss change of each matrix at each setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._C import InvalidArgumentError
from ..plan.option import Option
from .loss import LossModel
from .sources import Grid, Matrix, Source, size_of

if TYPE_CHECKING:
    from ..analysis.sensitivity import AtPlan


@dataclass(frozen=True)
class Facts:
    """Size, error and predicted loss change of each matrix (by index) at each setting.

    Attributes:
        matrices: the matrices of the plan.
        grid: the settings that are the same for all matrices.
        errors, sizes: for each matrix, setting to squared error and to bytes, as far as they were measured.
        model: predicts loss changes; ``None`` without an analysis.
        origin: the source, which may have the weights.
    """

    matrices: Sequence[Matrix]
    grid: Grid
    errors: Sequence[Mapping[str, float]]
    sizes: Sequence[dict[str, int]]
    model: LossModel | None
    origin: Source

    @classmethod
    def of(
        cls, origin: Source, matrices: Sequence[Matrix], options: Sequence[Option], grid: Grid, progress: bool | None
    ) -> Facts:
        """Take the values from the analysis; measure options that it lacks if the weights are available."""
        same = grid == origin.grid
        errors = [dict(m.error) for m in matrices] if same else [{} for _ in matrices]
        sizes = [dict(m.nbytes) for m in matrices] if same else [{} for _ in matrices]
        missing = [o for o in options if any(o.key not in known for known in errors)]
        outcomes = origin.outcomes(matrices, missing, grid, progress) if missing else None
        for i, found in enumerate(outcomes or []):
            errors[i] |= {key: outcome.error for key, outcome in found.items()}
            sizes[i] |= {key: outcome.nbytes for key, outcome in found.items()}
        model = None
        if all(m.loss_change for m in matrices):
            model = LossModel(
                [m.name for m in matrices],
                [m.columns for m in matrices],
                [m.numel for m in matrices],
                [m.loss_change for m in matrices],
                errors if same else [m.error for m in matrices],
                errors if all(errors) else None,
                [at_plan(found, matrices) for found in origin.plans] if same else (),
            )
        return cls(matrices, grid, errors, sizes, model, origin)

    def size(self, i: int, option: Option) -> int:
        """Bytes."""
        return size_of(self.matrices[i], option, self.grid, self.sizes[i])

    def weigh(self, options: Sequence[Option]) -> int:
        """Return the total bytes of one option per matrix, measured if the weights are available."""
        total = 0
        for i, (matrix, option) in enumerate(zip(self.matrices, options, strict=True)):
            if option.key not in self.sizes[i]:
                seen = self.origin.outcomes([matrix], [option], self.grid, False)
                if seen is not None:
                    self.sizes[i][option.key] = seen[0][option.key].nbytes
            total += self.size(i, option)
        return total

    def norm(self, i: int, option: Option) -> float:
        """Return the Frobenius norm of the weight error.

        Raises:
            InvalidArgumentError: if it was not measured.
        """
        if option.key not in self.errors[i]:
            raise InvalidArgumentError(
                f"[allocate] strategy mxq needs the weights, or an analysis that measured them: got nothing for "
                f"{self.matrices[i].name} at {option.key}"
            )
        return math.sqrt(self.errors[i][option.key])

    def cost(self, i: int, option: Option) -> float:
        """Return the loss cost of a matrix, see :meth:`LossModel.cost`.

        Raises:
            InvalidArgumentError: if it cannot be predicted.
        """
        assert self.model is not None
        return self._known(i, option, self.model.cost(i, option))

    def expected_cost(self, i: int, option: Option) -> float:
        """Return the cost that the choice is based on, see :meth:`LossModel.expected_cost`."""
        assert self.model is not None
        return self._known(i, option, self.model.expected_cost(i, option))

    def _known(self, i: int, option: Option, cost: float | None) -> float:
        if cost is None:
            raise InvalidArgumentError(
                f"[allocate] the effect of outliers cannot be predicted without the weights: got {option.key}, "
                f"not measured for {self.matrices[i].name}"
            )
        return cost

    def nats(self, total: float) -> float:
        """Return the loss change, in nats per token, per unit of cost, in a plan with the given total cost."""
        assert self.model is not None
        power = self.model.power
        return float(power * total ** (power - 1)) if total > 0 else 1.0

    def demand_predictions(self) -> None:
        """Check that the analysis has loss changes for all matrices.

        Raises:
            InvalidArgumentError: if not; the message names the first matrix.
        """
        for matrix in self.matrices:
            if not matrix.loss_change:
                raise InvalidArgumentError(
                    f"[allocate] strategy pqi needs an analysis with the metric pqi: got none for {matrix.name}"
                )


def at_plan(found: AtPlan, matrices: Sequence[Matrix]) -> tuple[list[Option | None], list[float]]:
    """Return setting and loss change of each matrix at a plan that was integrated."""
    settings = [found.settings.get(m.name) for m in matrices]
    options = [None if key is None else Option.parse(key) for key in settings]
    return options, [found.loss_change.get(m.name, 0.0) for m in matrices]
