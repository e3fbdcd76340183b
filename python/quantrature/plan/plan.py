"""A plan says how to store each weight matrix of a model, and why. plan.json can be read and edited by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .._C import InvalidArgumentError
from ..files.json_files import read_json
from ..methods import SOLVERS
from .nearest import did_you_mean

FORMAT = "quantrature-plan"
FORMAT_VERSION = 2
"""Version 1 can be read, too. It had other names for ``outlier_fraction``, ``strategy`` and ``method``."""
KEEP_BITS = 16
"""The value of ``bits`` in an entry whose matrix is not quantized."""


@dataclass(frozen=True)
class PlanEntry:
    """How one matrix is stored.

    Attributes:
        bits: bits per weight, 1 to 8; 16 leaves the matrix unquantized.
        group_size: number of consecutive weights, along the input dimension, that share one scale; -1 for one scale
            per row (output channel). Default 64.
        sym: if true, quantize symmetrically around zero, without zero points. Default false.
        solver: quantization method: ``minmax`` for method rtn (round to nearest), else the name of the method.
        meta_bits: bits of quantized scales and zero points, 1 to 8; ``None`` stores them as float16.
        outlier_fraction: fraction of the weights, 0 to 1, that stay unquantized: those of the largest magnitude.
        reason: why the strategy chose this setting; free text.
        predicted_loss_change: predicted change of the loss when this matrix is quantized, in nats per token; ``None``
            if not predicted.
        options: settings of the method, such as ``damp_percent`` for gptq; the method's defaults if not given.
    """

    bits: int
    group_size: int = 64
    sym: bool = False
    solver: str = "minmax"
    meta_bits: int | None = None
    outlier_fraction: float = 0.0
    reason: str = ""
    predicted_loss_change: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check all fields; an InvalidArgumentError names the field that is wrong."""

        def demand(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidArgumentError(f"{name} must be {rule}: got {getattr(self, name)!r}")

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        demand(
            is_int(self.bits) and (1 <= self.bits <= 8 or self.bits == KEEP_BITS),
            "bits",
            "1 to 8, or 16 for unquantized",
        )
        demand(
            is_int(self.group_size) and (self.group_size == -1 or self.group_size >= 1),
            "group_size",
            "-1 or at least 1",
        )
        demand(isinstance(self.sym, bool), "sym", "true or false")
        demand(isinstance(self.solver, str) and self.solver in SOLVERS, "solver", " or ".join(SOLVERS))
        demand(
            self.meta_bits is None or (is_int(self.meta_bits) and 1 <= self.meta_bits <= 8),
            "meta_bits",
            "null or 1 to 8",
        )
        number = isinstance(self.outlier_fraction, (int, float)) and not isinstance(self.outlier_fraction, bool)
        demand(number and 0 <= self.outlier_fraction <= 1, "outlier_fraction", "a fraction between 0 and 1")
        demand(isinstance(self.reason, str), "reason", "text")
        predicted = self.predicted_loss_change
        demand(
            predicted is None or (isinstance(predicted, (int, float)) and not isinstance(predicted, bool)),
            "predicted_loss_change",
            "null or a number",
        )
        demand(isinstance(self.options, Mapping), "options", "an object")
        SOLVERS[self.solver].check_entry(self)

    @property
    def keeps(self) -> bool:
        """Whether the matrix is left unquantized."""
        return self.bits == KEEP_BITS

    @property
    def setting(self) -> str:
        """Bits and group size in short form: ``b3g64``."""
        return f"b{self.bits}g{self.group_size}"

    def __str__(self) -> str:
        """Short description: ``b3g64 hqq, meta 8, outlier_fraction 0.005``, or ``kept`` if unquantized."""
        if self.keeps:
            return "kept"
        parts = [f"{self.setting} {self.solver}{' sym' if self.sym else ''}"]
        if self.meta_bits is not None:
            parts.append(f"meta {self.meta_bits}")
        if self.outlier_fraction:
            parts.append(f"outlier_fraction {self.outlier_fraction:g}")
        parts += [f"{name} {value}" for name, value in self.options.items()]
        return ", ".join(parts)


_FIELDS = {f.name for f in fields(PlanEntry)}

_ENTRY_BEFORE = {"outliers": "outlier_fraction"}
_ALLOCATION_BEFORE = {"method": "strategy", "host": "method"}
"""Names in format version 1 to current names: of the fields of an entry, and of the allocation."""


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the same values in the same order, with old names replaced by current ones."""
    return {names.get(name, name): value for name, value in given.items()}


def _as_json(entry: PlanEntry) -> dict[str, Any]:
    """Return the fields of an entry as JSON, without ``options`` if it is empty."""
    found = asdict(entry)
    if not found["options"]:
        del found["options"]
    return found


@dataclass(frozen=True)
class Plan:
    """How to store each matrix of a model.

    Attributes:
        entries: module name to :class:`PlanEntry`, in model order.
        allocation: how the plan was made: strategy, method, budget, sizes, predicted loss change, validation. This is
            free-form JSON.
    """

    entries: Mapping[str, PlanEntry]
    allocation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def uniform(cls, names: Iterable[str], entry: PlanEntry) -> Plan:
        """Make a plan with the same entry for every name."""
        return cls({name: entry for name in names}, {"strategy": "uniform"})

    def __iter__(self) -> Iterator[tuple[str, PlanEntry]]:
        """Iterate over pairs of module name and entry."""
        return iter(self.entries.items())

    def __len__(self) -> int:
        """Number of matrices in the plan."""
        return len(self.entries)

    @property
    def predicted_loss_change(self) -> float | None:
        """Sum of the predictions of all entries, in nats per token; ``None`` if any entry has no prediction."""
        predictions = [entry.predicted_loss_change for entry in self.entries.values()]
        return None if None in predictions else float(sum(p for p in predictions if p is not None))

    def replace(self, name: str, **changes: Any) -> Plan:
        """Return a copy of the plan with some fields of one entry changed."""
        return replace(self, entries={**self.entries, name: replace(self.entries[name], **changes)})

    def diff(self, other: Plan) -> dict[str, tuple[PlanEntry | None, PlanEntry | None]]:
        """Return the entries that the other plan stores differently. Reasons and predictions are not compared.

        Returns:
            Module name to its entries in this and in the other plan, in the order of this plan. An entry is ``None``
            if the plan does not have the module.
        """

        def stored(entry: PlanEntry | None) -> PlanEntry | None:
            return entry and replace(entry, reason="", predicted_loss_change=None)

        names = dict.fromkeys([*self.entries, *other.entries])
        pairs = {name: (self.entries.get(name), other.entries.get(name)) for name in names}
        return {name: (ours, theirs) for name, (ours, theirs) in pairs.items() if stored(ours) != stored(theirs)}

    def check_modules(self, names: Iterable[str]) -> None:
        """Check that every entry names a quantizable matrix of a model.

        Args:
            names: the quantizable matrices of the model.

        Raises:
            InvalidArgumentError: for any other entry; the message names it and the most similar matrix.
        """
        known = list(names)
        for name in self.entries:
            if name not in known:
                raise InvalidArgumentError(
                    f"[plan] entry {name!r} is no quantizable matrix of this model{did_you_mean(name, known)}"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the content of plan.json."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "allocation": dict(self.allocation),
            "entries": {name: _as_json(entry) for name, entry in self.entries.items()},
        }

    @classmethod
    def from_json(cls, data: Any, origin: str = "plan") -> Plan:
        """Read a plan from the content of plan.json.

        Args:
            data: what :meth:`to_json` returned; it may have been edited.
            origin: name of the source, for error messages.

        Raises:
            InvalidArgumentError: for content that is not a valid plan; the message names origin, entry and field.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidArgumentError(f'[plan] {origin} is no plan: expected an object with "format": "{FORMAT}"')
        version = data.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise InvalidArgumentError(
                f"[plan] {origin} has format_version {version!r}; this version reads 1 and {FORMAT_VERSION}"
            )
        if not isinstance(data.get("entries"), dict) or not data["entries"]:
            raise InvalidArgumentError(f'[plan] {origin} must have "entries": an object with at least one module')
        entries = {}
        for name, given in data["entries"].items():
            where = f"[plan] {origin}, entry {name!r}: "
            if not isinstance(given, dict):
                raise InvalidArgumentError(f"{where}must be an object, got {given!r}")
            if version == 1:
                given = _renamed(given, _ENTRY_BEFORE)
            unknown = sorted(set(given) - _FIELDS)
            if unknown and unknown[0] in _ENTRY_BEFORE:
                raise InvalidArgumentError(
                    f"{where}{unknown[0]} was renamed to {_ENTRY_BEFORE[unknown[0]]} in format version 2"
                )
            if unknown:
                raise InvalidArgumentError(f"{where}unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}")
            if "bits" not in given:
                raise InvalidArgumentError(f"{where}bits is missing")
            try:
                entries[name] = PlanEntry(**given)
            except InvalidArgumentError as e:
                raise InvalidArgumentError(f"{where}{e}") from None
        allocation = data.get("allocation", {})
        if not isinstance(allocation, dict):
            raise InvalidArgumentError(f'[plan] {origin}: "allocation" must be an object, got {allocation!r}')
        return cls(entries, _renamed(allocation, _ALLOCATION_BEFORE) if version == 1 else allocation)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an existing file is replaced atomically."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check a plan.json.

        Raises:
            InvalidArgumentError: if the file cannot be read or is not a valid plan; the message names the file, and
                the line, or the entry and field.
        """
        return cls.from_json(read_json(path, "plan"), str(path))
