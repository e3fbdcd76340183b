"""The ways in which a matrix could be stored, and what each takes in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .._C import InvalidArgumentError
from ..methods import SOLVERS
from .plan import PlanEntry

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of a weight that is kept exactly, by the dtype of its matrix."""


@dataclass(frozen=True, order=True)
class Option:
    """Bits, group size and fraction of outliers: what a strategy chooses for a matrix.

    Attributes:
        bits, group_size, outlier_fraction: as in :class:`quantrature.plan.PlanEntry`.
    """

    bits: int
    group_size: int = 64
    outlier_fraction: float = 0.0

    @property
    def key(self) -> str:
        """In short: ``b3g64``, with outliers ``b3g64o0.005``."""
        return f"b{self.bits}g{self.group_size}" + (f"o{self.outlier_fraction:g}" if self.outlier_fraction else "")

    @classmethod
    def parse(cls, key: str) -> Option:
        """The reverse of :attr:`key`; without a group size it is 64.

        Raises:
            InvalidArgumentError: for anything else.
        """
        found = re.fullmatch(r"b?(\d+)(?:g(-1|\d+))?(?:o(0?\.\d+(?:e-\d+)?|0|1|\d+e-\d+))?", key)
        if not found:
            raise InvalidArgumentError(f"[allocate] a setting reads like b3g64 or b3g64o0.005: got {key!r}")
        bits, group_size, fraction = found.groups()
        return cls(int(bits), int(group_size or 64), float(fraction or 0))

    def entry(self, solver: str = "minmax", sym: bool = False, meta_bits: int | None = None) -> PlanEntry:
        """The plan entry of this option.

        Raises:
            InvalidArgumentError: when bits, group size or outlier_fraction are out of range.
        """
        return PlanEntry(
            self.bits,
            self.group_size,
            sym=sym,
            solver=solver,
            meta_bits=meta_bits,
            outlier_fraction=self.outlier_fraction,
        )


def stored_bytes(rows: int, columns: int, entry: PlanEntry, dtype: str = "bfloat16") -> int:
    """Bytes that a matrix takes in memory and in a checkpoint, as far as its shape tells.

    What its method stores of all weights, such as codes, scales and zeros, and of each weight that it keeps exactly
    its value, its column (two bytes up to 65,536 columns, else four) and for each row an offset. A matrix that is kept
    takes what it takes now.

    Args:
        rows, columns: out_features and in_features.
        entry: how the matrix is stored.
        dtype: of the weights before.
    """
    if entry.keeps:
        return rows * columns * VALUE_BYTES[dtype]
    size = SOLVERS[entry.solver].dense_bytes(rows, columns, entry)
    outliers = SOLVERS[entry.solver].kept(rows * columns, entry)
    if outliers:
        column = 2 if columns <= 1 << 16 else 4
        offset = 2 if outliers < 1 << 16 else 4 if outliers < 1 << 31 else 8
        size += outliers * (VALUE_BYTES[dtype] + column) + offset * (rows + 1)
    return size
