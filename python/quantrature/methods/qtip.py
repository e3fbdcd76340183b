"""QTIP (Tseng et al. 2024, arXiv 2406.11235): rotate the matrix by random orthogonal transforms and quantize it with
trellis codes, block by block of columns. Each block compensates the errors of the blocks before it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .. import ops
from .._C import InvalidArgumentError
from ..ops import Trellis
from ..ops._arrays import dtype_name
from ..packed import QuantizedMatrix
from ..packed.trellis import TrellisMatrix, padded, rotated
from .method import Method, Statistics, kept_beside, of_outputs

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

_log = logging.getLogger(__name__)

_TILE = 16
_BUFFER = 128

RATIOS = {
    ("1mad", 1): 1.15,
    ("1mad", 2): 1.00,
    ("1mad", 3): 0.93,
    ("1mad", 4): 0.90,
    ("3inst", 1): 1.15,
    ("3inst", 2): 1.00,
    ("3inst", 3): 0.93,
    ("3inst", 4): 0.90,
    ("hyb", 1): 1.15,
    ("hyb", 2): 0.97,
    ("hyb", 3): 0.90,
    ("hyb", 4): 0.85,
}
"""Root mean square of the input divided by that of the trellis code's values, chosen for the smallest error on
normally distributed numbers with 16 state bits."""


def on_trellis(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize to trellis codes. Outliers are first replaced by zero, and stay unquantized."""
    import torch

    settings = QTIP.settings(entry)
    trellis = Trellis(entry.bits, settings["state_bits"], settings["code"])
    outliers = kept_beside(weight, entry, kept)
    dense = weight.float()
    if outliers is not None:
        dense = dense.clone()
        dense.view(-1)[outliers.positions()] = 0
    rows, cols = weight.shape
    padded_rows, padded_cols = padded(rows), padded(cols)
    seed = settings["seed"]
    input_signs = torch.from_numpy(ops.random_signs(padded_cols, 2 * seed))
    output_signs = torch.from_numpy(ops.random_signs(padded_rows, 2 * seed + 1))

    assert statistics.hessian is not None
    hessian = torch.zeros(padded_cols, padded_cols)
    hessian[:cols, :cols] = statistics.hessian
    hessian = rotated(hessian, input_signs, input_signs)
    whole = torch.zeros(padded_rows, padded_cols)
    whole[:rows, :cols] = dense
    target = rotated(whole, input_signs, output_signs)
    # A matrix of zeros gets a tiny scale, so that its dequantized values are almost zero.
    spread = float(target.square().mean(dtype=torch.float64).sqrt()) or 1e-30
    scale = float(torch.tensor(spread / RATIOS[trellis.code, trellis.bits], dtype=torch.float32))
    lower, damping = feedback(hessian, settings["damp_percent"])
    if damping > settings["damp_percent"]:
        _log.warning("%s: the damping had to be raised to %g", statistics.name, damping)
    codes = block_ldlq(target, lower, trellis, scale)
    matrix = TrellisMatrix(
        codes=codes,
        scale=torch.tensor([scale], dtype=torch.float32),
        input_signs=input_signs,
        output_signs=output_signs,
        trellis=trellis,
        shape=(rows, cols),
        dtype=dtype_name(weight),
    )
    return QuantizedMatrix(matrix, outliers)


