"""What an export target is: a format of another engine, and how a quantized matrix becomes part of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..ops import QuantizedTensor
from ..packed import CodebookSpec, GgufSpec, GridSpec, MatrixSpec, QuantizedMatrix
from .grid import Floats, Grid, has_integer_zeros, scale_dtype

Encoded = Mapping[str, torch.Tensor]
"""Tensors of one matrix, by the names that follow the name of the matrix, such as ``scales``."""


ROUNDING = 1e-7
"""Largest relative squared error that rounding may add without ``allow_refit``. Rounding scales to float16 adds about
2e-8; rounding them to bfloat16 adds 1e-6 and more."""


@dataclass(frozen=True)
class Setting:
    """How a matrix is stored, as far as targets differ in it.

    Attributes:
        shape: rows and columns.
        bits: bits of a code.
        group_size: columns of a group; -1 for the whole row.
        sym: whether the grid is symmetric.
        integer_zeros: whether all zero points are codes: whole numbers from 0 to ``2**bits - 1``.
        scale_dtype: dtype of the scales, "float16", "bfloat16" or "float32".
        kind: "grid", "codebook", "trellis" or "gguf".
        outliers: number of weights that are stored unquantized.
        input_scale: whether the inputs are multiplied by a scale that is stored with the matrix.
        embedding: whether the matrix is the table of a token embedding.
        form: short form of the stored matrix, such as ``b4g64 sym``, for messages; in the target gguf the type of its
            blocks, such as ``Q4_K``.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    sym: bool = False
    integer_zeros: bool = False
    scale_dtype: str = "float16"
    kind: str = GridSpec.kind
    outliers: int = 0
    input_scale: bool = False
    embedding: bool = False
    form: str = ""

    @classmethod
    def of(cls, spec: MatrixSpec, matrix: QuantizedMatrix, embedding: bool = False) -> Setting:
        """Return the setting of a stored matrix, of which ``spec`` is the description."""
        dense, q = spec.dense, matrix.dense
        beside: dict[str, Any] = {
            "kind": dense.kind,
            "outliers": spec.outliers,
            "input_scale": spec.input_scale is not None,
            "embedding": embedding,
            "form": dense.setting,
        }
        if not isinstance(q, QuantizedTensor):
            return cls(spec.shape, dense.bits, -1, **beside)
        return cls(spec.shape, q.bits, q.group_size, q.sym, has_integer_zeros(q), scale_dtype(q), **beside)

    @property
    def group(self) -> int:
        """Columns of a group, the last one of a row apart."""
        cols = self.shape[1]
        return cols if self.group_size == -1 else min(self.group_size, cols)

    @property
    def groups(self) -> int:
        """Groups of the matrix."""
        return self.shape[0] * -(-self.shape[1] // self.group)

    def largest_group(self, sizes: Iterable[int]) -> int | None:
        """Return the largest of these group sizes into which every group of the matrix can be divided."""
        cols = self.shape[1]
        whole = cols if self.group == cols else math.gcd(self.group, cols)
        return max((size for size in sizes if whole % size == 0), default=None)

    @property
    def beyond_a_grid(self) -> str:
        """What the matrix has besides a uniform grid, and the nearest setting without it; empty for a grid alone."""
        if self.kind != GridSpec.kind:
            named = {CodebookSpec.kind: "a codebook", GgufSpec.kind: "blocks of a GGUF type"}
            what = named.get(self.kind, f"{self.kind} codes")
            return f"{what} ({self.form}); quantize it as b{self.bits}g64 with rtn, mse or gptq"
        if self.outliers:
            return f"{self.outliers} outliers; quantize it as {self.form} with outlier_fraction 0"
        if self.input_scale:
            return f"an input_scale that is not folded; quantize it as {self.form} with rtn, mse or gptq"
        return ""


@dataclass(frozen=True)
class Fit:
    """How a target holds a matrix.

    Attributes:
        stored: the setting in the target; ``None`` if it cannot hold the matrix.
        reason: if it cannot, why, and the nearest setting that it can; otherwise why the matrix needs a refit, that is
            other codes and zero points; empty if neither.
    """

    stored: Setting | None
    reason: str = ""

    @property
    def refits(self) -> bool:
        """Whether the matrix must be quantized again."""
        return self.stored is not None and bool(self.reason)


@dataclass(frozen=True)
class Content:
    """What is written for a target, by the names that tensors have in checkpoints of transformers.

    Attributes:
        config: content of config.json, without ``quantization_config``.
        settings: name of a quantized matrix to its setting in the target.
        encoded: name of a quantized matrix to its tensors.
        tensors: all other tensors.
        files: files to copy, the tokenizer's and others: path in the new folder to path of the file.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Setting]
    encoded: Mapping[str, Encoded]
    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Weights:
    """Dense weights that were read from an exported folder, by the names in checkpoints of transformers.

    Attributes:
        quantized: the quantized matrices, dequantized, float32.
        others: all other tensors, as they are stored.
    """

    quantized: dict[str, torch.Tensor] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def _takes_all(config: Mapping[str, Any], names: Collection[str], files: Mapping[str, Path]) -> None:
    """Take every model."""


@dataclass(frozen=True)
class Target:
    """A format of another engine.

    Attributes:
        name: what users call it.
        summary: one line about it.
        fit: how the target holds a matrix of this setting.
        encode: the tensors of a matrix. A grid, :class:`Grid`, has the bits and the group size of the setting, which is
            ``stored`` of the matrix's :class:`Fit`. A matrix of another kind, which ``fit`` takes, is its stored form.
        decode: the values that the engine computes from these tensors, float32; the reverse of ``encode``.
        nbytes: bytes of these tensors.
        write: writes a folder.
        owns: whether a folder with this config.json is of the target.
        read: reads such a folder.
        scheme: what the engine's configuration says of a matrix.
        alike: a key for the name of a matrix. Matrices with the same key must have the same scheme.
        fuses_alike: whether engines that read the target fuse q, k and v, and gate and up, if they are alike.
        check: raises an error if the target does not take a model with this config.json, these names of tensors and
            these files, before any work is done.
        rounding: largest relative squared error that rounding may add to a matrix without ``allow_refit``.
    """

    name: str
    summary: str
    fit: Callable[[Setting], Fit]
    encode: Callable[[Any, Setting], Encoded]
    decode: Callable[[Encoded, Setting], Floats]
    nbytes: Callable[[Setting], int]
    write: Callable[[Content, Path], None]
    owns: Callable[[Path, Mapping[str, Any]], bool]
    read: Callable[[Path], Weights]
    scheme: Callable[[Setting], Any]
    alike: Callable[[str], str] = str
    fuses_alike: bool = False
    check: Callable[[Mapping[str, Any], Collection[str], Mapping[str, Path]], None] = _takes_all
    rounding: float = ROUNDING

    def __str__(self) -> str:
        """Return the summary, for ``quantrature list targets``."""
        return self.summary


def fitted(form: Any, stored: Setting) -> Any:
    """Return the same values with the bits and the group size of a setting; a form that is no grid stays as it is."""
    if not isinstance(form, Grid):
        return form
    grid = form
    if not stored.sym:
        grid = grid.asymmetric()
    return grid.in_groups_of(stored.group).in_bits(stored.bits)


def refused(target: str, reason: str) -> Fit:
    """Return that a target cannot hold a matrix."""
    return Fit(None, f"{target} {reason}")


def held(setting: Setting, reason: str = "", **changed: Any) -> Fit:
    """Return that a target holds a matrix, with some fields of the setting changed."""
    return Fit(replace(setting, **changed), reason)
