"""Mat-vecs by the library of llama.cpp that comes with llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TYPES = {"q4_0": 2, "q2_K": 10, "q3_K": 11, "q4_K": 12}
"""The numbers that ggml's header gives to its formats."""


def _library(part: str) -> ctypes.CDLL:
    import llama_cpp

    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)


def _function(library: ctypes.CDLL, called: str, result: Any, *arguments: Any) -> Any:
    found = getattr(library, called)
    found.restype, found.argtypes = result, arguments
    return found


def quantizer(kind: str) -> Callable[[int, int, int, int], None]:
    """Quantizes rows of float32 at one address to another: (source, target, rows, cols), one thread."""
    base, pointer, size = _library("base"), ctypes.c_void_p, ctypes.c_int64
    _function(base, "ggml_quantize_init", None, ctypes.c_int)(TYPES[kind])
    quantize = _function(
        base, "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, size, size, size, pointer
    )
    return lambda source, target, rows, cols: quantize(TYPES[kind], source, target, 0, rows, cols, None)


class Products:
    """A graph of the products of some matrices and a vector each, as llama.cpp runs it.

    It rounds the vectors to 8 bits, and has no outliers.

    Args:
        kind: a name of ``TYPES``.
        weights: float32, of shape (rows, cols); quantized here.
        vectors: float32, of shape (cols,), one for each matrix.
        threads: that multiply.
    """

    def __init__(self, kind: str, weights: list[torch.Tensor], vectors: list[torch.Tensor], threads: int) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        base, cpu = _library("base"), _library("cpu")

        class Parameters(ctypes.Structure):
            _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool))

        _function(cpu, "ggml_cpu_init", None)()
        matrix_of = _function(base, "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, size, size)
        vector_of = _function(base, "ggml_new_tensor_1d", pointer, pointer, ctypes.c_int, size)
        data_of = _function(base, "ggml_get_data", pointer, pointer)
        product_of = _function(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        expand = _function(base, "ggml_build_forward_expand", None, pointer, pointer)
        quantize = quantizer(kind)
        memory = sum(w.numel() for w in weights) + (64 << 20)
        new_context = _function(base, "ggml_init", pointer, Parameters)
        self._context, self._scratch = (new_context(Parameters(n, None, False)) for n in (memory, 16 << 20))
        self._reset = _function(base, "ggml_reset", None, pointer)
        self._graph = _function(base, "ggml_new_graph", pointer, pointer)(self._context)
        self._compute = _function(cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int)
        self._threads, self._outputs = threads, []
        for w, x in zip(weights, vectors, strict=True):
            rows, cols = w.shape
            matrix, vector = matrix_of(self._context, TYPES[kind], cols, rows), vector_of(self._context, 0, cols)
            quantize(w.contiguous().data_ptr(), data_of(matrix), rows, cols)
            ctypes.memmove(data_of(vector), x.contiguous().data_ptr(), 4 * cols)
            product = product_of(self._context, matrix, vector)
            expand(self._graph, product)
            self._outputs.append((data_of(product), rows))

    def __call__(self) -> None:
        """All products."""
        self._reset(self._scratch)  # every call takes its buffers from there
        if self._compute(self._scratch, self._graph, self._threads):
            raise RuntimeError("ggml did not compute")

    def result(self, number: int) -> torch.Tensor:
        """One product."""
        data, rows = self._outputs[number]
        return torch.tensor((ctypes.c_float * rows).from_address(data)[:])
