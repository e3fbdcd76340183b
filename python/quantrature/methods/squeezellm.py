"""SqueezeLLM: one table of values per output channel, found by weighted k-means (Kim et al., arXiv 2306.07629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .. import ops
from .._C import InvalidArgumentError
from ..ops import row_bytes
from ..packed import QuantizedMatrix
from .method import Method, Statistics

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

_SMALLEST_HALF = 2.0**-14
_LARGEST_HALF = 65504.0


def by_sensitivity(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize each row to its own table of centroids, found by k-means weighted by Fisher information.

    Unquantized weights do not affect the tables. They are those at the indices ``kept``; or the fraction ``sensitive``
    with the largest Fisher information and, of the others, the outliers that the entry asks for. Tables are float16 if
    their values fit. Each weight gets the nearest centroid in the stored precision.
    """
    import torch

    fisher = statistics.fisher
    assert fisher is not None
    if kept is None:
        kept = _kept(weight, fisher, entry)
    outliers = ops.extract_outliers(weight, indices=kept)[1] if len(kept) else None
    importance = fisher.float().contiguous().clone()
    importance.view(-1)[kept] = 0
    flat = ~importance.any(dim=1)
    if flat.any():  # these rows have no Fisher information: all weights that are not kept count equally
        alike = torch.ones_like(importance)
        alike.view(-1)[kept] = 0
        importance[flat] = alike[flat]
    centroids, _ = ops.kmeans_1d(weight, 1 << entry.bits, importance)
    dense = ops.quantize(weight, entry.bits, None, codebook=_stored(centroids))
    return QuantizedMatrix(dense, outliers)


def _kept(weight: torch.Tensor, fisher: torch.Tensor, entry: PlanEntry) -> torch.Tensor:
    """Return the indices of the weights with the largest Fisher information, and of the largest among the others."""
    import torch

    sensitive, large = _counts(weight.numel(), entry)
    first = second = torch.empty(0, dtype=torch.int64)
    if sensitive:
        first = ops.topk(fisher.float().contiguous().view(-1), sensitive, key="value")[1]
    if large:
        size = weight.float().abs().view(-1)
        size[first] = -1.0  # below all others
        second = ops.topk(size, large, key="value")[1]
    return torch.cat([first, second]).sort().values


def _counts(weights: int, entry: PlanEntry) -> tuple[int, int]:
    """Return how many weights stay unquantized for their Fisher information, and how many for their magnitude."""
    sensitive = round(SQUEEZELLM.settings(entry)["sensitive"] * weights)
    return sensitive, min(round(entry.outlier_fraction * weights), weights - sensitive)


def _stored(centroids: torch.Tensor) -> torch.Tensor:
    """Convert tables to float16, unless values are too large for it, or all values of a row too small."""
    largest = centroids.abs().amax(dim=1)
    normal = (largest >= _SMALLEST_HALF) | (largest == 0)
    return centroids.half() if bool((normal & (largest <= _LARGEST_HALF)).all()) else centroids


def outlier_shares(weights: Mapping[str, torch.Tensor], share: float) -> dict[str, float]:
    """Distribute outliers over matrices by SqueezeLLM's rule.

    A weight is an outlier if its magnitude is at least max(abs(q1 - r d), abs(q3 + r d)), where q1 and q3 are the
    quartiles of its matrix and d = q3 - q1. The authors choose one r for the whole model by hand. Here r is the
    smallest value that gives at most the requested number of outliers. If half the weights of a matrix are equal, it
    has no outliers.

    Args:
        weights: matrix name to weight tensor.
        share: fraction of outliers among the weights of all matrices together, 0 to 1.

    Returns:
        Matrix name to the fraction of its weights that are outliers.
    """
    quartiles = {}
    for name, weight in weights.items():
        low, high = np.percentile(weight.detach().float().cpu().numpy(), [25, 75])
        quartiles[name] = float(low), float(high)

    def counts(reach: float) -> dict[str, int]:
        found = {}
        for name, weight in weights.items():
            low, high = quartiles[name]
            apart = high - low
            limit = max(abs(low - reach * apart), abs(high + reach * apart))
            found[name] = int((weight.detach().float().abs() >= limit).sum()) if apart > 0 else 0
        return found

    budget = round(share * sum(weight.numel() for weight in weights.values()))
    below, above = 0.0, 1.0
    while sum(counts(above).values()) > budget and above < 1e30:
        below, above = above, 2 * above
    for _ in range(30):
        middle = (below + above) / 2
        if sum(counts(middle).values()) > budget:
            below = middle
        else:
            above = middle
    return {name: count / weights[name].numel() for name, count in counts(above).items()}


def _check(entry: PlanEntry) -> None:
    if entry.sym:
        raise InvalidArgumentError("sym must be false with squeezellm, whose tables are learned: got true")
    if entry.meta_bits is not None:
        raise InvalidArgumentError(
            f"meta_bits must be null with squeezellm, which has no scales: got {entry.meta_bits}"
        )
    sensitive = SQUEEZELLM.settings(entry)["sensitive"]
    if not 0 <= sensitive <= 1:
        raise InvalidArgumentError(f"option sensitive of squeezellm must be a fraction from 0 to 1: got {sensitive}")


def _bytes(rows: int, columns: int, entry: PlanEntry) -> int:
    return rows * (row_bytes(columns, entry.bits) + 2 * (1 << entry.bits))


def _by_fisher(apart: torch.Tensor, statistics: Statistics) -> float:
    """Squared weight errors times Fisher information; a row whose Fisher information is zero has equal factors."""
    assert statistics.fisher is not None
    flat = ~statistics.fisher.any(dim=1, keepdim=True)
    return float(apart.square_().mul_(statistics.fisher.masked_fill(flat, 1.0)).sum())


SQUEEZELLM = Method(
    "one table of values per output channel, by k-means weighted by Fisher information",
    by_sensitivity,
    needs=("fisher",),
    options={"sensitive": 0.0},
    check=_check,
    group_size=-1,
    spread=outlier_shares,
    dense_bytes=_bytes,
    kept=lambda weights, entry: sum(_counts(weights, entry)),
    uniform=False,
    nsamples=100,
    seqlen=512,
    objective=_by_fisher,
)
