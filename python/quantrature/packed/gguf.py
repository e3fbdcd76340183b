"""Storage format of llama.cpp: blocks of a GGUF type, as GGUF files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from .. import ops
from ..files.schema import Bits, Must, Natural, OneOf
from ..ops import GGUF_TYPES
from ..ops._arrays import consecutive_rows
from .dense import DenseSpec, Dtype, Layout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix


def bits_of(type: str) -> int:
    """Bits of a code of a GGUF type: 4 for ``Q4_K`` and ``IQ4_NL``."""
    return int(type.lstrip("IQ")[0])


@dataclass(frozen=True, eq=False)
class GgufMatrix:
    """A matrix in blocks of a GGUF type.

    Attributes:
        data: uint8 (rows, bytes of a row), as :func:`quantrature.ops.gguf_quantize` returns it.
        type: name of the type, such as ``Q4_K``.
        shape: shape of the matrix, (rows, columns).
        dtype: dtype of the original matrix: "float32", "float16" or "bfloat16".
    """

    data: torch.Tensor
    type: str
    shape: tuple[int, int]
    dtype: str

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return bits_of(self.type)

    @property
    def nbytes(self) -> int:
        """Stored bytes, with scales and minimums."""
        return int(self.data.numel())

    def take(self, rows: npt.NDArray[np.int64]) -> GgufMatrix:
        """Return the matrix of some rows, in the given order."""
        return replace(self, data=self.data[rows], shape=(len(rows), self.shape[1]))

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> torch.Tensor:
        """Dequantize all rows, or a slice of consecutive rows."""
        import torch

        data = self.data if rows is None else self.data[consecutive_rows(rows, self.shape[0], "dequantize")]
        values: torch.Tensor = ops.gguf_dequantize(data, self.type, self.shape[1])
        return values.to(getattr(torch, self.dtype if dtype is None else dtype))


@dataclass(frozen=True)
class GgufSpec(DenseSpec):
    """Metadata of a :class:`GgufMatrix`, which has one tensor.

    Attributes:
        shape: shape of the matrix, (rows, columns).
        bits: bits of a code.
        type: name of the type.
        dtype: dtype of the original matrix.
    """

    kind: ClassVar[str] = "gguf"
    form: ClassVar[type] = GgufMatrix

    shape: Annotated[tuple[Natural, Natural], Must("2 sizes")]
    bits: Bits
    type: Annotated[str, OneOf(GGUF_TYPES)]
    dtype: Dtype

    @classmethod
    def of(cls, form: GgufMatrix) -> GgufSpec:
        """Return the metadata of a matrix."""
        return cls(form.shape, form.bits, form.type, form.dtype)

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as a JSON object."""
        return {"shape": list(self.shape), "bits": self.bits, "type": self.type, "dtype": self.dtype}

    def __post_init__(self) -> None:
        """Check the rules about several fields."""
        self._demand(self.bits == bits_of(self.type), "bits", f"{bits_of(self.type)} with the type {self.type}")
        block = GGUF_TYPES[self.type].block_size
        self._demand(self.shape[1] % block == 0, "shape", f"columns in whole blocks of {block}")

    @property
    def setting(self) -> str:
        """The name of the type."""
        return self.type

    @property
    def _row_bytes(self) -> int:
        return GGUF_TYPES[self.type].row_bytes(self.shape[1])

    def layout(self, name: str) -> Layout:
        """Return name, shape and dtype of the tensor with the blocks."""
        # One-dimensional, so that a reader which expects the weight itself stumbles over the shape.
        yield name, (self.shape[0] * self._row_bytes,), "uint8"

    def tensors(self, form: GgufMatrix, name: str) -> dict[str, torch.Tensor]:
        """Return the tensor of a matrix by the name in :meth:`layout`."""
        return {name: form.data.reshape(-1)}

    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> GgufMatrix:
        """Build the matrix from its tensor; the reverse of :meth:`tensors`."""
        return GgufMatrix(tensors[name].view(self.shape[0], self._row_bytes), self.type, self.shape, self.dtype)

    def prepared(self, matrix: QuantizedMatrix) -> PreparedMatrix:
        """Prepare a matrix of this kind for products."""
        from .product import DecodedProduct

        return DecodedProduct(matrix)
