"""Compare the blocks that gguf_quantize fits with the blocks of ggml, the library of llama.cpp.

    python -m bench.quality.gguf_fit MODEL [MODEL ...] --text TEXT [--tokens 2048] [--rows 512] [--output bench/results]

The matrices are those of the first, a middle and the last layer of each model, and a matrix of random numbers of
Student's t distribution with 5 degrees of freedom. The weights of the columns are the mean squares of the inputs on
the text, as an importance matrix of llama.cpp has them; for the random matrix, they are log-normal. ggml is taken from
the package xllamacpp. Both work on one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import quantrature
from bench.harness.heading import heading
from quantrature import models
from quantrature.ops import GGUF_TYPES, gguf_dequantize, gguf_quantize
from quantrature.ops import GgufType as Type
from quantrature.text import token_windows


def ggml_quantizer() -> Callable[[np.ndarray, Type, np.ndarray | None], np.ndarray]:
    """Return a function that quantizes a matrix in ggml, with the weights of the columns or without."""
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("*.so")
    ggml, pointer, size = ctypes.CDLL(str(library)), ctypes.c_void_p, ctypes.c_int64
    chunk = ggml.ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, (ctypes.c_int, pointer, pointer, size, size, size, pointer)

    def quantize(w: np.ndarray, of: Type, weights: np.ndarray | None) -> np.ndarray:
        ggml.ggml_quantize_init(of.number)
        rows, cols = w.shape
        out = np.empty((rows, cols // of.block_size * of.block_bytes), np.uint8)
        given = None if weights is None else weights.ctypes.data
        chunk(of.number, w.ctypes.data, out.ctypes.data, 0, rows, cols, given)
        return out

    return quantize


def weights_of_ggml(w: np.ndarray, name: str, weights: np.ndarray) -> np.ndarray | None:
    """Return the weights of the elements whose squared errors ggml minimizes, given weights of the columns.

    ``None`` for types that ggml quantizes without weights. ggml multiplies by ``sqrt(variance + w**2)``, with the
    variance over the row or over the block, doubled for some types.
    """
    if name == "Q8_0":
        return None
    if name == "Q6_K":
        return np.ascontiguousarray(np.broadcast_to(weights, w.shape))
    size = GGUF_TYPES[name].block_size if name.endswith("K") or name == "IQ4_NL" else w.shape[1]
    variance = np.square(w.reshape(len(w), -1, size)).mean(-1, keepdims=True)
    variance = variance * (2 if name in ("Q3_K", "Q4_K", "Q5_K", "IQ4_NL") else 1)
    return weights * np.sqrt(np.broadcast_to(variance, (len(w), w.shape[1] // size, size)).reshape(w.shape) + w * w)


def matrices(folder: str, text: str, tokens: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield matrices of three layers of a model, and the mean squares of their inputs on the text."""
    model = models.load_model(folder, "float32")
    layers = sorted({int(part) for name, _ in model.named_modules() for part in name.split(".") if part.isdigit()})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".{layer}." in name for layer in chosen)
    }
    squares: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares[name] = inputs[0].detach().flatten(0, -2).square().mean(0)

        return hook

    for name, module in linear.items():
        module.register_forward_pre_hook(remember(name))
    windows = token_windows(text, tokenizer=models.load_tokenizer(folder), seqlen=tokens, max_tokens=tokens)
    with torch.no_grad():
        model(torch.as_tensor(windows[:1]))
    for name, module in linear.items():
        weight = module.weight.detach().float()[:rows]
        yield np.ascontiguousarray(weight.numpy()), np.ascontiguousarray(squares[name].numpy())


def random_matrix(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random numbers with heavy tails, and log-normal weights of the columns."""
    rng = np.random.default_rng(0)
    w = rng.standard_t(5, (rows, 2048)).astype(np.float32)
    return w, np.exp(rng.standard_normal(2048)).astype(np.float32)


def table(source: list[tuple[np.ndarray, np.ndarray]], theirs: Callable[..., np.ndarray]) -> Iterator[str]:
    """Yield the lines of the table of one source."""
    yield "| type | bits | matrices | equal weights | weights of columns | ggml's weights | seconds | seconds of ggml |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, of in GGUF_TYPES.items():
        fitting = [(w, weights) for w, weights in source if w.shape[1] % of.block_size == 0]
        if not fitting:
            continue
        logs: list[list[float]] = [[], [], []]
        seconds = [0.0, 0.0]
        for w, weights in fitting:
            start = time.process_time()
            weighted = gguf_quantize(w, name, weights)
            between = time.process_time()
            of_ggml = theirs(w, of, weights)
            seconds = [seconds[0] + between - start, seconds[1] + time.process_time() - between]

            def error(data: np.ndarray, by: np.ndarray | float, w: np.ndarray = w, name: str = name) -> float:
                apart = gguf_dequantize(data, name, w.shape[1]).astype(np.float64) - w
                return float((by * apart**2).sum())

            logs[0].append(math.log(error(gguf_quantize(w, name), 1.0) / error(theirs(w, of, None), 1.0)))
            logs[1].append(math.log(error(weighted, weights) / error(of_ggml, weights)))
            inner = weights_of_ggml(w, name, weights)
            if inner is not None:
                logs[2].append(math.log(error(gguf_quantize(w, name, inner), inner) / error(of_ggml, inner)))
        ratios = " | ".join(f"{math.exp(sum(log) / len(log)):.3f}" if log else "" for log in logs)
        million = sum(w.size for w, _ in fitting) / 1e6
        yield (
            f"| {name} | {8 * of.block_bytes / of.block_size:g} | {len(fitting)} | {ratios} | "
            f"{seconds[0] / million:.2f} | {seconds[1] / million:.2f} |"
        )


def main() -> None:
    """Fit the blocks, compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=512, help="number of rows that are taken of each matrix")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sources = {Path(m).name: list(matrices(m, options.text, options.tokens, options.rows)) for m in options.models}
    sources["random numbers"] = [random_matrix(options.rows)]
    quantrature.set_num_threads(1)
    theirs = ggml_quantizer()
    lines = [
        "# Errors of fitted GGUF blocks, over those of ggml",
        "",
        f"{heading('bench.quality.gguf_fit', 1)}.",
        "",
        "Each ratio is the squared error that `gguf_quantize` leaves, divided by the one that `ggml_quantize_chunk`",
        "(package xllamacpp) leaves: the geometric mean over the matrices. Below 1, `gguf_quantize` is better.",
        "",
        "- Equal weights: neither gets weights. The error is not weighted. Without weights, ggml takes the range of",
        "  each block (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), or weighs errors by the sizes of the numbers (the others).",
        "- Weights of columns: both get the mean squares of the inputs. The error is weighted by these.",
        "- ggml's weights: ggml multiplies the weights of the columns by sqrt(variance + w^2), except for Q6_K, and",
        "  minimizes the error weighted by the product. Here `gguf_quantize` gets the product, too, and the error is",
        "  weighted by it.",
        "",
        "ggml quantizes Q8_0 without weights. Seconds: processor time for a million weights, with weights of columns.",
    ]
    for name, source in sources.items():
        lines += ["", f"## {name}", ""]
        print(f"## {name}")
        for line in table(source, theirs):
            lines.append(line)
            print(line, flush=True)
    if options.output is not None:
        (options.output / "gguf-fit.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
