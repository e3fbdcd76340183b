"""Handle NumPy arrays and torch tensors alike: check inputs, allocate outputs."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Collection
from typing import Any

import numpy as np

from .. import _C
from .._C import InvalidArgumentError

Array = Any  # np.ndarray | torch.Tensor; torch is not imported for the sake of a type

FLOATS = ("float32", "float16", "bfloat16")
"""In the order of ``qtr_dtype``."""


@functools.cache  # to print a dtype takes microseconds
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_name(x: Array) -> str:
    """Return the dtype of an array or tensor as a string: 'float32', 'bfloat16', ..."""
    return _name(x.dtype)


def is_torch(x: object) -> bool:
    """Whether x is a torch tensor; answers without importing torch."""
    if isinstance(x, np.ndarray):  # torch's own check takes microseconds
        return False
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def as_input(
    x: Array,
    op: str,
    name: str,
    *,
    dtypes: tuple[str, ...] = FLOATS,
    ndim: Collection[int] = (1, 2),
    empty: bool = False,
    on_cuda: bool = False,
) -> Array:
    """Check an input array, and return the array that the core reads; it shares memory with ``x``.

    Raises:
        InvalidArgumentError: for another type, dtype or number of dimensions; for an array that is empty (unless
            ``empty``), not contiguous in row-major order, or not on the CPU (or, with ``on_cuda``, a CUDA device). The
            message names op and argument.
    """
    if is_torch(x):
        if x.device.type != "cpu" and not (on_cuda and x.device.type == "cuda"):
            where = "on the CPU or a CUDA device" if on_cuda else "on the CPU"
            raise InvalidArgumentError(f"[{op}] {name} must be {where}: got device={x.device}")
        contiguous = x.is_contiguous()
        x = x.detach()
    elif isinstance(x, np.ndarray):
        contiguous = x.flags.c_contiguous
    else:
        raise InvalidArgumentError(
            f"[{op}] {name} must be a NumPy array or a torch tensor: got {type(x).__module__}.{type(x).__qualname__}"
        )
    if dtype_name(x) not in dtypes:
        raise InvalidArgumentError(f"[{op}] {name} must be {' or '.join(dtypes)}: got dtype={dtype_name(x)}")
    if x.ndim not in ndim:
        raise InvalidArgumentError(f"[{op}] {name} must have {' or '.join(map(str, ndim))} dimensions: got {x.ndim}")
    if 0 in x.shape and not empty:
        raise InvalidArgumentError(f"[{op}] {name} must not be empty: got shape={tuple(x.shape)}")
    if not contiguous:
        raise InvalidArgumentError(f"[{op}] {name} must be contiguous in row-major order; pass a contiguous copy")
    if not is_torch(x) and dtype_name(x) == "bfloat16":
        return x.view(np.uint16)
    return x


def empty_like_kind(x: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Return an uninitialized array of the library of ``x`` (NumPy or torch), on its device."""
    torch = sys.modules["torch"] if is_torch(x) else None
    if torch is not None and x.device.type != "cpu":
        return torch.empty(shape, dtype=getattr(torch, dtype), device=x.device)
    # NumPy asks the system for huge pages and torch does not: the first write to a large result is three times faster.
    made = np.empty(shape, dtype="uint16" if dtype == "bfloat16" else dtype)
    if torch is not None:
        return torch.from_numpy(made).view(getattr(torch, dtype))
    return made.view(_bfloat16_of_numpy()) if dtype == "bfloat16" else made


def _bfloat16_of_numpy() -> Any:
    try:
        return importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        raise InvalidArgumentError(
            "bfloat16 results for NumPy arrays need the package ml_dtypes: pip install ml_dtypes, or pass torch tensors"
        ) from None


def as_output(
    x: Array,
    op: str,
    name: str,
    *,
    dtypes: tuple[str, ...] = FLOATS,
    ndim: Collection[int] = (1, 2),
    empty: bool = False,
    on_cuda: bool = False,
) -> Array:
    """Check an output array, and return the array that the core writes; it shares memory with ``x``.

    Raises:
        InvalidArgumentError: as for :func:`as_input`, and for a read-only array.
    """
    shared = as_input(x, op, name, dtypes=dtypes, ndim=ndim, empty=empty, on_cuda=on_cuda)
    if not is_torch(x) and not x.flags.writeable:
        raise InvalidArgumentError(f"[{op}] {name} must be writable: got a read-only array")
    return shared


def consecutive_rows(rows: slice, count: int, op: str) -> slice:
    """Return a slice of rows with explicit ends, for a matrix with ``count`` rows.

    Raises:
        InvalidArgumentError: for a slice without rows, or with a step other than 1.
    """
    start, stop, step = rows.indices(count)
    if step != 1 or start >= stop:
        raise InvalidArgumentError(
            f"[{op}] rows must be a slice with at least one row and step 1: got {rows} of {count}"
        )
    return slice(start, stop)


def converted(x: Array, dtype: str) -> Array:
    """Convert ``x`` to another dtype, in new memory of the same library and device."""
    if is_torch(x) and x.device.type != "cpu":
        return x.to(getattr(sys.modules["torch"], dtype), copy=True)
    made = empty_like_kind(x, tuple(x.shape), dtype)
    core_view(made)[...] = core_view(x)
    return made


def place(op: str, **arrays: Array | None) -> tuple[int, int] | None:
    """Return the CUDA device of the arrays and torch's current stream on it; ``None`` for the CPU.

    Raises:
        InvalidArgumentError: for arrays on different devices; the message names op and argument.
    """
    given = [(name, x) for name, x in arrays.items() if x is not None]
    device = device_of(given[0][1])
    for name, x in given[1:]:
        if device_of(x) != device:
            raise InvalidArgumentError(
                f"[{op}] {name} must be on the device of {given[0][0]}: got device={device_of(x) or 'cpu'}, "
                f"expected={device or 'cpu'}"
            )
    return None if device is None else (device.index, stream_of(device))


def device_of(x: Array) -> Any:
    """Return the torch device of ``x``; ``None`` for the CPU."""
    return x.device if is_torch(x) and x.device.type != "cpu" else None


def stream_of(device: Any) -> int:
    """Return torch's current stream on a CUDA device."""
    return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)


def core_view(x: Array) -> Array:
    """Return the form of ``x`` that the core reads fastest; it shares memory with ``x``.

    It is a NumPy array, with bfloat16 as raw bits; for a CUDA tensor it is a DLPack capsule, which torch makes only for
    the current device.
    """
    if isinstance(x, np.ndarray):
        return x.view(np.uint16) if dtype_name(x) == "bfloat16" else x
    x = x.detach()
    if x.device.type != "cpu":
        torch = sys.modules["torch"]
        with torch.cuda.device(x.device):
            return torch.utils.dlpack.to_dlpack(x)
    return (x.view(sys.modules["torch"].uint16) if dtype_name(x) == "bfloat16" else x).numpy()


def core_address(x: Array, op: str, name: str) -> int:
    """Return the address of the first element of an array that :func:`as_input` has accepted.

    Raises:
        InvalidArgumentError: for a tensor with the negative bit set, whose memory has the opposite signs.
    """
    if not is_torch(x):
        return _C.address(core_view(x))  # x.ctypes.data takes longer than a small product
    if x.is_neg():
        raise InvalidArgumentError(
            f"[{op}] {name} must not be the imaginary part of a conjugate view: pass {name}.resolve_neg()"
        )
    return int(x.data_ptr())
