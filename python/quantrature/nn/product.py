"""The product of activations and a quantized matrix, as an operator that torch can trace: ``quantrature::linear``.

A few rows of activations, as in decoding, are multiplied with the packed codes themselves. For many, as in a prompt,
a block of the matrix at a time is dequantized and given to torch's own product; the whole matrix is never there.
Trellis codes stay in their rotated basis: the activations are rotated instead.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import _C
from .._C import InvalidArgumentError
from ..ops import CodebookTensor, PackedMatrix, QuantizedTensor, SparseCSR
from ..packed import MatrixSpec, QuantizedMatrix, TrellisMatrix

FEW = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 32}
"""Up to so many rows of activations of a dtype, the packed product is the faster one on two cores."""

FEW_ON_CUDA = 16
"""The same on a CUDA device, where it has not been measured: the kernels are made for so many."""

BLOCK = 1 << 19
"""Numbers that are dequantized at a time: what a core's second cache holds."""

BLOCK_ON_CUDA = 1 << 24
"""The same on a CUDA device: enough to keep it busy."""


def describe(spec: MatrixSpec) -> str:
    """The description of a matrix as the operator takes it: equal for layers of equal layout."""
    return json.dumps(replace(spec, digest="").to_json())


def linear(x: torch.Tensor, stored: list[torch.Tensor], description: str, bias: torch.Tensor | None) -> torch.Tensor:
    """X times the transposed matrix, plus bias; what ``F.linear`` makes of the dequantized matrix, but for rounding.

    For a few rows the sums are those of :func:`quantrature.ops.matvec`, within its bound, and are rounded to the dtype
    of ``x`` once, after the bias; otherwise they are torch's own, of the weights in the dtype of ``x`` (in float32 for
    float16). Those of trellis codes are in float32 for any number of rows. The gradient with respect to ``x`` is taken
    in float32.

    Args:
        x: float32, bfloat16 or float16, of shape (..., in_features).
        stored: the tensors of the matrix, in the order of its layout.
        description: what :func:`describe` makes of its description.
        bias: of shape (out_features,), or ``None``.

    Returns:
        Of shape (..., out_features), in the dtype of ``x``.

    Raises:
        InvalidArgumentError: for another dtype or length of ``x``.
    """
    result: torch.Tensor = torch.ops.quantrature.linear(x, stored, description, bias)
    return result


@functools.cache
def spec_of(description: str) -> MatrixSpec:
    """The reverse of :func:`describe`."""
    return MatrixSpec.from_json(json.loads(description))


