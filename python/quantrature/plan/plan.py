"""A plan says how to store each weight matrix of a model, and why. plan.json can be read and edited by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, InstanceOf

from .._C import InvalidArgumentError
from ..files.json_files import read_json
from ..files.schema import (
    Bits,
    Boolean,
    FiniteNumber,
    GroupSize,
    Integer,
    Must,
    Number,
    OneOf,
    Text,
    one_line_errors,
    read,
)
from ..methods import METHODS
from ..ops._grid import SCALE_DTYPES, ZEROS, NumberFormat
from .nearest import did_you_mean

FORMAT = "quantrature-plan"
FORMAT_VERSION = 2
"""Version 1 can be read, too. It had other names for ``outlier_fraction``, ``strategy`` and ``method``."""
KEEP_BITS = 16
"""The value of ``bits`` in an entry whose matrix is not quantized."""


_ENTRY_BEFORE = {"outliers": "outlier_fraction", "solver": "method"}
_ALLOCATION_BEFORE = {"method": "strategy", "host": "method"}
"""Names in format version 1 to current names: of the fields of an entry, and of the allocation."""

Kept = Annotated[Integer, Field(ge=KEEP_BITS, le=KEEP_BITS)]


def _unknown(name: str) -> str:
    """Return a sentence about a field that entries do not have."""
    if name in _ENTRY_BEFORE:
        return f"{name} was renamed to {_ENTRY_BEFORE[name]} in format version 2"
    return f"unknown field {name!r}; known: {', '.join(sorted(PlanEntry.__dataclass_fields__))}"


@one_line_errors(unknown=_unknown)
@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class PlanEntry:
    """How one matrix is stored.

    Attributes:
        bits: bits per weight, 1 to 8; 16 leaves the matrix unquantized.
        group_size: number of consecutive weights, along the input dimension, that share one scale; -1 for one scale
            per row (output channel). Default 64.
        sym: if true, quantize symmetrically around zero, without zero points. Default false.
        method: quantization method, a name from ``quantrature.methods.METHODS``; ``rtn`` (round to nearest) by default.
        meta_bits: bits of quantized scales and zero points, 1 to 8; ``None`` stores them as float16 or float32.
        outlier_fraction: fraction of the weights, 0 to 1, that stay unquantized: those of the largest magnitude.
        reason: why the strategy chose this setting; free text.
        predicted_loss_change: predicted change of the loss when this matrix is quantized, in nats per token; ``None``
            if not predicted.
        options: settings of the method, such as ``damp_percent`` for gptq; the method's defaults if not given.
        zero: ``float``, or ``integer`` for zero points that are integers from 0 to ``2**bits - 1``, as most inference
            engines need them. Only for methods with evenly spaced values, and not with ``sym``.
        scale_dtype: dtype of scales and zero points: ``auto`` (float16, or float32 where that is too narrow),
            ``float16``, ``bfloat16``, ``float32``, or ``e8m0`` for powers of two. Except with ``auto``, codes are
            computed for the rounded scales.
    """

    bits: Annotated[Bits | Kept, Must("1 to 8, or 16 for unquantized")]
    group_size: GroupSize = 64
    sym: Annotated[Boolean, Must("true or false")] = False
    method: Annotated[str, OneOf(METHODS)] = "rtn"
    meta_bits: Annotated[Bits | None, Must("null or 1 to 8")] = None
    outlier_fraction: Annotated[Number, Field(ge=0, le=1), Must("a fraction between 0 and 1")] = 0.0
    reason: Annotated[Text, Must("text")] = ""
    predicted_loss_change: Annotated[FiniteNumber | None, Must("null or a finite number")] = None
    options: Annotated[InstanceOf[Mapping[str, Any]], Must("an object")] = field(default_factory=dict, hash=False)
    zero: Annotated[str, OneOf(ZEROS)] = "float"
    scale_dtype: Annotated[str, OneOf(SCALE_DTYPES)] = "auto"

    def __post_init__(self) -> None:
        """Check that the method supports the entry; an InvalidArgumentError names the field or option."""
        METHODS[self.method].check_entry(self)
        wrong = NumberFormat(self.zero, self.scale_dtype).complaint(self.sym, self.meta_bits)
        if wrong is not None:
            raise InvalidArgumentError(wrong)

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
        parts = [f"{self.setting} {self.method}{' sym' if self.sym else ''}"]
        if self.meta_bits is not None:
            parts.append(f"meta {self.meta_bits}")
        if self.outlier_fraction:
            parts.append(f"outlier_fraction {self.outlier_fraction:g}")
        if self.zero != "float":
            parts.append(f"zero {self.zero}")
        if self.scale_dtype != "auto":
            parts.append(f"scale_dtype {self.scale_dtype}")
        parts += [f"{name} {value}" for name, value in self.options.items()]
        return ", ".join(parts)


def _renamed(given: Any, names: Mapping[str, str]) -> Any:
    """Return an object with the same values in the same order, with old names replaced by current ones."""
    return {names.get(name, name): value for name, value in given.items()} if isinstance(given, dict) else given


def _entry_of_version_1(given: Any) -> Any:
    """Return an entry with current names; version 1 called the method rtn ``minmax``."""
    entry = _renamed(given, _ENTRY_BEFORE)
    return {**entry, "method": "rtn"} if isinstance(entry, dict) and entry.get("method") == "minmax" else entry


def _as_json(entry: PlanEntry) -> dict[str, Any]:
    """Return the fields of an entry as JSON, without those of few entries where they have their defaults."""
    found = asdict(entry)
    for name, default in (("options", {}), ("zero", "float"), ("scale_dtype", "auto")):
        if found[name] == default:
            del found[name]
    return found


@dataclass(frozen=True)
class PlanFile:
    """A plan: how to store each matrix of a model.

    Attributes:
        format: always ``quantrature-plan``.
        format_version: version of the format.
        entries: module name to entry; at least one.
        allocation: how the plan was made; free-form.
    """

    format: Annotated[str, OneOf([FORMAT])]
    format_version: Annotated[Integer, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    entries: Annotated[dict[Text, PlanEntry], Field(min_length=1)]
    allocation: dict[Text, Any] = field(default_factory=dict)


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
        if type(version) is not int or version not in (1, FORMAT_VERSION):
            raise InvalidArgumentError(
                f"[plan] {origin} has format_version {version!r}; this version reads 1 and {FORMAT_VERSION}"
            )
        if version == 1:
            entries = data.get("entries")
            if isinstance(entries, dict):
                entries = {name: _entry_of_version_1(entry) for name, entry in entries.items()}
            allocation = _renamed(data.get("allocation", {}), _ALLOCATION_BEFORE)
            data = {**data, "format_version": FORMAT_VERSION, "entries": entries, "allocation": allocation}
        file = read(PlanFile, data, op="plan", origin=origin, items={"entries": "entry"}, unknown=_unknown)
        return cls(file.entries, file.allocation)

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
