"""Estimate the time and memory that ``allocate`` will need."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from .candidates import grid_of, options_of
from .sources import Source

SAMPLE = (256, 1024)
"""Shape (rows, columns) of the random matrix that is quantized to measure the time per weight."""


def estimate(
    source: Any,
    *,
    strategy: str,
    bits: Iterable[int] | None = None,
    group_sizes: Iterable[int] | None = None,
    outlier_fractions: Iterable[float] = (0.0,),
    method: str | None = None,
    meta_bits: int | str | None = "default",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Estimate time and memory of :func:`allocate`, without loading the model.

    Args:
        source, strategy, bits, group_sizes, outlier_fractions, method, meta_bits, trust_remote_code: as in
            :func:`allocate`.

    Returns:
        ``matrices`` and ``weights``: their number in the model. ``settings``: number of settings that will be measured
        on each matrix. ``memory_bytes``: peak memory, for one matrix as it is read, its float32 copy, the dequantized
        matrix and their difference; 0 for an analysis, which holds measurements already. ``seconds``: extrapolated
        from the time to quantize a small random matrix.
    """
    import torch

    from ..analysis.errors import outcomes

    origin = Source.of(source, trust_remote_code=trust_remote_code)
    weights = sum(matrix.numel for matrix in origin.matrices)
    largest = max(matrix.numel for matrix in origin.matrices)
    _, grid = grid_of(origin, strategy, method, None, meta_bits)
    chosen = []
    if origin.weight is not None and strategy in ("mxq", "pqi"):
        chosen = options_of(origin, strategy, bits, group_sizes, outlier_fractions, grid)
    sample = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    outcomes("sample", sample, chosen, grid.entry)
    seconds = (time.perf_counter() - started) * weights / sample.numel()
    return {
        "matrices": len(origin.matrices),
        "weights": weights,
        "settings": len(chosen),
        "memory_bytes": (4 + 4 + 4 + 4) * largest if chosen or (origin.weight and strategy == "kurtboost") else 0,
        "seconds": round(seconds, 1),
    }
