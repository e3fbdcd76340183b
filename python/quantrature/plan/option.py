"""The settings that a matrix can have, and the size of each in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .._C import InvalidArgumentError
from ..methods import METHODS
from .plan import PlanEntry

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes for the value of an outlier, by the dtype of its matrix."""


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
        """Short form: ``b3g64`` (3 bits, group size 64); with outliers ``b3g64o0.005``."""
        return f"b{self.bits}g{self.group_size}" + (f"o{self.outlier_fraction:g}" if self.outlier_fraction else "")

    @classmethod
    def parse(cls, key: str) -> Option:
        """Parse a :attr:`key`. The default group size is 64.

        Raises:
            InvalidArgumentError: if ``key`` is not such a short form.
        """
        found = re.fullmatch(r"b?(\d+)(?:g(-1|\d+))?(?:o(0?\.\d+(?:e-\d+)?|0|1|\d+e-\d+))?", key)
        if not found:
            raise InvalidArgumentError(f"[allocate] a setting must look like b3g64 or b3g64o0.005: got {key!r}")
        bits, group_size, fraction = found.groups()
        return cls(int(bits), int(group_size or 64), float(fraction or 0))

    def entry(self, method: str = "rtn", sym: bool = False, meta_bits: int | None = None) -> PlanEntry:
        """Return the plan entry for this option.

        Raises:
            InvalidArgumentError: if ``bits``, ``group_size`` or ``outlier_fraction`` is out of range.
        """
        return PlanEntry(
            self.bits,
            self.group_size,
            sym=sym,
            method=method,
            meta_bits=meta_bits,
            outlier_fraction=self.outlier_fraction,
        )


def stored_bytes(rows: int, columns: int, entry: PlanEntry, dtype: str = "bfloat16") -> int:
    """Compute the size of a matrix, in memory and in a checkpoint, from its shape and plan entry.

    The size includes the codes, scales and zero points of all weights. Each outlier adds its value and its column
    index (two bytes up to 65,536 columns, else four); outliers also add one offset per row. A matrix that is not
    quantized keeps its size.

    Args:
        rows, columns: out_features and in_features.
        entry: how the matrix is stored.
        dtype: dtype of the original weights.

    Returns:
        Bytes.
    """
    if entry.keeps:
        return rows * columns * VALUE_BYTES[dtype]
    size = METHODS[entry.method].dense_bytes(rows, columns, entry)
    outliers = METHODS[entry.method].kept(rows * columns, entry)
    if outliers:
        column = 2 if columns <= 1 << 16 else 4
        offset = 2 if outliers < 1 << 16 else 4 if outliers < 1 << 31 else 8
        size += outliers * (VALUE_BYTES[dtype] + column) + offset * (rows + 1)
    return size
