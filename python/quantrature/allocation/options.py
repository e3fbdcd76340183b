"""The ways in which a matrix could be stored, and what each takes in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .._C import InvalidArgumentError
from ..ops import row_bytes
from ..plan import PlanEntry

META_GROUP = 128
"""Scales that share a second-level scale and zero where ``meta_bits`` is set."""

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of a weight that is kept exactly, by the dtype of its matrix."""


@dataclass(frozen=True, order=True)
class Option:
    """Bits, group size and share of outliers: what an allocator chooses for a matrix.

    Attributes:
        bits, group_size, outliers: as in :class:`quantrature.plan.PlanEntry`.
    """

    bits: int
    group_size: int = 64
    outliers: float = 0.0

    @property
    def key(self) -> str:
        """In short: ``b3g64``, with outliers ``b3g64o0.005``."""
        return f"b{self.bits}g{self.group_size}" + (f"o{self.outliers:g}" if self.outliers else "")

    @classmethod
    def parse(cls, key: str) -> Option:
        """The reverse of :attr:`key`; without a group size it is 64.

        Raises:
            InvalidArgumentError: for anything else.
        """
        found = re.fullmatch(r"b?(\d+)(?:g(-1|\d+))?(?:o(0?\.\d+(?:e-\d+)?|0|1|\d+e-\d+))?", key)
        if not found:
            raise InvalidArgumentError(f"[allocate] a setting reads like b3g64 or b3g64o0.005: got {key!r}")
        bits, group_size, outliers = found.groups()
        return cls(int(bits), int(group_size or 64), float(outliers or 0))

    def entry(self, solver: str = "minmax", sym: bool = False, meta_bits: int | None = None) -> PlanEntry:
        """The plan entry of this option.

        Raises:
            InvalidArgumentError: when bits, group size or outliers are out of range.
        """
        return PlanEntry(
            self.bits, self.group_size, sym=sym, solver=solver, meta_bits=meta_bits, outliers=self.outliers
        )


def groups_in(columns: int, group_size: int) -> int:
    """Groups in one row, a last partial one included."""
    return 1 if group_size == -1 else -(-columns // group_size)


def stored_bytes(rows: int, columns: int, entry: PlanEntry, dtype: str = "bfloat16") -> int:
    """Bytes that a matrix takes in memory and in a checkpoint, as far as its shape tells.

    Codes, scales and zeros, and of each outlier its value, its column (two bytes up to 65,536 columns, else four) and
    for each row an offset. A matrix that is kept takes what it takes now. Scales and zeros are float16, unless some are
    out of its range, which only the weights tell (:func:`quantrature.ops.quantize`). Quantized once more they have
    float16 scales and zeros in turn, but for the scales of scales, which are mostly too small for it and counted as
    float32.

    Args:
        rows, columns: out_features and in_features.
        entry: how the matrix is stored.
        dtype: of the weights before.
    """
    if entry.keeps:
        return rows * columns * VALUE_BYTES[dtype]
    parameters = rows * groups_in(columns, entry.group_size)
    size = rows * row_bytes(columns, entry.bits)
    if entry.meta_bits is None:
        size += 2 * parameters * (1 if entry.sym else 2)
    else:
        inner, pairs = row_bytes(parameters, entry.meta_bits), groups_in(parameters, META_GROUP)
        size += inner + 8 * pairs + (0 if entry.sym else inner + 4 * pairs)
    if entry.outliers > 0:
        outliers = round(entry.outliers * rows * columns)
        column = 2 if columns <= 1 << 16 else 4
        offset = 2 if outliers < 1 << 16 else 4 if outliers < 1 << 31 else 8
        size += outliers * (VALUE_BYTES[dtype] + column) + offset * (rows + 1)
    return size
