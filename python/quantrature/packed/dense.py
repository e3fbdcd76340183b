"""Interface of all dense storage formats, and checks for their JSON descriptions.

Dense means that all weights of the matrix are stored, in a few bits each; outliers are stored in addition.
"""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self

from pydantic import Field

from .._C import InvalidArgumentError
from ..files.schema import Must, Natural, OneOf, read
from ..ops._arrays import FLOATS

if TYPE_CHECKING:
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix

Layout = Iterator[tuple[str, tuple[int, ...], str]]
"""Tensor name to shape and dtype."""

Shape = Annotated[tuple[Natural, ...], Field(min_length=1, max_length=2), Must("1 or 2 sizes")]
Dtype = Annotated[str, OneOf(*FLOATS)]
StoredDtype = Annotated[str, OneOf("float16", "float32")]


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

    Each kind is a frozen dataclass. Its fields are the fields of the JSON object, and their types are the rules that
    :meth:`from_json` checks. Rules about several fields are checked by ``__post_init__``.

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
    def from_json(cls, data: Any) -> Self:
        """Read and check the JSON object of :meth:`to_json`; the input need not be trusted.

        Raises:
            InvalidArgumentError: for a field that is missing or invalid; the message names it.
        """
        return read(cls, data, op="checkpoint", what=f"a {cls.kind}")

    def _demand(self, ok: bool, name: str, rule: str) -> None:
        """Raise InvalidArgumentError for the field ``name`` unless ``ok``: for rules about several fields."""
        if not ok:
            raise InvalidArgumentError(
                f"[checkpoint] {name} of a {self.kind} must be {rule}: got {reprlib.repr(getattr(self, name))}"
            )

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
