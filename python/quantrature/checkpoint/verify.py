"""Compare a quantized folder with the original model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._C import QuantratureError
from ..models import Linears, find_linears, load_model
from ..models.folding import fold, folds_of
from ..nn import QuantLayer, quantized_layers
from .carried import carried_tensors, read_carried, source_tensors

LEAST_CORRELATION = 0.5
"""Smallest correlation between a quantized matrix and its original. Even 1 bit reaches it; unrelated matrices have
almost none."""


@dataclass(frozen=True)
class MatrixComparison:
    """Comparison of a quantized matrix w~ with the original matrix w.

    Attributes:
        relative_error: Frobenius norm of w~ - w divided by that of w.
        largest_error: largest absolute error of a weight.
        correlation: cosine similarity of w~ and w: their inner product divided by the product of their norms.
        outliers_equal: whether the outliers equal the original weights bit for bit; true if there are none.
    """

    relative_error: float
    largest_error: float
    correlation: float
    outliers_equal: bool

    @property
    def fits(self) -> bool:
        """Whether the matrix can have been quantized from the original."""
        return self.outliers_equal and self.correlation >= LEAST_CORRELATION


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        modules: matrix name to its comparison.
        changed: names of other tensors that differ from the original ones in any bit. Tensors that are not part of
            the model but saved with it are checked, too.
    """

    modules: Mapping[str, MatrixComparison]
    changed: tuple[str, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of matrices and tensors that cannot come from the original model."""
        return (*(name for name, found in self.modules.items() if not found.fits), *self.changed)


def verify(
    folder: str | os.PathLike[str], source: str | os.PathLike[str], trust_remote_code: bool = False
) -> Verification:
    """Compare a quantized folder with the original model: dequantized matrices by error, other tensors exactly.

    If scales were folded into the quantized model, they are folded into the original first.

    Args:
        folder: the quantized folder.
        source: the original model: folder, or id on the Hugging Face Hub.
        trust_remote_code: run Python code from the model's folder, as in transformers.

    Raises:
        InvalidArgumentError, QuantratureError: as for :func:`quantrature.models.load_model`; if the stored tensors of
            a matrix are damaged, or the original has no such matrix of this shape. The message names the matrix.
    """
    quantized = load_model(folder, trust_remote_code=trust_remote_code)
    layers = quantized_layers(quantized)
    if not layers:
        raise QuantratureError(
            f"[verify] {Path(folder)} holds no quantized matrix; give a folder that quantrature wrote"
        )
    original = load_model(source, trust_remote_code=trust_remote_code)
    linears = find_linears(original, embeddings=True, watch=False)
    fold(original, linears, folds_of(quantized))
    modules = {}
    for name, layer in layers.items():
        weight = linears.find(name).weight
        if layer.spec.shape != tuple(weight.shape):
            raise QuantratureError(
                f"[verify] {name} has a different shape in the original model: {tuple(weight.shape)}"
            )
        modules[name] = compare(layer, weight)
    changed = _changed(quantized, original, linears, layers)
    return Verification(modules, (*changed, *_changed_carried(quantized, original)))


def compare(layer: QuantLayer, weight: torch.Tensor) -> MatrixComparison:
    """Compare one quantized matrix with the original weight, (out_features, in_features)."""
    matrix = layer.matrix
    outliers = matrix.outliers
    equal = outliers is None or torch.equal(
        outliers.values, weight.flatten()[outliers.positions()].to(outliers.values.dtype)
    )
    return compare_values(matrix.dequantize("float32"), weight, equal)


def compare_values(values: torch.Tensor, weight: torch.Tensor, outliers_equal: bool = True) -> MatrixComparison:
    """Compare dequantized values with the original weight, both (out_features, in_features)."""
    image, source = values.double(), weight.double()
    norm, inner = float(source.norm()), float((image * source).sum())
    error = image - source
    norms = norm * float(image.norm())
    return MatrixComparison(
        float(error.norm()) / norm if norm else math.nan,
        float(error.abs().max()),
        inner / norms if norms else float(not error.any()),
        outliers_equal,
    )


def _changed_carried(quantized: Any, original: Any) -> tuple[str, ...]:
    """Return the tensors outside the model that are missing or differ from the original ones in any bit."""
    ours, theirs = quantized.hf_quantizer.carried, carried_tensors(original, source_tensors(original))
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        (a, b) = (read_carried({name: files[name]}) if name in files else {} for files in (ours, theirs))
        if not (a and b and a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])):
            found.append(name)
    return tuple(found)


def _changed(quantized: Any, original: Any, linears: Linears, layers: Mapping[str, QuantLayer]) -> tuple[str, ...]:
    stored = {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_buffers()}
    ours = {name: tensor for name, tensor in quantized.state_dict().items() if name not in stored}
    # Of an expert that stayed dense while others were quantized, the source has no parameter of its own.
    theirs = original.state_dict() | {f"{m.name}.weight": m.weight for m in linears if m.expert is not None}
    return tuple(name for name, tensor in ours.items() if name not in theirs or not torch.equal(tensor, theirs[name]))
