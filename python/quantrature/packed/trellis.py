"""Storage format of QTIP: trellis codes of a rotated matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from .. import ops
from .._C import InvalidArgumentError
from ..files.schema import Bits, Must, Natural, Text
from ..ops import Trellis
from ..ops._arrays import consecutive_rows
from .dense import DenseSpec, Dtype, Layout, part_name

if TYPE_CHECKING:
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix

_TILE = 16
_LARGEST_ORDER = 512
_BLOCK = 1 << 19
"""Number of weights to decode at a time, if there are many rows of activations."""

FEW = 32
"""Largest number of rows of activations for which decoding during the product is faster."""


def padded(size: int) -> int:
    """Return the size to which a dimension is padded with zeros.

    It is the least multiple of 16 for which :func:`ops.hadamard` has a transform with a dense factor of order at most
    512; if there is none, the least multiple of 32, of 64, ...
    """
    unit = _TILE
    while ops.hadamard_order(-(-size // unit) * unit) > _LARGEST_ORDER:
        unit *= 2
    return -(-size // unit) * unit


@dataclass(frozen=True, eq=False)
class TrellisMatrix:
    """A matrix W (rows, columns) in QTIP's storage format (arXiv 2406.11235): trellis codes of ``A^T W B``.

    A and B are orthogonal transforms (:func:`quantrature.ops.hadamard` with random signs), of the padded sizes that
    :func:`padded` gives.

    Attributes:
        codes: uint8 (tiles, 32 * bits), one bit stream per tile of 16 x 16 weights (see
            :func:`quantrature.ops.trellis_matvec`).
        scale: float32 (1,), scale of all weights.
        input_signs, output_signs: uint8, one bit per padded column and row: the signs in B and A.
        trellis: the trellis code.
        shape: shape of the matrix, (rows, columns).
        dtype: dtype of the original matrix: "float32", "float16" or "bfloat16".
    """

    codes: torch.Tensor
    scale: torch.Tensor
    input_signs: torch.Tensor
    output_signs: torch.Tensor
    trellis: Trellis
    shape: tuple[int, int]
    dtype: str

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return self.trellis.bits

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Shape of the rotated matrix, (rows, columns)."""
        return padded(self.shape[0]), padded(self.shape[1])

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scale and signs."""
        return int(self.codes.numel() + self.input_signs.numel() + self.output_signs.numel() + 4)

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> torch.Tensor:
        """Dequantize all rows, or a slice of consecutive rows.

        Both transforms are reversed in float32, inputs first; the result is the same on every CPU. Each row depends on
        all codes, so a few rows take as long as all.
        """
        import torch

        weight = unrotated(self._rotated(slice(0, self.padded_shape[0])), self.input_signs, self.output_signs)[
            : self.shape[0], : self.shape[1]
        ]
        if rows is not None:
            weight = weight[consecutive_rows(rows, self.shape[0], "dequantize")]
        return weight.to(getattr(torch, self.dtype if dtype is None else dtype)).contiguous()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply each row of ``x``, float32 (n, columns), with the transposed matrix; returns float32 (n, rows).

        Inputs and results are rotated, not the matrix. For a few rows, weights are decoded during the product; for
        many, a few tile rows are decoded at a time. The whole matrix is never decoded at once.
        """
        import torch

        rows, cols = self.padded_shape
        inputs = torch.zeros(len(x), cols, device=x.device)
        inputs[:, : self.shape[1]] = x
        ops.hadamard(inputs, self.input_signs, out=inputs)
        if len(x) <= FEW:
            outputs = ops.trellis_matvec(self.codes, (rows, cols), inputs, self.trellis, float(self.scale))
        else:
            outputs = torch.empty(len(x), rows, device=x.device)
            for block, weight in self._blocks():
                torch.mm(inputs, weight.mT, out=outputs[:, block])
        ops.hadamard(outputs, self.output_signs, inverse=True, out=outputs)
        result: torch.Tensor = outputs[:, : self.shape[0]]
        return result

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """Multiply each row of ``y``, float32 (n, rows), with the matrix; returns float32 (n, columns)."""
        import torch

        rows, cols = self.padded_shape
        outputs = torch.zeros(len(y), rows, device=y.device)
        outputs[:, : self.shape[0]] = y
        ops.hadamard(outputs, self.output_signs, out=outputs)
        inputs = torch.zeros(len(y), cols, device=y.device)
        for block, weight in self._blocks():
            inputs.addmm_(outputs[:, block], weight)
        ops.hadamard(inputs, self.input_signs, inverse=True, out=inputs)
        result: torch.Tensor = inputs[:, : self.shape[1]]
        return result

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield blocks of whole tile rows of the rotated matrix: their slice, and their weights."""
        rows, cols = self.padded_shape
        step = max(1, _BLOCK // (_TILE * cols)) * _TILE
        for begin in range(0, rows, step):
            block = slice(begin, min(rows, begin + step))
            yield block, self._rotated(block)

    def _rotated(self, block: slice) -> torch.Tensor:
        """Return the weights in a block of whole tile rows of the rotated matrix."""
        rows, cols = block.stop - block.start, self.padded_shape[1]
        per_row = cols // _TILE
        codes = self.codes[block.start // _TILE * per_row : block.stop // _TILE * per_row]
        tiles = ops.trellis_dequantize(codes, _TILE * _TILE, self.trellis, float(self.scale))
        weights: torch.Tensor = tiles.view(rows // _TILE, per_row, _TILE, _TILE)
        return weights.transpose(1, 2).reshape(rows, cols)


def rotated(weight: torch.Tensor, input_signs: torch.Tensor, output_signs: torch.Tensor) -> torch.Tensor:
    """Rotate a float32 matrix W of padded shape: ``A^T W B``."""
    inputs = ops.hadamard(weight.contiguous(), input_signs)
    turned: torch.Tensor = ops.hadamard(inputs.mT.contiguous(), output_signs)
    return turned.mT.contiguous()


def unrotated(weight: torch.Tensor, input_signs: torch.Tensor, output_signs: torch.Tensor) -> torch.Tensor:
    """Undo :func:`rotated`."""
    inputs = ops.hadamard(weight.contiguous(), input_signs, inverse=True)
    turned: torch.Tensor = ops.hadamard(inputs.mT.contiguous(), output_signs, inverse=True)
    return turned.mT.contiguous()


@dataclass(frozen=True)
class TrellisSpec(DenseSpec):
    """Metadata of a :class:`TrellisMatrix`; the tensors are named by :meth:`layout`.

    Attributes:
        shape: shape of the matrix, (rows, columns).
        bits, state_bits, code: as in :class:`quantrature.ops.Trellis`.
        dtype: dtype of the original matrix.
    """

    kind: ClassVar[str] = "trellis"
    form: ClassVar[type] = TrellisMatrix

    shape: Annotated[tuple[Natural, Natural], Must("2 sizes")]
    bits: Bits
    state_bits: Annotated[Natural, Must("at least 1")]
    code: Annotated[Text, Must("text")]
    dtype: Dtype

    @classmethod
    def of(cls, form: TrellisMatrix) -> TrellisSpec:
        """Return the metadata of a matrix."""
        return cls(form.shape, form.bits, form.trellis.state_bits, form.trellis.code, form.dtype)

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as a JSON object."""
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "state_bits": self.state_bits,
            "code": self.code,
            "dtype": self.dtype,
        }

    def __post_init__(self) -> None:
        """Check that there is such a trellis code."""
        Trellis(self.bits, self.state_bits, self.code)  # type: ignore[arg-type]

    @property
    def trellis(self) -> Trellis:
        """The trellis code."""
        return Trellis(self.bits, self.state_bits, self.code)  # type: ignore[arg-type]

    @property
    def setting(self) -> str:
        """Short form of bits, state bits and code, such as ``b2L16 3inst``."""
        return f"b{self.bits}L{self.state_bits} {self.code}"

    def _streams(self) -> tuple[int, int]:
        rows, cols = (padded(size) for size in self.shape)
        return rows * cols // _TILE**2, self.trellis.stream_bytes(_TILE**2)

    def layout(self, name: str) -> Layout:
        """Return name, shape and dtype of each tensor; ``name`` is the name of the codes."""
        tiles, size = self._streams()
        # One-dimensional, so that a reader which expects the weight itself stumbles over the shape.
        yield name, (tiles * size,), "uint8"
        yield part_name(name, "scale"), (1,), "float32"
        for part, count in zip(("input_signs", "output_signs"), reversed(self.shape), strict=True):
            yield part_name(name, part), (padded(count) // 8,), "uint8"

    def tensors(self, form: TrellisMatrix, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a matrix by the names in :meth:`layout`."""
        parts = {part: getattr(form, part) for part in ("scale", "input_signs", "output_signs")}
        return {name: form.codes.reshape(-1)} | {part_name(name, part): tensor for part, tensor in parts.items()}

    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> TrellisMatrix:
        """Build the matrix from its tensors; the reverse of :meth:`tensors`.

        Raises:
            InvalidArgumentError: if the scale is not finite.
        """
        scale = tensors[part_name(name, "scale")]
        if not math.isfinite(float(scale)):
            raise InvalidArgumentError(f"[checkpoint] scale of a trellis must be finite: got {float(scale)}")
        rows, cols = self.shape
        return TrellisMatrix(
            codes=tensors[name].view(self._streams()),
            scale=scale,
            input_signs=tensors[part_name(name, "input_signs")],
            output_signs=tensors[part_name(name, "output_signs")],
            trellis=self.trellis,
            shape=(rows, cols),
            dtype=self.dtype,
        )

    def prepared(self, matrix: QuantizedMatrix) -> PreparedMatrix:
        """Prepare a matrix of this kind for products."""
        from .product import RotatedProduct

        return RotatedProduct.of(matrix)
