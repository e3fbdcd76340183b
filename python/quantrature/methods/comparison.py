"""Checks that a method did better than rtn, measured by the error that the method minimizes."""

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
"""Relative difference of two errors that floating-point rounding may cause."""
NAMED = 5
"""Number of worse matrices that the warning names."""


@dataclass(frozen=True)
class Compared:
    """The error of one matrix with its method and with rtn, both as :attr:`Method.objective` of the method.

    Attributes:
        name: name of the matrix.
        method: its method.
        error: error with its method.
        rtn: error with rtn, with the same bits, groups and unquantized weights.
    """

    name: str
    method: str
    error: float
    rtn: float

    @property
    def lost(self) -> bool:
        """Whether rtn would have been better."""
        return self.error > self.rtn * (1 + NOISE)


@dataclass
class Comparison:
    """Compares each quantized matrix with rtn, and warns in the end of those for which rtn is better.

    Methods that minimize no error are not compared: rtn itself, nf4 and fp4.

    Attributes:
        of: the comparisons so far.
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
        """Compare one matrix with rtn; none of the arguments is changed.

        Args:
            method: method that quantized the matrix.
            weight, entry, statistics: the arguments that it was given.
            matrix: the quantized matrix.
            scale: column scale (in_features,) that ``weight`` already includes; it is removed for rtn.
        """
        import torch

        if method.objective is None:
            return
        exact = weight.float()
        plain = exact if scale is None else (exact / scale).contiguous()
        kept = torch.empty(0, dtype=torch.int64) if matrix.outliers is None else matrix.outliers.positions().long()
        nearest = RTN.quantize(plain, replace(entry, method="rtn", options={}), kept, Statistics())
        image = nearest.dequantize("float32")
        if scale is not None:
            image *= scale
        errors = [method.objective(found - exact, statistics) for found in (matrix.dequantize("float32"), image)]
        self.of.append(Compared(statistics.name, entry.method, errors[0], errors[1]))

    def report(self) -> None:
        """If rtn is better for any matrix, log one warning that names the worst ones first."""
        lost = sorted((each for each in self.of if each.lost), key=lambda each: each.rtn / each.error)
        if lost:
            some = ", ".join(f"{x.name} ({x.method} {x.error:.4g}, rtn {x.rtn:.4g})" for x in lost[:NAMED])
            more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
            _log.warning(
                "rtn would have been better for %d of %d matrices, by the error that their own method minimizes: %s%s",
                len(lost),
                len(self.of),
                some,
                more,
            )
