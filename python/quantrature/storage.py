"""One quantized matrix as checkpoints and modules hold it: a description in JSON, and the tensors it speaks of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ._arrays import dtype_name
from ._C import InvalidArgumentError
from .methods import QuantizedMatrix
from .ops import QuantizedTensor, SparseCSR, row_bytes
from .ops._outliers import offset_dtype

if TYPE_CHECKING:
    import torch

Layout = Iterator[tuple[str, tuple[int, ...], str]]
"""Names, shapes and dtypes of stored tensors."""

OUTLIERS = ("outlier_values", "outlier_columns", "outlier_row_offsets")


@dataclass(frozen=True)
class GridSpec:
    """A packed grid: everything about a :class:`QuantizedTensor` but its numbers.

    Attributes:
        shape: of what was quantized, one or two dimensions.
        bits, group_size, sym: as in :func:`quantrature.ops.quantize`; groups run along rows.
        dtype: of what was quantized.
        scale: dtype of the stored scales, or the grid on which they are quantized in turn.
        zero: the same for the zeros; ``None`` on a symmetric grid.
    """

    shape: tuple[int, ...]
    bits: int
    group_size: int
    sym: bool
    dtype: str
    scale: str | GridSpec
    zero: str | GridSpec | None

    @classmethod
    def of(cls, q: QuantizedTensor) -> GridSpec:
        """The description of q."""

        def part(values: Any) -> Any:
            if values is None:
                return None
            return cls.of(values) if isinstance(values, QuantizedTensor) else dtype_name(values)

        return cls(tuple(q.shape), q.bits, q.group_size, q.sym, q.dtype, part(q.scale), part(q.zero))

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_json() if isinstance(v, GridSpec) else v for k, v in values.items()} | {
            "shape": list(self.shape)
        }

    @classmethod
    def from_json(cls, data: Any) -> GridSpec:
        """Read :meth:`to_json`, from whoever wrote it.

        Raises:
            InvalidArgumentError: naming the field that is missing or impossible.
        """
        if not isinstance(data, Mapping):
            raise InvalidArgumentError(f"[checkpoint] a grid must be an object: got {data!r}")
        given = {}
        for f in fields(cls):
            if f.name not in data:
                raise InvalidArgumentError(f"[checkpoint] a grid must have the field {f.name!r}")
            given[f.name] = data[f.name]

        def demand(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidArgumentError(f"[checkpoint] {name} of a grid must be {rule}: got {data[name]!r}")

        def natural(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**48

        shape = given["shape"]
        demand(
            isinstance(shape, (list, tuple)) and len(shape) in (1, 2) and all(map(natural, shape)),
            "shape",
            "1 or 2 sizes",
        )
        given["shape"] = tuple(shape)
        demand(natural(given["bits"]) and given["bits"] <= 8, "bits", "1 to 8")
        demand(natural(given["group_size"]) or given["group_size"] == -1, "group_size", "-1 or at least 1")
        demand(isinstance(given["sym"], bool), "sym", "true or false")
        demand(given["dtype"] in ("float32", "float16", "bfloat16"), "dtype", "float32, float16 or bfloat16")
        for name in ("scale", "zero"):
            if isinstance(given[name], Mapping):
                given[name] = cls.from_json(given[name])
            elif not (name == "zero" and given[name] is None):
                demand(given[name] in ("float16", "float32"), name, "float16, float32 or a grid")
        demand((given["zero"] is None) == given["sym"], "zero", "null on a symmetric grid and there alone")
        return cls(**given)

    @property
    def numel(self) -> int:
        """How many numbers were quantized."""
        return math.prod(self.shape)

    @property
    def _rows_and_cols(self) -> tuple[int, int]:
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], self.shape[1])

    @property
    def _groups(self) -> tuple[int, int]:
        """Shape of the scales and zeros."""
        rows, cols = self._rows_and_cols
        return rows, 1 if self.group_size == -1 else -(-cols // self.group_size)

    def layout(self, name: str) -> Layout:
        """The tensors of this grid; the codes are called name."""
        rows, cols = self._rows_and_cols
        # One-dimensional, so that a reader which expects the weight itself stumbles over the shape.
        yield name, (rows * row_bytes(cols, self.bits),), "uint8"
        for part, kind in (("scale", self.scale), ("zero", self.zero)):
            inner = part if name == "weight" else f"{name}_{part}"
            if isinstance(kind, GridSpec):
                if math.prod(kind.shape) != math.prod(self._groups):
                    raise InvalidArgumentError(
                        f"[checkpoint] {inner} must have {self._groups} numbers: got {kind.shape}"
                    )
                yield from kind.layout(inner)
            elif kind is not None:
                yield inner, self._groups, kind

    def tensors(self, q: QuantizedTensor, name: str) -> dict[str, torch.Tensor]:
        """What :meth:`layout` names, out of q."""
        found = {name: q.codes.reshape(-1)}
        for part, kind in (("scale", self.scale), ("zero", self.zero)):
            inner = part if name == "weight" else f"{name}_{part}"
            values = getattr(q, part)
            if isinstance(kind, GridSpec):
                found |= kind.tensors(values, inner)
            elif kind is not None:
                found[inner] = values
        return found

    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> QuantizedTensor:
        """The reverse of :meth:`tensors`."""
        parts: dict[str, Any] = {}
        for part, kind in (("scale", self.scale), ("zero", self.zero)):
            inner = part if name == "weight" else f"{name}_{part}"
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


@dataclass(frozen=True)
class MatrixSpec:
    """A quantized weight matrix: its entry in ``quantization_config["modules"]`` of config.json.

    Attributes:
        grid: of the dense part.
        outliers: how many weights are stored exactly beside it.
        digest: hash over all tensors, in hexadecimal.
    """

    grid: GridSpec
    outliers: int = 0
    digest: str = ""

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> MatrixSpec:
        """The description of a matrix."""
        spec = cls(GridSpec.of(matrix.dense), 0 if matrix.outliers is None else matrix.outliers.nnz)
        return cls(spec.grid, spec.outliers, digest(spec.tensors(matrix)))

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""
        return self.grid.to_json() | {"outliers": self.outliers, "digest": self.digest}

    @classmethod
    def from_json(cls, data: Any) -> MatrixSpec:
        """Read :meth:`to_json`.

        Raises:
            InvalidArgumentError: naming the field that is missing or impossible.
        """
        grid = GridSpec.from_json(data)
        if len(grid.shape) != 2:
            raise InvalidArgumentError(f"[checkpoint] shape of a matrix must be rows and columns: got {grid.shape}")
        outliers = data.get("outliers", 0)
        if not isinstance(outliers, int) or not 0 <= outliers <= grid.numel:
            raise InvalidArgumentError(f"[checkpoint] outliers must be 0 to {grid.numel}: got {outliers!r}")
        return cls(grid, outliers, str(data.get("digest", "")))

    def layout(self) -> Layout:
        """Names, shapes and dtypes of the tensors, in the order they are hashed."""
        yield from self.grid.layout("weight")
        if self.outliers:
            rows, cols = self.grid.shape
            columns = "uint16" if cols <= 1 << 16 else "int32"
            offsets = offset_dtype(self.outliers)
            shapes = ((self.outliers,), (self.outliers,), (rows + 1,))
            yield from zip(OUTLIERS, shapes, (self.grid.dtype, columns, offsets), strict=True)

    def tensors(self, matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
        """What :meth:`layout` names, out of a matrix."""
        found = self.grid.tensors(matrix.dense, "weight")
        if matrix.outliers is not None and self.outliers:
            sparse = matrix.outliers
            found |= dict(zip(OUTLIERS, (sparse.values, sparse.columns, sparse.row_offsets), strict=True))
        return found

    def matrix(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        """The reverse of :meth:`tensors`; the positions of the outliers are checked."""
        sparse = self._outliers(tensors) if self.outliers else None
        return QuantizedMatrix(self.grid.quantized(tensors, "weight"), sparse)

    def _outliers(self, tensors: Mapping[str, torch.Tensor]) -> SparseCSR:
        values, columns, row_offsets = (tensors[name] for name in OUTLIERS)
        rows, cols = self.grid.shape
        return SparseCSR(values, columns, row_offsets, (rows, cols))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        sizes = {"uint8": 1, "float16": 2, "bfloat16": 2, "uint16": 2, "float32": 4, "int32": 4, "int64": 8}
        return sum(math.prod(shape) * sizes[dtype] for _, shape, dtype in self.layout())


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash over the bytes of tensors, in order of their names."""
    import torch

    total = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy()
        total.update(f"{name} {data.nbytes};".encode())
        total.update(data.data)
    return total.hexdigest()
