"""Storage format of matrices quantized to a codebook (a table of values), such as NF4 and SqueezeLLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from .._C import InvalidArgumentError
from ..files.schema import Bits, GroupSize, Must, OneOf
from ..ops import CODEBOOKS, CodebookTensor, QuantizedTensor, groups_in_row, row_bytes
from ..ops._arrays import dtype_name
from .dense import DenseSpec, Dtype, Layout, Shape, StoredDtype, part_name
from .grid import GridSpec, Parameters

if TYPE_CHECKING:
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix


@dataclass(frozen=True)
class CodebookSpec(DenseSpec):
    """Metadata of a :class:`CodebookTensor`; the tensors are named by :meth:`layout`.

    Attributes:
        shape: shape of the original tensor, one or two dimensions.
        bits, group_size: as in :func:`quantrature.ops.quantize`; ``group_size`` is ``None`` for tables without scales.
        dtype: dtype of the original tensor.
        codebook: name of a fixed table, which is not stored; ``shared`` for one stored table, ``rows`` for one per row.
        table: dtype of stored tables; ``None`` for a fixed table.
        scale: dtype of the stored scales, or the grid to which they are quantized; ``None`` without scales.
    """

    kind: ClassVar[str] = "codebook"
    form: ClassVar[type] = CodebookTensor

    shape: Shape
    bits: Bits
    group_size: Annotated[GroupSize | None, Must("null, -1 or at least 1")]
    dtype: Dtype
    codebook: Annotated[str, OneOf(*CODEBOOKS, "shared", "rows")]
    table: StoredDtype | None
    scale: Parameters | None

    @classmethod
    def of(cls, q: CodebookTensor) -> CodebookSpec:
        """Return the metadata of ``q``."""
        name = q.name if q.name is not None else "rows" if q.table.ndim == 2 else "shared"
        scale = q.scale
        return cls(
            tuple(q.shape),
            q.bits,
            q.group_size,
            q.dtype,
            name,
            dtype_name(q.table) if q.name is None else None,
            None if scale is None else GridSpec.of(scale) if isinstance(scale, QuantizedTensor) else dtype_name(scale),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as a JSON object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        scale = self.scale.to_json() if isinstance(self.scale, GridSpec) else self.scale
        return values | {"shape": list(self.shape), "scale": scale}

    def __post_init__(self) -> None:
        """Check the rules about several fields."""
        if self.codebook in CODEBOOKS:
            entries = len(CODEBOOKS[self.codebook])
            self._demand(self.table is None, "table", "null for a fixed table")
            self._demand(1 << self.bits == entries, "bits", f"the bits of a table of {entries} values")
        else:
            self._demand(self.table is not None, "table", "float16 or float32")
        self._demand(
            (self.scale is None) == (self.group_size is None), "scale", "null if and only if group_size is null"
        )

    @property
    def setting(self) -> str:
        """Short form of bits, group size and table, such as ``b4g64 nf4`` and ``b3 rows``."""
        groups = "" if self.group_size is None else f"g{self.group_size}"
        return f"b{self.bits}{groups} {self.codebook}"

    @property
    def _rows_and_cols(self) -> tuple[int, int]:
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])

    def layout(self, name: str) -> Layout:
        """Return name, shape and dtype of each tensor; ``name`` is the name of the codes."""
        rows, cols = self._rows_and_cols
        # One-dimensional, so that a reader which expects the weight itself stumbles over the shape.
        yield name, (rows * row_bytes(cols, self.bits),), "uint8"
        if self.table is not None:
            entries = 1 << self.bits
            yield part_name(name, "table"), (rows, entries) if self.codebook == "rows" else (entries,), self.table
        if self.group_size is not None:
            groups = (rows, groups_in_row(cols, self.group_size))
            inner = part_name(name, "scale")
            if isinstance(self.scale, GridSpec):
                if self.scale.numel != math.prod(groups):
                    raise InvalidArgumentError(
                        f"[checkpoint] {inner} must have the shape {groups}: got {self.scale.shape}"
                    )
                yield from self.scale.layout(inner)
            else:
                assert self.scale is not None
                yield inner, groups, self.scale

    def tensors(self, q: CodebookTensor, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of ``q`` by the names in :meth:`layout`."""
        found = {name: q.codes.reshape(-1)}
        if self.table is not None:
            found[part_name(name, "table")] = q.table
        if isinstance(self.scale, GridSpec):
            found |= self.scale.tensors(q.scale, part_name(name, "scale"))
        elif self.scale is not None:
            found[part_name(name, "scale")] = q.scale
        return found

    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> CodebookTensor:
        """Build the form from its tensors; the reverse of :meth:`tensors`."""
        import torch

        inner = part_name(name, "scale")
        scale: Any = None
        if isinstance(self.scale, GridSpec):
            scale = self.scale.quantized(tensors, inner)
        elif self.scale is not None:
            scale = tensors[inner]
        stored = self.table is not None
        known = torch.tensor(CODEBOOKS.get(self.codebook, ()), dtype=torch.float32, device=tensors[name].device)
        return CodebookTensor(
            codes=tensors[name].reshape(self._rows_and_cols[0], -1),
            table=tensors[part_name(name, "table")] if stored else known,
            scale=scale,
            bits=self.bits,
            group_size=self.group_size,
            name=None if stored else self.codebook,
            shape=self.shape,
            dtype=self.dtype,
        )

    def prepared(self, matrix: QuantizedMatrix) -> PreparedMatrix:
        """Prepare a matrix of this kind for products."""
        from .product import PackedProduct

        return PackedProduct.of(matrix)
