"""Storage format of matrices quantized to a uniform grid: packed codes, a scale and a zero point per group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Tag

from .._C import InvalidArgumentError
from ..files.schema import OBJECT, OBJECT_OR_PLAIN, PLAIN, Bits, Boolean, GroupSize, Must
from ..ops import QuantizedTensor, groups_in_row, row_bytes
from ..ops._arrays import dtype_name
from .dense import DenseSpec, Dtype, Layout, Shape, part_name

if TYPE_CHECKING:
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix


Parameters = Annotated[
    Annotated["GridSpec", Tag(OBJECT)] | Annotated[Dtype, Must("float16, bfloat16, float32 or a grid"), Tag(PLAIN)],
    OBJECT_OR_PLAIN,
]
"""Type of scales and zero points: their dtype, or the grid to which they are quantized."""


@dataclass(frozen=True)
class GridSpec(DenseSpec):
    """Metadata of a :class:`QuantizedTensor`; the tensors are named by :meth:`layout`.

    Attributes:
        shape: shape of the original tensor, one or two dimensions.
        bits, group_size, sym: as in :func:`quantrature.ops.quantize`; groups run along rows.
        dtype: dtype of the original tensor.
        scale: dtype of the stored scales, or the grid to which they are quantized.
        zero: dtype or grid of the zero points; ``None`` if ``sym``.
    """

    kind: ClassVar[str] = "grid"
    form: ClassVar[type] = QuantizedTensor

    shape: Shape
    bits: Bits
    group_size: GroupSize
    sym: Annotated[Boolean, Must("true or false")]
    dtype: Dtype
    scale: Parameters
    zero: Parameters | None

    @classmethod
    def of(cls, q: QuantizedTensor) -> GridSpec:
        """Return the metadata of ``q``."""

        def part(values: Any) -> Any:
            if values is None:
                return None
            return cls.of(values) if isinstance(values, QuantizedTensor) else dtype_name(values)

        return cls(tuple(q.shape), q.bits, q.group_size, q.sym, q.dtype, part(q.scale), part(q.zero))

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as a JSON object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_json() if isinstance(v, GridSpec) else v for k, v in values.items()} | {
            "shape": list(self.shape)
        }

    def __post_init__(self) -> None:
        """Check the rules about several fields."""
        for name in ("scale", "zero"):
            grid = getattr(self, name)
            nested = isinstance(grid, GridSpec) and any(isinstance(part, GridSpec) for part in (grid.scale, grid.zero))
            self._demand(not nested, name, "a grid whose own scales and zeros are floats")
        self._demand((self.zero is None) == self.sym, "zero", "null if and only if sym is true")

    @property
    def setting(self) -> str:
        """Short form of bits, group size and symmetry, such as ``b3g64 sym``."""
        return f"b{self.bits}g{self.group_size}{' sym' if self.sym else ''}"

    @property
    def _rows_and_cols(self) -> tuple[int, int]:
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])

    @property
    def _groups(self) -> tuple[int, int]:
        """Shape of the scales and zero points: rows, groups per row."""
        rows, cols = self._rows_and_cols
        return rows, groups_in_row(cols, self.group_size)

    def layout(self, name: str) -> Layout:
        """Return name, shape and dtype of each tensor; ``name`` is the name of the codes."""
        rows, cols = self._rows_and_cols
        # One-dimensional, so that a reader which expects the weight itself stumbles over the shape.
        yield name, (rows * row_bytes(cols, self.bits),), "uint8"
        for part, kind in (("scale", self.scale), ("zero", self.zero)):
            inner = part_name(name, part)
            if isinstance(kind, GridSpec):
                if math.prod(kind.shape) != math.prod(self._groups):
                    raise InvalidArgumentError(
                        f"[checkpoint] {inner} must have the shape {self._groups}: got {kind.shape}"
                    )
                yield from kind.layout(inner)
            elif kind is not None:
                yield inner, self._groups, kind

    def tensors(self, q: QuantizedTensor, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of ``q`` by the names in :meth:`layout`."""
        found = {name: q.codes.reshape(-1)}
        for part, kind in (("scale", self.scale), ("zero", self.zero)):
            inner = part_name(name, part)
            values = getattr(q, part)
            if isinstance(kind, GridSpec):
                found |= kind.tensors(values, inner)
            elif kind is not None:
                found[inner] = values
        return found

    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> QuantizedTensor:
        """Build the form from its tensors; the reverse of :meth:`tensors`."""
        parts: dict[str, Any] = {}
        for part, kind in (("scale", self.scale), ("zero", self.zero)):
            inner = part_name(name, part)
            parts[part] = kind.quantized(tensors, inner) if isinstance(kind, GridSpec) else tensors.get(inner)
        return QuantizedTensor(
            codes=tensors[name].reshape(self._rows_and_cols[0], -1),
            bits=self.bits,
            group_size=self.group_size,
            axis=1,
            sym=self.sym,
            shape=self.shape,
            dtype=self.dtype,
            **parts,
        )

    def prepared(self, matrix: QuantizedMatrix) -> PreparedMatrix:
        """Prepare a matrix of this kind for products."""
        from .product import PackedProduct

        return PackedProduct.of(matrix)