def feedback(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """Compute the factor L of ``H = L D L^T`` (QuIP#, arXiv 2402.04396, section 4.1).

    D has blocks of 16, L is unit block lower triangular. H is the Hessian plus ``damp_percent`` times the mean of its
    diagonal, on the diagonal. If H is not positive definite because of rounding, ``damp_percent`` is doubled until it
    is. A Hessian of zeros is replaced by the identity.

    Returns:
        L, float32, and the ``damp_percent`` that was used.

    Raises:
        InvalidArgumentError: if the Hessian is not finite.
    """
    import torch

    wide = hessian.double()
    if not torch.isfinite(wide).all():
        raise InvalidArgumentError("[qtip] hessian must be finite")
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(wide)), damp_percent
    while True:
        damped = wide.clone()
        damped.diagonal().add_(damp_percent * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damp_percent *= 2
    for begin in range(0, len(factor), _TILE):
        block = slice(begin, begin + _TILE)
        corner = factor[block, block].clone()
        factor[begin:, block] = torch.linalg.solve_triangular(corner, factor[begin:, block], upper=False, left=False)
    return factor.float(), damp_percent


def block_ldlq(target: torch.Tensor, lower: torch.Tensor, trellis: Trellis, scale: float) -> torch.Tensor:
    """Quantize a matrix in tiles of 16 by 16, from the last block of 16 columns to the first (QuIP#, algorithm 1).

    Args:
        target: float32 (rows, columns), both multiples of 16.
        lower: the factor L from :func:`feedback`.
        trellis: the trellis code.
        scale: scale of the code's values.

    Returns:
        uint8 (tiles, bytes per tile), the bit stream of each tile, in row-major order of tiles.
    """
    import torch

    rows, cols = target.shape
    codes = torch.empty(rows // _TILE, cols // _TILE, trellis.stream_bytes(_TILE**2), dtype=torch.uint8)
    error = torch.zeros(rows, cols)
    for end in range(cols, 0, -_BUFFER):
        begin = max(0, end - _BUFFER)
        moved = target[:, begin:end] + error[:, end:] @ lower[end:, begin:end]
        for last in range(end, begin, -_TILE):
            block = slice(last - _TILE, last)
            inside = slice(block.start - begin, block.stop - begin)
            wanted = moved[:, inside] + error[:, last:end] @ lower[last:end, block]
            # 16 columns are one tile below the other; each tile is one row of `tiles`.
            tiles = wanted.reshape(rows // _TILE, _TILE**2)
            streams = ops.trellis_quantize(tiles, trellis, scale)
            found = ops.trellis_dequantize(streams, _TILE**2, trellis, scale)
            codes[:, block.start // _TILE] = streams
            error[:, block] = target[:, block] - found.view(rows, _TILE)
    return codes.view(-1, codes.shape[-1])


def trellis_bytes(rows: int, columns: int, entry: PlanEntry) -> int:
    """Compute the bytes of codes, signs and scale."""
    rows, columns = padded(rows), padded(columns)
    return rows * columns * entry.bits // 8 + (rows + columns) // 8 + 4


def _on_a_trellis(entry: PlanEntry) -> None:
    if entry.keeps:
        return
    if not entry.bits <= 4:
        raise InvalidArgumentError(f"bits of qtip must be 1 to 4: got {entry.bits}")
    if entry.sym:
        raise InvalidArgumentError("sym must be false with qtip, which has no zero points: got true")
    if entry.meta_bits is not None:
        raise InvalidArgumentError("meta_bits must be null with qtip, which has only one scale per matrix")
    settings = QTIP.settings(entry)
    Trellis(entry.bits, settings["state_bits"], settings["code"])
    if not 0 < settings["damp_percent"] < 1:
        raise InvalidArgumentError(
            f"option damp_percent of qtip must be between 0 and 1: got {settings['damp_percent']}"
        )
    if not 0 <= settings["seed"] < 1 << 63:
        raise InvalidArgumentError(f"option seed of qtip must be 0 to 2**63 - 1: got {settings['seed']}")


QTIP = Method(
    "rotates the matrix at random and quantizes it with trellis codes and error feedback; no groups",
    on_trellis,
    needs=("hessian",),
    options={"state_bits": 16, "code": "3inst", "damp_percent": 0.01, "seed": 0},
    check=_on_a_trellis,
    group_size=-1,
    dense_bytes=trellis_bytes,
    uniform=False,
    objective=of_outputs,
)
