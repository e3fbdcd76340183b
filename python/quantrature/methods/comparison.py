"""Whether a method did better than rtn, by the error that it minimizes itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..packed import QuantizedMatrix
from .grid import RTN
from .method import Method, Statistics

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

_log = logging.getLogger(__name__)

NOISE = 1e-5
"""Relative difference of two errors that rounding may make."""
NAMED = 5
"""So many matrices that lost are named."""


@dataclass(frozen=True)
class Compared:
    """The errors of one matrix by what its method minimizes (:attr:`Method.objective`).

    Attributes:
        name: of the matrix.
        solver: its method.
        error: as quantized.
        rtn: if each weight were rounded to the nearest point of the min-max grid of the same bits and groups, with the
            same weights kept exactly.
    """

    name: str
    solver: str
    error: float
    rtn: float

    @property
    def lost(self) -> bool:
        """Whether rtn would have been better."""
        return self.error > self.rtn * (1 + NOISE)


@dataclass
class Comparison:
    """Compares matrices with rtn as they are quantized, and says in the end which ones lost.

    Left out are rtn itself and the fixed tables nf4 and fp4, which minimize nothing.

    Attributes:
        of: what was compared.
    """

    of: list[Compared] = field(default_factory=list)

    def add(
        self,
        method: Method,
        weight: torch.Tensor,
        entry: PlanEntry,
        statistics: Statistics,
        matrix: QuantizedMatrix,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Compare one matrix, which this does not change.

        Args:
            method: that quantized it.
            weight, entry, statistics: what it was given.
            matrix: what it made of them.
            scale: of columns that the weight has already, (in_features,); rtn is done without.
        """
        import torch

        if method.objective is None:
            return
        exact = weight.float()
        plain = exact if scale is None else (exact / scale).contiguous()
        kept = torch.empty(0, dtype=torch.int64) if matrix.outliers is None else matrix.outliers.positions().long()
        nearest = RTN.quantize(plain, replace(entry, solver="minmax", options={}), kept, Statistics())
        image = nearest.dequantize("float32")
        if scale is not None:
            image *= scale
        errors = [method.objective(found - exact, statistics) for found in (matrix.dequantize("float32"), image)]
        self.of.append(Compared(statistics.name, entry.solver, errors[0], errors[1]))

    def report(self) -> None:
        """Log one warning about the matrices that lost, if there are any; the worst come first."""
        lost = sorted((each for each in self.of if each.lost), key=lambda each: each.rtn / each.error)
        if lost:
            some = ", ".join(f"{x.name} ({x.solver} {x.error:.4g}, rtn {x.rtn:.4g})" for x in lost[:NAMED])
            more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
            _log.warning(
                "rtn would have been better for %d of %d matrices, by the error that their method minimizes: %s%s",
                len(lost),
                len(self.of),
                some,
                more,
            )
