"""
The core of quantrature. Use quantrature.ops, which checks arguments and allocates results.
"""

from typing import Annotated

import numpy
from numpy.typing import NDArray


class QuantratureError(Exception):
    pass

class InvalidArgumentError(QuantratureError, ValueError):
    pass

class UnsupportedError(QuantratureError, NotImplementedError):
    pass

class DeviceError(QuantratureError, RuntimeError):
    pass

def version() -> str: ...

def available_targets() -> list[str]: ...

def target() -> str: ...

def set_target(name: str) -> None: ...

def num_threads() -> int: ...

def set_num_threads(count: int) -> None: ...

def compute_moments(x: Annotated[NDArray, dict(order='C', device='cpu', writable=False)], over: int, group_size: int, out: Annotated[NDArray[numpy.float64], dict(shape=(None, 7), order='C', device='cpu')]) -> None: ...

def merge_moments(a: Annotated[NDArray[numpy.float64], dict(shape=(None, 7), order='C', device='cpu', writable=False)], b: Annotated[NDArray[numpy.float64], dict(shape=(None, 7), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float64], dict(shape=(None, 7), order='C', device='cpu')]) -> None: ...

def kurtosis(moments: Annotated[NDArray[numpy.float64], dict(shape=(None, 7), order='C', device='cpu', writable=False)], fisher: bool, bias: bool, out: Annotated[NDArray[numpy.float64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

def row_bytes(cols: int, bits: int) -> int: ...

def pack(codes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], bits: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

def unpack(packed: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], bits: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')]) -> None: ...

def quantize(w: Annotated[NDArray, dict(order='C', device='cpu', writable=False)], bits: int, group_size: int, axis: int, sym: bool, solver: int, round_zero: bool, row_offsets: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, columns: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, codes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu')], scale: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')], zero: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')] | None) -> None: ...

def dequantize(codes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], bits: int, group_size: int, axis: int, scale: Annotated[NDArray, dict(order='C', device='cpu', writable=False)], zero: Annotated[NDArray, dict(order='C', device='cpu', writable=False)] | None, out: Annotated[NDArray, dict(order='C', device='cpu')]) -> None: ...
