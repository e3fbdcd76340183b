"""Run matrix-vector products in the llama.cpp library that comes with the package llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TYPES = {"q4_0": 2, "q2_K": 10, "q3_K": 11, "q4_K": 12}
"""Values of the enum ``ggml_type`` for the formats."""


def _library(part: str) -> ctypes.CDLL:
    import llama_cpp

    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)


def _function(library: ctypes.CDLL, called: str, result: Any, *arguments: Any) -> Any:
    found = getattr(library, called)
    found.restype, found.argtypes = result, arguments
    return found


def quantizer(kind: str) -> Callable[[int, int, int, int], None]:
    """Return a function that quantizes float32 rows on one thread.

    Its arguments are the addresses of source and target, the number of rows, and the number of columns.
    """
    base, pointer, size = _library("base"), ctypes.c_void_p, ctypes.c_int64
    _function(base, "ggml_quantize_init", None, ctypes.c_int)(TYPES[kind])
    quantize = _function(
        base, "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, size, size, size, pointer
    )
    return lambda source, target, rows, cols: quantize(TYPES[kind], source, target, 0, rows, cols, None)


class Products:
    """A ggml graph that multiplies several matrices, each by its own vector.

    llama.cpp rounds the vectors to 8 bits, and has no outliers.

    Args:
        kind: format of the quantized matrices, a name in ``TYPES``.
        weights: matrices, float32 (rows, cols); they are quantized here.
        vectors: one vector for each matrix, float32 (cols,).
        threads: number of threads.
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
        """Compute all products."""
        self._reset(self._scratch)  # each call allocates its buffers in this context
        if self._compute(self._scratch, self._graph, self._threads):
            raise RuntimeError("ggml did not compute")

    def result(self, number: int) -> torch.Tensor:
        """Return the product of one matrix and its vector."""
        data, rows = self._outputs[number]
        return torch.tensor((ctypes.c_float * rows).from_address(data)[:])
