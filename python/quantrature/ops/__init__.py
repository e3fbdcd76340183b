"""The low-level operations, on NumPy arrays and CPU torch tensors, without copies."""

from ._gptq import Feedback, gptq
from ._grid import QuantizedTensor, dequantize, quantize
from ._hessian import hessian_accumulate
from ._integral import interpolate, pqi_accumulate, pqi_finalize, pqi_sum
from ._kmeans import kmeans_1d
from ._matvec import PackedMatrix, matvec
from ._moments import Moments, kurtosis, moments
from ._outliers import SparseCSR, extract_outliers
from ._packing import pack, row_bytes, unpack
from ._topk import topk

__all__ = [
    "Feedback",
    "Moments",
    "PackedMatrix",
    "QuantizedTensor",
    "SparseCSR",
    "dequantize",
    "extract_outliers",
    "gptq",
    "hessian_accumulate",
    "interpolate",
    "kmeans_1d",
    "kurtosis",
    "matvec",
    "moments",
    "pack",
    "pqi_accumulate",
    "pqi_finalize",
    "pqi_sum",
    "quantize",
    "row_bytes",
    "topk",
    "unpack",
]
