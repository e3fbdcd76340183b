"""Replace the matrices of a model by quantized layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .. import ops
from .._C import InvalidArgumentError, cuda_device_count
from ..checkpoint.declaration import tell
from ..models import LinearWeight
from ..models.folding import Fold
from ..nn import install
from ..nn.experts import part_with_memory
from ..packed import MatrixSpec, QuantizedMatrix


def check_weight(name: str, weight: torch.Tensor, caller: str = "quantize") -> None:
    """Raise an error for a matrix of another dtype or with a NaN or infinity, before the model is changed."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidArgumentError(f"[{caller}] {name} must be float32, float16 or bfloat16: got dtype={weight.dtype}")
    straight = weight if weight.is_contiguous() else weight.mT
    if not (straight.is_cuda and cuda_device_count()[0]):
        straight = straight.cpu()
    if not math.isfinite(float(ops.moments(straight.contiguous()).mean)):
        raise InvalidArgumentError(f"[{caller}] {name} must hold finite numbers: it has a NaN or infinity")


def put(model: torch.nn.Module, linear: LinearWeight, matrix: QuantizedMatrix, device: Any = None) -> MatrixSpec:
    """Replace the layer of a matrix by a quantized layer.

    Args:
        model: the model, which is changed in place.
        linear: the matrix.
        matrix: its quantized form.
        device: device of the quantized layer; by default that of the dense weight.

    Returns:
        The description of the matrix for config.json.
    """
    device = linear.weight.device if device is None else device
    layer = install(model, linear, MatrixSpec.of(matrix))
    layer.store(matrix, device)
    return layer.spec


def declare(model: torch.nn.Module, specs: dict[str, MatrixSpec], folds: Iterable[Fold] = ()) -> None:
    """Free the memory of the dense weights, and record in the model that it is quantized, for transformers."""
    part_with_memory(model)
    tell(model, specs, tuple(folds))