@dataclass(frozen=True)
class RotatedMatrix:
    """A matrix in a rotated basis ready to be multiplied.

    Attributes:
        dense: the matrix.
        input_scale: what each input is multiplied by on its way into it; ``None`` for ones.
        residuals: sparse float32, (out_features, in_features): what outliers add to the dense form; ``None`` without.
    """

    dense: TrellisMatrix
    input_scale: torch.Tensor | None
    residuals: torch.Tensor | None

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> RotatedMatrix:
        """Prepare a matrix whose dense form is in a rotated basis."""
        assert isinstance(matrix.dense, TrellisMatrix)
        outliers = matrix.outliers
        if outliers is None or outliers.nnz == 0:
            return cls(matrix.dense, matrix.input_scale, None)
        cols = matrix.dense.shape[1]
        places = outliers.positions()
        values = outliers.values.float() - replace(matrix, outliers=None).dequantize("float32").view(-1)[places]
        indices = torch.stack([places // cols, places % cols])
        residuals = torch.sparse_coo_tensor(indices, values, matrix.dense.shape, check_invariants=True).coalesce()
        return cls(matrix.dense, matrix.input_scale, residuals)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """X times the transposed matrix; float32 (n, in_features) to (n, out_features)."""
        y = self.dense.product(x if self.input_scale is None else x * self.input_scale)
        return y if self.residuals is None else y + torch.sparse.mm(self.residuals, x.mT).mT

    def transposed_product(self, y: torch.Tensor) -> torch.Tensor:
        """Y times the matrix; float32 (n, out_features) to (n, in_features)."""
        x = self.dense.transposed_product(y)
        if self.input_scale is not None:
            x = x * self.input_scale
        return x if self.residuals is None else x + torch.sparse.mm(self.residuals.mT, y.mT).mT


@dataclass(frozen=True)
class _Prepared:
    """A matrix ready to be multiplied.

    Attributes:
        versions: of the stored tensors, which tell whether something was written to them since.
        matrix: with scales that need no dequantizing of their own.
        packed: the same for the packed product; ``None`` for a form in a rotated basis.
        rotated: the same for the product in a rotated basis; ``None`` for other forms.
    """

    versions: tuple[int, ...]
    matrix: QuantizedMatrix
    packed: PackedMatrix | None = None
    rotated: RotatedMatrix | None = None

    def blocks(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the matrix, and the same dequantized."""
        rows, cols = self.matrix.dense.shape
        step = max(1, (BLOCK if device.type == "cpu" else BLOCK_ON_CUDA) // cols)
        for begin in range(0, rows, step):
            block = slice(begin, min(rows, begin + step))
            yield block, self.matrix.dequantize(str(dtype).removeprefix("torch."), block)


# What is prepared lives as long as the tensor with the codes, and casts, moves and loading make another tensor.
_prepared: Any = WeakIdKeyDictionary()


def prepare(stored: Sequence[torch.Tensor], description: str) -> _Prepared:
    """The matrix of some stored tensors, made ready once for as long as its codes live."""
    versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in stored)
    found: _Prepared | None = _prepared.get(stored[0])
    if found is None or found.versions != versions:
        found = _made(stored, description, versions)
        _prepared[stored[0]] = found
    return found


def _made(stored: Sequence[torch.Tensor], description: str, versions: tuple[int, ...]) -> _Prepared:
    spec = spec_of(description)
    # Not the tensors themselves: the codes would be kept alive by what is to die with them.
    names = (name for name, _, _ in spec.layout())
    matrix = spec.matrix({name: tensor.data for name, tensor in zip(names, stored, strict=True)})
    if isinstance(matrix.dense, TrellisMatrix):
        return _Prepared(versions, matrix, rotated=RotatedMatrix.of(matrix))
    assert isinstance(matrix.dense, QuantizedTensor | CodebookTensor)
    packed = PackedMatrix.of(matrix.dense, _beside_the_codes(matrix))
    return _Prepared(versions, replace(matrix, dense=packed.dense), packed)


def _beside_the_codes(matrix: QuantizedMatrix) -> SparseCSR | None:
    """The outliers in units of the dense form, whose inputs are scaled where the outliers' are not."""
    outliers, scale = matrix.outliers, matrix.input_scale
    if outliers is None or scale is None:
        return outliers
    return replace(outliers, values=outliers.values.float() / scale.float()[outliers.columns.long()])


def _check(x: torch.Tensor, cols: int) -> None:
    if x.dtype not in FEW:
        raise InvalidArgumentError(f"[linear] x must be float32, float16 or bfloat16: got dtype={x.dtype}")
    if x.ndim == 0 or x.shape[-1] != cols:
        raise InvalidArgumentError(f"[linear] x must have shape (..., {cols}): got shape={tuple(x.shape)}")


def _product(x: torch.Tensor, stored: list[torch.Tensor], description: str, bias: torch.Tensor | None) -> torch.Tensor:
    ready = prepare(stored, description)
    rows, cols = ready.matrix.dense.shape
    _check(x, cols)
    # Allocated as it is given back: models add to results in place, which autograd forbids for views.
    result = x.new_empty((*x.shape[:-1], rows))
    x = x.reshape(-1, cols)
    if len(x) == 0:
        return result
    out = result.view(-1, rows)
    if ready.rotated is not None:
        y = ready.rotated.product(x.float())
        out.copy_(y if bias is None else y + bias)
    elif ready.packed is not None and len(x) <= (FEW[x.dtype] if x.device.type == "cpu" else FEW_ON_CUDA):
        scale = ready.matrix.input_scale
        x = (x if scale is None else x.float() * scale).contiguous()
        if bias is None and scale is None:
            ready.packed.matmul(x, out)
        else:
            y = ready.packed.matvec(x)
            out.copy_(y if bias is None else y.add_(bias))
    else:
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        left = x.to(dtype)
        for block, weight in ready.blocks(dtype, x.device):
            out[:, block] = torch.nn.functional.linear(left, weight, None if bias is None else bias[block].to(dtype))
    return result


def _gradient_product(gradient: torch.Tensor, stored: list[torch.Tensor], description: str) -> torch.Tensor:
    ready = prepare(stored, description)
    rows, cols = ready.matrix.dense.shape
    left = gradient.reshape(-1, rows).float()
    if ready.rotated is not None:
        total = ready.rotated.transposed_product(left)
    else:
        total = left.new_zeros(len(left), cols)
        for block, weight in ready.blocks(torch.float32, left.device):
            total.addmm_(left[:, block], weight)
    result: torch.Tensor = total.to(gradient.dtype).view(*gradient.shape[:-1], cols)
    return result


def _fake(x: torch.Tensor, stored: list[torch.Tensor], description: str, bias: torch.Tensor | None) -> torch.Tensor:
    rows, cols = spec_of(description).shape
    _check(x, cols)
    return x.new_empty((*x.shape[:-1], rows))


def _fake_gradient(gradient: torch.Tensor, stored: list[torch.Tensor], description: str) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], spec_of(description).shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, stored, ctx.description, bias = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(*stored)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    of_x = of_bias = None
    stored = list(ctx.saved_tensors)
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.quantrature.linear_gradient(gradient, stored, ctx.description)
    if ctx.bias is not None and ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias)
    return of_x, [None] * len(stored), None, of_bias


# Or torch's threads, which spin for a while after each of its own products, would have to be fought for.
_C.run_on_openmp_of(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))

library = torch.library.Library("quantrature", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
library.define("linear(Tensor x, Tensor[] stored, str description, Tensor? bias) -> Tensor", tags=_tags)
library.define("linear_gradient(Tensor gradient, Tensor[] stored, str description) -> Tensor", tags=_tags)
for _device in ("CPU", "CUDA"):
    library.impl("linear", _product, _device)
    library.impl("linear_gradient", _gradient_product, _device)
torch.library.register_fake("quantrature::linear", _fake, lib=library)
torch.library.register_fake("quantrature::linear_gradient", _fake_gradient, lib=library)
torch.library.register_autograd("quantrature::linear", _backward, setup_context=_keep, lib=library)
