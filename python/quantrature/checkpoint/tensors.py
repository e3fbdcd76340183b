"""What the headers of safetensors files say, without reading the tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from .._C import QuantratureError


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor: dtype in its own terms, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def check(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Refuse a tensor of another shape or dtype than a description says.

        Raises:
            QuantratureError: naming the tensor.
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
"""What safetensors calls the dtypes of stored forms."""


def stored_tensors(files: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files, from their headers.

    Raises:
        QuantratureError: naming a file that is truncated or corrupted.
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
