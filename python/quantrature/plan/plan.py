"""A plan: for every weight matrix, how it will be stored and why. Meant to be read and edited by hand."""

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
"""Version 1 is read, too: it had other names for ``outlier_fraction``, and for ``strategy`` and ``method``."""
KEEP_BITS = 16
"""The `bits` of an entry that leaves its matrix as it is."""


@dataclass(frozen=True)
class PlanEntry:
    """How one matrix is stored.

    Attributes:
        bits: 1 to 8, or 16 to leave the matrix as it is.
        group_size: numbers that share a scale, along the input dimension; -1 for one group per output channel.
        sym: a grid symmetric around zero, which stores no zero point.
        solver: how the codes are found: ``minmax`` for method rtn (round to nearest), else the name of the method.
        meta_bits: bits of quantized scales and zeros; ``None`` stores them as float16.
        outlier_fraction: fraction of the weights, 0 to 1, kept exactly beside the grid: the largest in magnitude.
        reason: why the strategy chose this; free text.
        predicted_loss_change: nats per token that this matrix is expected to cost; ``None`` when not predicted.
        options: settings of the method's own, such as ``damp_percent`` of gptq; its defaults where not given.
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
        """Refuse impossible settings, naming the field."""

        def demand(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidArgumentError(f"{name} must be {rule}: got {getattr(self, name)!r}")

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        demand(is_int(self.bits) and (1 <= self.bits <= 8 or self.bits == KEEP_BITS), "bits", "1 to 8, or 16 to keep")
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
        """Whether the matrix stays as it is."""
        return self.bits == KEEP_BITS

    @property
    def setting(self) -> str:
        """Bits and group size in short: ``b3g64``."""
        return f"b{self.bits}g{self.group_size}"

    def __str__(self) -> str:
        """How the matrix is stored, in short: ``b3g64 hqq, meta 8, outlier_fraction 0.005``, or ``kept``."""
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
"""Names in version 1 to the names of today, of an entry's fields and of what an allocation says."""


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same values, in the same order, under the names of today."""
    return {names.get(name, name): value for name, value in given.items()}


def _as_json(entry: PlanEntry) -> dict[str, Any]:
    """The fields of an entry; options where it has some."""
    found = asdict(entry)
    if not found["options"]:
        del found["options"]
    return found


@dataclass(frozen=True)
class Plan:
    """Entries by module name, in model order, and what is known about the plan as a whole.

    Attributes:
        entries: module name to :class:`PlanEntry`.
        allocation: how the plan was made: strategy, method, budget, sizes, predicted loss change, validation;
            free-form JSON.
    """

    entries: Mapping[str, PlanEntry]
    allocation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def uniform(cls, names: Iterable[str], entry: PlanEntry) -> Plan:
        """The same entry for every name."""
        return cls({name: entry for name in names}, {"strategy": "uniform"})

    def __iter__(self) -> Iterator[tuple[str, PlanEntry]]:
        """Pairs of name and entry."""
        return iter(self.entries.items())

    def __len__(self) -> int:
        """How many matrices the plan covers."""
        return len(self.entries)

    @property
    def predicted_loss_change(self) -> float | None:
        """Sum over the entries, nats per token; ``None`` when any entry has no prediction."""
        predictions = [entry.predicted_loss_change for entry in self.entries.values()]
        return None if None in predictions else float(sum(p for p in predictions if p is not None))

    def replace(self, name: str, **changes: Any) -> Plan:
        """This plan with some fields of one entry changed."""
        return replace(self, entries={**self.entries, name: replace(self.entries[name], **changes)})

    def diff(self, other: Plan) -> dict[str, tuple[PlanEntry | None, PlanEntry | None]]:
        """Entries that are stored in another way in the other plan; reasons and predictions do not count.

        Returns:
            Module name to its entry here and there, ``None`` where a plan has none, in the order of this plan.
        """

        def stored(entry: PlanEntry | None) -> PlanEntry | None:
            return entry and replace(entry, reason="", predicted_loss_change=None)

        names = dict.fromkeys([*self.entries, *other.entries])
        pairs = {name: (self.entries.get(name), other.entries.get(name)) for name in names}
        return {name: (ours, theirs) for name, (ours, theirs) in pairs.items() if stored(ours) != stored(theirs)}

    def check_modules(self, names: Iterable[str]) -> None:
        """Refuse an entry for a module that is not among names, the quantizable matrices of a model.

        Raises:
            InvalidArgumentError: naming the entry and the most similar module.
        """
        known = list(names)
        for name in self.entries:
            if name not in known:
                raise InvalidArgumentError(
                    f"[plan] entry {name!r} is no quantizable matrix of this model{did_you_mean(name, known)}"
                )

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "allocation": dict(self.allocation),
            "entries": {name: _as_json(entry) for name, entry in self.entries.items()},
        }

    @classmethod
    def from_json(cls, data: Any, origin: str = "plan") -> Plan:
        """The plan that :meth:`to_json` described, however it was edited since.

        Raises:
            InvalidArgumentError: naming origin, entry and field for anything that cannot be carried out.
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
                raise InvalidArgumentError(f"{where}{unknown[0]} is called {_ENTRY_BEFORE[unknown[0]]} since version 2")
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
        """Write plan.json; an existing file is replaced in one step."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read and check plan.json.

        Raises:
            InvalidArgumentError: naming the file, and the line or entry and field at fault.
        """
        return cls.from_json(read_json(path, "plan"), str(path))
