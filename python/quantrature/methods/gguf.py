"""Block types of GGUF, the file format of llama.cpp, fitted for the inputs of the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import ops
from .._C import InvalidArgumentError
from ..ops import GGUF_TYPES
from ..ops._arrays import dtype_name
from ..packed import QuantizedMatrix
from ..packed.gguf import GgufMatrix, bits_of
from .method import Method, Statistics, of_outputs

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

BITS = (2, 3, 4, 5, 6, 8)
SUPERBLOCK = 256

_K_TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
_TYPES_OF_32 = {2: "IQ4_NL", 3: "IQ4_NL", 4: "IQ4_NL", 5: "Q5_0", 6: "Q5_1", 8: "Q8_0"}
"""Bits to the type for rows of whole superblocks of 256 weights, and for other rows. There are no types of 2 and 3 bits
for other rows; the type of 4 bits stands in for them, as in llama.cpp."""


def type_for(entry: PlanEntry, columns: int) -> str:
    """Return the block type of a matrix with this number of columns.

    Raises:
        InvalidArgumentError: for a number of columns that is no multiple of 32, or of the block of the chosen type.
    """
    chosen = str(GGUF.settings(entry)["type"])
    if chosen == "auto":
        chosen = (_TYPES_OF_32 if columns % SUPERBLOCK else _K_TYPES)[entry.bits]
    block = GGUF_TYPES[chosen].block_size
    if columns % block:
        raise InvalidArgumentError(
            f"{chosen} needs columns that are a multiple of {block}: got {columns}; "
            + ("keep the matrix unquantized" if columns % 32 else "leave the option type out")
        )
    return chosen


def in_blocks(
    weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None, statistics: Statistics
) -> QuantizedMatrix:
    """Quantize to blocks with the least squared error, weighted by the mean square of each input."""
    if kept is not None and len(kept):
        raise InvalidArgumentError("gguf cannot keep weights unquantized: the file format has no place for them")
    assert statistics.hessian is not None
    type = type_for(entry, weight.shape[1])
    importance = statistics.hessian.diagonal().float().contiguous()
    data = ops.gguf_quantize(weight, type, importance if bool((importance > 0).any()) else None)
    rows, columns = weight.shape
    return QuantizedMatrix(GgufMatrix(data, type, (rows, columns), dtype_name(weight)))


def _check(entry: PlanEntry) -> None:
    if entry.sym or entry.meta_bits is not None or entry.outlier_fraction:
        raise InvalidArgumentError(
            "sym, meta_bits and outlier_fraction must be left out with gguf: its types have none"
        )
    chosen = entry.options.get("type", "auto")
    if chosen != "auto" and chosen not in GGUF_TYPES:
        raise InvalidArgumentError(f"option type of gguf must be auto, {', '.join(GGUF_TYPES)}: got {chosen!r}")
    if chosen != "auto" and entry.bits != bits_of(chosen):
        raise InvalidArgumentError(f"bits must be {bits_of(chosen)} with the type {chosen}: got {entry.bits}")
    if entry.bits not in BITS and entry.bits != 16:
        raise InvalidArgumentError(f"bits of gguf must be 2, 3, 4, 5, 6 or 8: got {entry.bits}")


def _bytes(rows: int, columns: int, entry: PlanEntry) -> int:
    return rows * GGUF_TYPES[type_for(entry, columns)].row_bytes(columns)


GGUF = Method(
    "block types of GGUF for llama.cpp, such as Q4_K, fitted to the inputs",
    in_blocks,
    needs=("hessian",),
    options={"type": "auto"},
    check=_check,
    group_size=32,
    bits=BITS,
    dense_bytes=_bytes,
    uniform=False,
    objective=of_outputs,
)
