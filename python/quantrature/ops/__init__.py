"""Low-level operations of the C++ core, on NumPy arrays and torch tensors, without copies."""

from ._allocation import KnapsackChoice, multiple_choice_knapsack
from ._codebook import CODEBOOKS, CodebookTensor
from ._gguf import GGUF_TYPES, GgufType, gguf_dequantize, gguf_quantize
from ._gptq import Feedback, GptqFactor, gptq, gptq_factor
from ._grid import QuantizedTensor, dequantize, quantize
from ._hadamard import hadamard, hadamard_order, random_signs
from ._hessian import hessian_accumulate
from ._integral import interpolate, pqi_accumulate, pqi_finalize, pqi_sum
from ._kmeans import kmeans_1d
from ._matvec import PackedMatrix, matvec
from ._moments import Moments, kurtosis, moments
from ._outliers import SparseCSR, extract_outliers
from ._packing import groups_in_row, pack, row_bytes, unpack
from ._topk import topk
from ._trellis import Trellis, trellis_dequantize, trellis_matvec, trellis_quantize

__all__ = [
    "CODEBOOKS",
    "GGUF_TYPES",
    "CodebookTensor",
    "Feedback",
    "GgufType",
    "GptqFactor",
    "KnapsackChoice",
    "Moments",
    "PackedMatrix",
    "QuantizedTensor",
    "SparseCSR",
    "Trellis",
    "dequantize",
    "extract_outliers",
    "gguf_dequantize",
    "gguf_quantize",
    "gptq",
    "gptq_factor",
    "groups_in_row",
    "hadamard",
    "hadamard_order",
    "hessian_accumulate",
    "interpolate",
    "kmeans_1d",
    "kurtosis",
    "matvec",
    "moments",
    "multiple_choice_knapsack",
    "pack",
    "pqi_accumulate",
    "pqi_finalize",
    "pqi_sum",
    "quantize",
    "random_signs",
    "row_bytes",
    "topk",
    "trellis_dequantize",
    "trellis_matvec",
    "trellis_quantize",
    "unpack",
]
