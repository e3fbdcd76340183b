"""A matrix of trellis codes in a rotated basis, in memory and as checkpoints hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import ops
from .._C import InvalidArgumentError
from ..ops import Trellis
from ..ops._arrays import consecutive_rows
from .dense import DenseSpec, Description, Layout, is_natural, part_name

if TYPE_CHECKING:
    import torch

    from .product import PreparedMatrix
    from .quantized import QuantizedMatrix

_TILE = 16
_LARGEST_ORDER = 512
_BLOCK = 1 << 19
"""Weights that are decoded at a time where there are many products."""

FEW = 32
"""Up to so many products at a time, decoding on the way is the faster way."""


def padded(size: int) -> int:
    """The size that a dimension is padded to with zeros: the least multiple of 16 that :func:`ops.hadamard` has a
    transform for whose dense factor is at most of order 512; where there is none, of 32, of 64, ..."""
    unit = _TILE
    while ops.hadamard_order(-(-size // unit) * unit) > _LARGEST_ORDER:
        unit *= 2
    return -(-size // unit) * unit


@dataclass(frozen=True, eq=False)
class TrellisMatrix:
    """A matrix W of (rows, columns) as QTIP stores it (arXiv 2406.11235): trellis codes of ``A^T W B``.

    A and B are the transforms of :func:`quantrature.ops.hadamard` with the signs of the outputs and of the inputs, in
    the sizes of :func:`padded`.

    Attributes:
        codes: uint8 of shape (tiles, 32 bits): a stream for each tile of 16 x 16 weights (see
            :func:`quantrature.ops.trellis_matvec`).
        scale: float32 of shape (1,): of the weights.
        input_signs, output_signs: uint8, a bit for each padded column and row.
        trellis: what the codes are of.
        shape: of the matrix.
        dtype: of what was quantized: "float32", "float16" or "bfloat16".
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
        """Of a weight."""
        return self.trellis.bits

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Rows and columns of the rotated matrix."""
        return padded(self.shape[0]), padded(self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes as stored: codes, scale and signs."""
        return int(self.codes.numel() + self.input_signs.numel() + self.output_signs.numel() + 4)

    def dequantize(self, dtype: str | None = None, rows: slice | None = None) -> torch.Tensor:
        """The numbers that it stands for, of all rows or of some that follow each other.

        The same on every CPU: both transforms are taken back in float32, inputs first. Each row depends on all codes,
        so that some rows take as long as all.
        """
        import torch

        weight = unrotated(self._rotated(slice(0, self.padded_shape[0])), self.input_signs, self.output_signs)[
            : self.shape[0], : self.shape[1]
        ]
        if rows is not None:
            weight = weight[consecutive_rows(rows, self.shape[0], "dequantize")]
        return weight.to(getattr(torch, self.dtype if dtype is None else dtype)).contiguous()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product with each row of x, float32 (n, columns): float32 (n, rows).

        Only the inputs and the results are rotated. For a few rows weights are decoded on the way; for many, some tile
        rows at a time: the whole matrix is never there.
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
        """The product of each row of y, float32 (n, rows), with the matrix: float32 (n, columns)."""
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
        """Rows of the rotated matrix, whole tiles of them, and their weights."""
        rows, cols = self.padded_shape
        step = max(1, _BLOCK // (_TILE * cols)) * _TILE
        for begin in range(0, rows, step):
            block = slice(begin, min(rows, begin + step))
            yield block, self._rotated(block)

    def _rotated(self, block: slice) -> torch.Tensor:
        """Rows of the rotated matrix, whole tiles of them."""
        rows, cols = block.stop - block.start, self.padded_shape[1]
        per_row = cols // _TILE
        codes = self.codes[block.start // _TILE * per_row : block.stop // _TILE * per_row]
        tiles = ops.trellis_dequantize(codes, _TILE * _TILE, self.trellis, float(self.scale))
        weights: torch.Tensor = tiles.view(rows // _TILE, per_row, _TILE, _TILE)
        return weights.transpose(1, 2).reshape(rows, cols)


def rotated(weight: torch.Tensor, input_signs: torch.Tensor, output_signs: torch.Tensor) -> torch.Tensor:
    """``A^T W B`` of a float32 matrix of padded shape."""
    inputs = ops.hadamard(weight.contiguous(), input_signs)
    turned: torch.Tensor = ops.hadamard(inputs.mT.contiguous(), output_signs)
    return turned.mT.contiguous()


def unrotated(weight: torch.Tensor, input_signs: torch.Tensor, output_signs: torch.Tensor) -> torch.Tensor:
    """The reverse of :func:`rotated`."""
    inputs = ops.hadamard(weight.contiguous(), input_signs, inverse=True)
    turned: torch.Tensor = ops.hadamard(inputs.mT.contiguous(), output_signs, inverse=True)
    return turned.mT.contiguous()


@dataclass(frozen=True)
class TrellisSpec(DenseSpec):
    """A :class:`TrellisMatrix` but its numbers.

    Attributes:
        shape: of the matrix.
        bits, state_bits, code: of its :class:`quantrature.ops.Trellis`.
        dtype: of what was quantized.
    """

    kind: ClassVar[str] = "trellis"
    form: ClassVar[type] = TrellisMatrix

    shape: tuple[int, ...]
    bits: int
    state_bits: int
    code: str
    dtype: str

    @classmethod
    def of(cls, form: TrellisMatrix) -> TrellisSpec:
        """The description of a matrix."""
        return cls(form.shape, form.bits, form.trellis.state_bits, form.trellis.code, form.dtype)

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "state_bits": self.state_bits,
            "code": self.code,
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, data: Any) -> TrellisSpec:
        """Read :meth:`to_json`, from whoever wrote it.

        Raises:
            InvalidArgumentError: naming the field that is missing or impossible.
        """
        described = Description(data, cls, "a trellis")
        demand, given = described.demand, described.values
        described.check_shape_bits_and_dtype()
        demand(len(given["shape"]) == 2, "shape", "2 sizes")
        demand(is_natural(given["state_bits"]), "state_bits", "at least 1")
        demand(isinstance(given["code"], str), "code", "text")
        Trellis(given["bits"], given["state_bits"], given["code"])
        return cls(**given)

    @property
    def trellis(self) -> Trellis:
        """What the codes are of."""
        return Trellis(self.bits, self.state_bits, self.code)  # type: ignore[arg-type]

    @property
    def setting(self) -> str:
        """Bits, state bits and code: ``b2L16 3inst``."""
        return f"b{self.bits}L{self.state_bits} {self.code}"

    def _streams(self) -> tuple[int, int]:
        rows, cols = (padded(size) for size in self.shape)
        return rows * cols // _TILE**2, self.trellis.stream_bytes(_TILE**2)

    def layout(self, name: str) -> Layout:
        """The tensors of the matrix; the codes are called name."""
        tiles, size = self._streams()
        # One-dimensional, so that a reader which expects the weight itself stumbles over the shape.
        yield name, (tiles * size,), "uint8"
        yield part_name(name, "scale"), (1,), "float32"
        for part, count in zip(("input_signs", "output_signs"), reversed(self.shape), strict=True):
            yield part_name(name, part), (padded(count) // 8,), "uint8"

    def tensors(self, form: TrellisMatrix, name: str) -> dict[str, torch.Tensor]:
        """What :meth:`layout` names, out of a matrix."""
        parts = {part: getattr(form, part) for part in ("scale", "input_signs", "output_signs")}
        return {name: form.codes.reshape(-1)} | {part_name(name, part): tensor for part, tensor in parts.items()}

    def quantized(self, tensors: Mapping[str, torch.Tensor], name: str) -> TrellisMatrix:
        """The reverse of :meth:`tensors`.

        Raises:
            InvalidArgumentError: when the scale is not finite.
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
        """Make a matrix with a dense form of this kind ready to be multiplied."""
        from .product import RotatedProduct

        return RotatedProduct.of(matrix)
