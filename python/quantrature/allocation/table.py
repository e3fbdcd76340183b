"""Cost tables of MXQ, SensiBoost and KurtBoost: configurations, their nominal memory, and scores of each matrix.

The nominal memory is defined as in the papers (arXiv 2503.06518, section 3): codes of ``bits``, a scale and a zero
point of ``meta_bits`` per group, and two float16 numbers per ``meta_group`` scales.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .._C import InvalidArgumentError

Floats = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Configuration:
    """A published setting: bits and group size of weights, and of their scales and zero points.

    If ``meta_group`` is 0, scales and zero points are not quantized.
    """

    bits: int
    group_size: int
    meta_bits: int = 8
    meta_group: int = 128

    @property
    def nominal_bits(self) -> float:
        """Bits per weight as the papers count them."""
        second = 32 / (self.group_size * self.meta_group) if self.meta_group else 0.0
        return self.bits + 2 * self.meta_bits / self.group_size + second

    @property
    def label(self) -> float:
        """The nominal bits, rounded to two decimals, with which the papers name a budget."""
        return round(self.nominal_bits, 2)

    @property
    def hqq_bits(self) -> float:
        """Bits per weight as the hqq package stores them on axis 0, where ten 3-bit codes take four bytes."""
        packed = 32 * math.ceil(self.group_size / 10) / self.group_size if self.bits == 3 else self.bits
        return self.nominal_bits - self.bits + packed


CONFIGURATIONS = tuple(Configuration(b, g) for b, g in itertools.product((2, 3, 4, 8), (32, 64, 128)))
"""The twelve configurations of the papers."""


def ladder(configurations: Iterable[Configuration]) -> list[Configuration]:
    """Sort configurations by nominal memory; a boost moves up in this list."""
    return sorted(set(configurations), key=lambda c: (c.nominal_bits, c))


@dataclass(frozen=True)
class CostTable:
    """Sizes and scores of all matrices of a model.

    Attributes:
        matrices: pairs of layer and module, one per row of the arrays.
        configurations: the configurations, one per column of ``fnorm`` and ``memory``.
        params: number of weights of each matrix, (matrices,).
        memory: MiB of each matrix in each configuration, (matrices, configurations).
        fnorm: Frobenius norm of w~ - w, (matrices, configurations); NaN if unknown.
        kurtosis, sensitivity: scores of each matrix, (matrices,); NaN if unknown.
    """

    matrices: tuple[tuple[int, str], ...]
    configurations: tuple[Configuration, ...]
    params: Floats
    memory: Floats
    fnorm: Floats
    kurtosis: Floats
    sensitivity: Floats

    def of_modules(self, scores: Floats) -> dict[str, list[tuple[int, int, float]]]:
        """Return module to triples (layer, index of the matrix, score), sorted by layer."""
        found: dict[str, list[tuple[int, int, float]]] = {}
        for i, (layer, module) in enumerate(self.matrices):
            found.setdefault(module, []).append((layer, i, float(scores[i])))
        return {module: sorted(triples) for module, triples in found.items()}


COLUMNS = ("layer", "module", "nbit1", "gsize1", "nbit2", "gsize2", "params")
SCORES = ("fnorm", "memmb", "kurtosis", "sensitivity")


def read_table(path: str | os.PathLike[str]) -> CostTable:
    """Read a cost table (CSV) as the authors publish them, with one row per matrix and configuration.

    Required columns: ``layer module nbit1 gsize1 nbit2 gsize2 params``. Optional columns: ``fnorm memmb kurtosis
    sensitivity``. Without ``memmb``, the nominal memory is used. Other columns are ignored.

    Raises:
        InvalidArgumentError: for a table that cannot be read; the message names file and line, column or matrix.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgumentError(f"[read_table] cannot read {path}: {why}") from None
    for column in COLUMNS:
        if column not in header:
            raise InvalidArgumentError(f"[read_table] {path} must have the column {column}: got {', '.join(header)}")
    if not rows:
        raise InvalidArgumentError(f"[read_table] {path} must have rows: got none")
    scores = [column for column in SCORES if column in header]
    cells: dict[tuple[int, str], dict[Configuration, dict[str, float]]] = {}
    for line, row in rows:
        try:
            whole = {column: int(row[column]) for column in COLUMNS if column != "module"}
            values = {column: float(row[column]) for column in scores}
        except (TypeError, ValueError):
            raise InvalidArgumentError(f"[read_table] {path}, line {line}: a number is missing or invalid") from None
        configuration = Configuration(*(whole[c] for c in ("nbit1", "gsize1", "nbit2", "gsize2")))
        if min(whole["params"], *(whole[c] for c in ("nbit1", "gsize1", "nbit2", "gsize2"))) < 1 or not all(
            math.isfinite(value) for value in values.values()
        ):
            raise InvalidArgumentError(f"[read_table] {path}, line {line}: a number is out of range")
        of_matrix = cells.setdefault((whole["layer"], row["module"]), {})
        if configuration in of_matrix:
            raise InvalidArgumentError(f"[read_table] {path}, line {line} repeats a matrix and its setting")
        of_matrix[configuration] = {"params": whole["params"], **values}
    matrices = tuple(sorted(cells))
    configurations = tuple(sorted({c for of_matrix in cells.values() for c in of_matrix}))
    for (layer, module), of_matrix in cells.items():
        if len(of_matrix) < len(configurations):
            raise InvalidArgumentError(
                f"[read_table] {path} must have every matrix in all {len(configurations)} settings: "
                f"got {len(of_matrix)} for {module} of layer {layer}"
            )

    def values_of(name: str) -> Floats:
        return np.array([[cells[m][c].get(name, math.nan) for c in configurations] for m in matrices], np.float64)

    params = values_of("params")[:, 0]
    memory = values_of("memmb") if "memmb" in scores else nominal_memory(params, configurations)
    kurtosis, sensitivity = values_of("kurtosis")[:, 0], values_of("sensitivity")[:, 0]
    return CostTable(matrices, configurations, params, memory, values_of("fnorm"), kurtosis, sensitivity)


def nominal_memory(params: Floats, configurations: Sequence[Configuration]) -> Floats:
    """Return the MiB of each matrix in each configuration as the papers count them, (matrices, configurations)."""
    nominal = np.array([c.nominal_bits for c in configurations], np.float64)
    return np.outer(params, nominal) / 8 / 2**20
