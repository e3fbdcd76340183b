"""Shapes and dtypes of tensors in safetensors files, read from the file headers alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from .._C import QuantratureError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it: dtype (safetensors name), shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Check that the tensor has the shape and dtype of its description.

        Raises:
            QuantratureError: if not; the message names the tensor.
        """
        if (self.dtype, self.shape) != (_DTYPES[dtype], shape):
            raise QuantratureError(
                f"[checkpoint] tensor {name} must be {_DTYPES[dtype]} of shape {list(shape)}: got {self.dtype} of "
                f"shape {list(self.shape)}"
            )


_DTYPES = {
    "uint8": "U8",
    "uint16": "U16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
}
"""The dtypes of stored tensors to their safetensors names."""


def stored_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """Return all tensors of safetensors files by name, from the file headers.

    Raises:
        QuantratureError: if a file is truncated or corrupted; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for path in files:
        try:
            with safe_open(path, "pt"):  # checks that offsets, shapes and the size of the file go together
                pass
        except (SafetensorError, OSError) as e:
            raise QuantratureError(f"[checkpoint] {path} is truncated or corrupted: {e}") from None
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                found[name] = StoredTensor(about["dtype"], tuple(about["shape"]), end - begin)
    return found
