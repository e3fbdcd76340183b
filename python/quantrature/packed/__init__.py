"""Storage formats of quantized matrices: each has a JSON description (spec) and the tensors that the spec names."""

from .codebook import CodebookSpec
from .dense import DenseForm, DenseSpec, Layout
from .gguf import GgufMatrix, GgufSpec
from .grid import GridSpec
from .matrix import KINDS, OUTLIERS, MatrixSpec, digest
from .quantized import QuantizedMatrix
from .trellis import TrellisMatrix, TrellisSpec

__all__ = [
    "KINDS",
    "OUTLIERS",
    "CodebookSpec",
    "DenseForm",
    "DenseSpec",
    "GgufMatrix",
    "GgufSpec",
    "GridSpec",
    "Layout",
    "MatrixSpec",
    "QuantizedMatrix",
    "TrellisMatrix",
    "TrellisSpec",
    "digest",
]
