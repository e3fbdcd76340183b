"""Interface of all dense storage formats, and checks for their JSON descriptions.

Dense means that all weights of the matrix are stored, in a few bits each; outliers are stored in addition.
"""

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
"""Tensor name to shape and dtype."""


class DenseForm(Protocol):
    """A dense storage format with its tensors: all weights of a matrix, in a few bits each."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""

    @property
    def bits(self) -> int:
        """Bits per code."""

    @property
    def dtype(self) -> str:
        """Dtype of the original tensor."""

    @property
    def nbytes(self) -> int:
        """Stored bytes, with scales, zero points and tables."""

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> Any:
        """Dequantize all rows, or a slice of consecutive rows."""


class DenseSpec(ABC):
    """Metadata of a dense stored matrix: bits, group size, dtypes and tensor names, but not the tensors themselves.

    Each kind is a frozen dataclass. Its fields are the fields of the JSON object.

    Attributes:
        kind: name of the kind in JSON.
        form: the class that holds the tensors.
    """

    kind: ClassVar[str]
    form: ClassVar[type]

    shape: tuple[int, ...]
    bits: int
    dtype: str

    @classmethod
    @abstractmethod
    def of(cls, form: Any) -> Self:
        """Return the metadata of a stored matrix."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the metadata as a JSON object."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Any) -> Self:
        """Read and check the JSON object of :meth:`to_json`; the input need not be trusted.

        Raises:
            InvalidArgumentError: for a field that is missing or invalid; the message names it.
        """

    @abstractmethod
    def layout(self, name: str) -> Layout:
        """Return name, shape and dtype of each tensor; ``name`` is the name of the codes."""

    @abstractmethod
    def tensors(self, form: Any, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a stored matrix by the names in :meth:`layout`."""

    @abstractmethod
    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> Any:
        """Build the stored matrix from its tensors; the reverse of :meth:`tensors`.

        Raises:
            InvalidArgumentError: if the tensors are inconsistent.
        """

    @abstractmethod
    def prepared(self, matrix: QuantizedMatrix) -> PreparedMatrix:
        """Prepare a matrix of this kind for products."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """Short form of the kind and its settings, for output."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def part_name(name: str, part: str) -> str:
    """Return the name of a tensor that belongs to the codes ``name``; the codes of a matrix are its ``weight``."""
    return part if name == "weight" else f"{name}_{part}"


class Description:
    """Checks the JSON object that describes a dense stored matrix.

    Args:
        data: the object.
        spec: the dataclass whose fields it must have.
        what: name of the kind in messages, such as "a grid".

    Raises:
        InvalidArgumentError: if ``data`` is not an object or lacks a field.
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
        """Raise InvalidArgumentError for the field ``name`` unless ``ok``."""
        if not ok:
            raise InvalidArgumentError(
                f"[checkpoint] {name} of {self.what} must be {rule}: got {reprlib.repr(self.values[name])}"
            )

    def check_shape_bits_and_dtype(self) -> None:
        """Check the fields that all kinds have; the shape becomes a tuple."""
        shape = self.values["shape"]
        sizes = isinstance(shape, (list, tuple)) and len(shape) in (1, 2) and all(map(is_natural, shape))
        self.demand(sizes, "shape", "1 or 2 sizes")
        self.values["shape"] = tuple(shape)
        self.demand(is_natural(self.values["bits"]) and self.values["bits"] <= 8, "bits", "1 to 8")
        known = isinstance(self.values["dtype"], str) and self.values["dtype"] in FLOATS
        self.demand(known, "dtype", "float32, float16 or bfloat16")


def is_natural(value: object) -> bool:
    """Whether a JSON value is a positive integer that can be a size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**48
