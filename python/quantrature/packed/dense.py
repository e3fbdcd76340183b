"""What every kind of dense stored form offers, and how its description is read from JSON."""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from .._C import InvalidArgumentError
from ..ops._arrays import FLOATS

if TYPE_CHECKING:
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix

Layout = Iterator[tuple[str, tuple[int, ...], str]]
"""Names, shapes and dtypes of stored tensors."""


class DenseForm(Protocol):
    """All weights of a matrix in few bits each, whatever the kind."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what was quantized."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def dtype(self) -> str:
        """Of what was quantized."""

    @property
    def nbytes(self) -> int:
        """Bytes as stored, everything counted that a reader needs."""

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> Any:
        """The numbers that it stands for, of all rows or of some that follow each other."""


class DenseSpec(ABC):
    """Everything about a dense stored form but its numbers. A kind is a frozen dataclass, its fields those of the JSON.

    Attributes:
        kind: the name in JSON.
        form: the class that it describes.
    """

    kind: ClassVar[str]
    form: ClassVar[type]

    shape: tuple[int, ...]
    bits: int
    dtype: str

    @classmethod
    @abstractmethod
    def of(cls, form: Any) -> Self:
        """The description of a form."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Any) -> Self:
        """Read :meth:`to_json`, from whoever wrote it.

        Raises:
            InvalidArgumentError: naming the field that is missing or impossible.
        """

    @abstractmethod
    def layout(self, name: str) -> Layout:
        """The tensors of the form; the codes are called name."""

    @abstractmethod
    def tensors(self, form: Any, name: str) -> dict[str, torch.Tensor]:
        """What :meth:`layout` names, out of a form."""

    @abstractmethod
    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> Any:
        """The reverse of :meth:`tensors`.

        Raises:
            InvalidArgumentError: when the tensors do not fit together.
        """

    @abstractmethod
    def prepared(self, matrix: QuantizedMatrix) -> PreparedMatrix:
        """Make a matrix with a dense form of this kind ready to be multiplied."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """The kind and its settings in short, for people."""

    @property
    def numel(self) -> int:
        """How many numbers were quantized."""
        return math.prod(self.shape)


def part_name(name: str, part: str) -> str:
    """What a tensor beside the codes is called; the codes of a matrix are its ``weight``."""
    return part if name == "weight" else f"{name}_{part}"


class Description:
    """The JSON object of a dense form while it is checked.

    Args:
        data: the object.
        spec: the dataclass whose fields it must have.
        what: the form in messages, such as "a grid".

    Raises:
        InvalidArgumentError: when it is no object or lacks a field.
    """

    def __init__(self, data: Any, spec: Any, what: str) -> None:
        if not isinstance(data, Mapping):
            raise InvalidArgumentError(f"[checkpoint] {what} must be an object: got {reprlib.repr(data)}")
        self.what, self.values = what, {}
        for f in fields(spec):
            if f.name not in data:
                raise InvalidArgumentError(f"[checkpoint] {what} must have the field {f.name!r}")
            self.values[f.name] = data[f.name]

    def demand(self, ok: bool, name: str, rule: str) -> None:
        """Refuse a field that breaks a rule."""
        if not ok:
            raise InvalidArgumentError(
                f"[checkpoint] {name} of {self.what} must be {rule}: got {reprlib.repr(self.values[name])}"
            )

    def check_shape_bits_and_dtype(self) -> None:
        """Check what all kinds have; the shape becomes a tuple."""
        shape = self.values["shape"]
        sizes = isinstance(shape, (list, tuple)) and len(shape) in (1, 2) and all(map(is_natural, shape))
        self.demand(sizes, "shape", "1 or 2 sizes")
        self.values["shape"] = tuple(shape)
        self.demand(is_natural(self.values["bits"]) and self.values["bits"] <= 8, "bits", "1 to 8")
        known = isinstance(self.values["dtype"], str) and self.values["dtype"] in FLOATS
        self.demand(known, "dtype", "float32, float16 or bfloat16")


def is_natural(value: object) -> bool:
    """Whether a value out of JSON is a positive integer that can be a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**48
