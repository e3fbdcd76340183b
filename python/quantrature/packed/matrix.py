"""Metadata of one quantized matrix, as in config.json."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import InstanceOf

from .._C import InvalidArgumentError
from ..files.schema import Integer, Must, Text, read
from ..ops import SparseCSR
from ..ops._arrays import dtype_name
from ..ops._outliers import offset_dtype
from .codebook import CodebookSpec
from .dense import DenseSpec, Layout, StoredDtype
from .gguf import GgufSpec
from .grid import GridSpec
from .quantized import QuantizedMatrix
from .trellis import TrellisSpec

if TYPE_CHECKING:
    import torch

KINDS: dict[str, type[DenseSpec]] = {spec.kind: spec for spec in (GridSpec, CodebookSpec, TrellisSpec, GgufSpec)}
"""Dense storage formats by the name of their kind."""

OUTLIERS = ("outlier_values", "outlier_columns", "outlier_row_offsets")
INPUT_SCALE = "input_scale"

_SIZES = {"uint8": 1, "float16": 2, "bfloat16": 2, "uint16": 2, "float32": 4, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class MatrixSpec:
    """Metadata of a quantized matrix: its entry in ``quantization_config["modules"]`` of config.json.

    Attributes:
        dense: metadata of the dense part.
        outliers: number of weights that are stored unquantized.
        input_scale: dtype of the input scale; ``None`` if there is none.
        digest: hash of all tensors, in hexadecimal.
    """

    dense: InstanceOf[DenseSpec]
    outliers: Annotated[Integer, Must("a number of weights")] = 0
    input_scale: Annotated[StoredDtype | None, Must("null, float16 or float32")] = None
    digest: Annotated[Text, Must("text")] = ""

    def __post_init__(self) -> None:
        """Check the rules about several fields."""
        if len(self.dense.shape) != 2:
            raise InvalidArgumentError(
                f"[checkpoint] shape of a matrix must be rows and columns: got {self.dense.shape}"
            )
        if not 0 <= self.outliers <= self.dense.numel:
            raise InvalidArgumentError(
                f"[checkpoint] outliers of a matrix must be 0 to {self.dense.numel}: got {self.outliers}"
            )

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> MatrixSpec:
        """Return the metadata of a matrix."""
        kind = next(kind for kind in KINDS.values() if isinstance(matrix.dense, kind.form))
        scale = None if matrix.input_scale is None else dtype_name(matrix.input_scale)
        spec = cls(kind.of(matrix.dense), 0 if matrix.outliers is None else matrix.outliers.nnz, scale)
        return replace(spec, digest=digest(spec.tensors(matrix)))

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as a JSON object."""
        described = {"kind": self.dense.kind, **self.dense.to_json(), "outliers": self.outliers}
        if self.input_scale is not None:
            described[INPUT_SCALE] = self.input_scale
        return described | {"digest": self.digest}

    @classmethod
    def from_json(cls, data: Any) -> MatrixSpec:
        """Read and check the JSON object of :meth:`to_json`. The default kind is a grid.

        Raises:
            InvalidArgumentError: for a field that is missing or invalid; the message names it.
        """
        kind = data.get("kind", GridSpec.kind) if isinstance(data, Mapping) else GridSpec.kind
        if not isinstance(kind, str) or kind not in KINDS:
            raise InvalidArgumentError(
                f"[checkpoint] kind of a matrix must be {' or '.join(KINDS)}: got {reprlib.repr(kind)}"
            )
        dense = KINDS[kind].from_json(data)
        return read(cls, {**data, "dense": dense}, op="checkpoint", what="a matrix")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, cols = self.dense.shape
        return rows, cols

    def layout(self) -> Layout:
        """Return name, shape and dtype of each tensor."""
        yield from self.dense.layout("weight")
        rows, cols = self.shape
        if self.outliers:
            columns = "uint16" if cols <= 1 << 16 else "int32"
            offsets = offset_dtype(self.outliers)
            shapes = ((self.outliers,), (self.outliers,), (rows + 1,))
            yield from zip(OUTLIERS, shapes, (self.dense.dtype, columns, offsets), strict=True)
        if self.input_scale is not None:
            yield INPUT_SCALE, (cols,), self.input_scale

    def tensors(self, matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
        """Return the tensors of a matrix by the names in :meth:`layout`."""
        found = self.dense.tensors(matrix.dense, "weight")
        if matrix.outliers is not None and self.outliers:
            sparse = matrix.outliers
            found |= dict(zip(OUTLIERS, (sparse.values, sparse.columns, sparse.row_offsets), strict=True))
        if matrix.input_scale is not None:
            found[INPUT_SCALE] = matrix.input_scale
        return found

    def matrix(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        """Build the matrix from its tensors; the reverse of :meth:`tensors`. Outlier positions are checked.

        Raises:
            InvalidArgumentError: if a tensor does not have the shape and dtype in :meth:`layout`; the message names it.
        """
        for name, shape, dtype in self.layout():
            found = (tuple(tensors[name].shape), dtype_name(tensors[name]))
            if found != (tuple(shape), dtype):
                raise InvalidArgumentError(
                    f"[checkpoint] tensor {name} must have shape {tuple(shape)} and dtype {dtype}: "
                    f"got shape={found[0]}, dtype={found[1]}"
                )
        sparse = self._outliers(tensors) if self.outliers else None
        scale = None if self.input_scale is None else tensors[INPUT_SCALE]
        return QuantizedMatrix(self.dense.quantized(tensors, "weight"), sparse, scale)

    def _outliers(self, tensors: Mapping[str, torch.Tensor]) -> SparseCSR:
        values, columns, row_offsets = (tensors[name] for name in OUTLIERS)
        return SparseCSR(values, columns, row_offsets, self.shape)

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors."""
        return sum(math.prod(shape) * _SIZES[dtype] for _, shape, dtype in self.layout())


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of the bytes of tensors, in the order of their names."""
    import torch

    total = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy()
        total.update(f"{name} {data.nbytes};".encode())
        total.update(data.data)
    return total.hexdigest()
