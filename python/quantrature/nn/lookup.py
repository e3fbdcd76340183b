"""The torch operator ``quantrature::embedding``: look up rows of a quantized embedding table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..ops import QuantizedTensor
from ..packed.product import PreparedMatrix
from .product import library, prepare, ready_at_once, spec_of


def lookup(ids: torch.Tensor, stored: list[torch.Tensor], description: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized rows for token ids. Other rows of the table are not read.

    Args:
        ids: integer tensor of any shape.
        stored: tensors of the table, in the order of its layout.
        description: description of the table, a grid, from :func:`quantrature.nn.product.describe`.
        dtype: dtype of the result.

    Returns:
        Tensor of shape (\\*ids.shape, columns).

    Raises:
        InvalidArgumentError: if ``ids`` are not integers.
        IndexError: for an id that is not a row of the table.
    """
    if not torch.compiler.is_compiling():
        ready = ready_at_once(stored, description, ids)
        if ready is not None:
            return _rows_of(ready, ids, dtype)
    result: torch.Tensor = torch.ops.quantrature.embedding(ids, stored, description, dtype)
    return result


def _rows(ids: torch.Tensor, stored: list[torch.Tensor], description: str, dtype: torch.dtype) -> torch.Tensor:
    return _rows_of(prepare(stored, description), ids, dtype)


def _rows_of(ready: PreparedMatrix, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidArgumentError(f"[embedding] ids must be integers: got dtype={ids.dtype}")
    table: Any = ready.matrix.dense
    assert isinstance(table, QuantizedTensor)
    flat = ids.reshape(-1)

    def taken(part: torch.Tensor) -> torch.Tensor:
        return part.reshape(table.shape[0], -1).index_select(0, flat)

    if len(flat) == 0:
        return torch.empty((*ids.shape, table.shape[1]), dtype=dtype, device=table.codes.device)
    rows = replace(
        table,
        codes=taken(table.codes),
        scale=taken(table.scale),
        zero=None if table.zero is None else taken(table.zero),
        shape=(len(flat), table.shape[1]),
    )
    found: torch.Tensor = rows.dequantize(str(dtype).removeprefix("torch."))
    return found.view(*ids.shape, table.shape[1])


def _fake(ids: torch.Tensor, stored: list[torch.Tensor], description: str, dtype: torch.dtype) -> torch.Tensor:
    return stored[0].new_empty((*ids.shape, spec_of(description).shape[1]), dtype=dtype)


library.define(
    "embedding(Tensor ids, Tensor[] stored, str description, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    library.impl("embedding", _rows, _device)
torch.library.register_fake("quantrature::embedding", _fake, lib=library)
