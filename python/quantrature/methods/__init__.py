"""Quantization methods: how the codes and scales of a matrix are computed from its weights and its plan entry."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .._C import InvalidArgumentError, QuantratureError, cuda_device_count
from ..ops import QuantizedTensor
from ..packed import QuantizedMatrix
from .awq import AWQ
from .codebook import FP4, NF4
from .comparison import Compared, Comparison
from .gguf import GGUF
from .gptq import GPTQ
from .grid import HQQ, MSE, RTN
from .method import STATISTICS, Method, Statistics, kept_beside
from .qtip import QTIP
from .squeezellm import SQUEEZELLM

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry

_log = logging.getLogger(__name__)

__all__ = [
    "METHODS",
    "STATISTICS",
    "Compared",
    "Comparison",
    "Method",
    "Statistics",
    "check_method",
    "image_of",
    "kept_beside",
    "quantize_matrix",
]

METHODS: dict[str, Method] = {
    "rtn": RTN,
    "mse": MSE,
    "hqq": HQQ,
    "nf4": NF4,
    "fp4": FP4,
    "squeezellm": SQUEEZELLM,
    "qtip": QTIP,
    "awq": AWQ,
    "gptq": GPTQ,
    "gguf": GGUF,
}
"""Values of the argument ``method`` and of ``method`` in a plan entry, each with its :class:`Method`."""


def check_method(method: str) -> None:
    """Raise an InvalidArgumentError for an unknown method."""
    if method not in METHODS:
        raise InvalidArgumentError(f"[quantize] method must be one of {', '.join(METHODS)}: got {method!r}")


def quantize_matrix(
    name: str,
    weight: torch.Tensor,
    entry: PlanEntry,
    kept: torch.Tensor | None = None,
    statistics: Statistics | None = None,
    comparison: Comparison | None = None,
    scale: torch.Tensor | None = None,
) -> QuantizedMatrix:
    """Quantize one weight matrix as its plan entry says.

    Args:
        name: name of the matrix, for messages.
        weight: float32, float16 or bfloat16 tensor (out_features, in_features), contiguous, on the CPU or a CUDA
            device. If the method or the build does not support CUDA, the work is done on a copy on the CPU.
        entry: method, bits, group size and fraction of outliers. Outliers stay unquantized.
        kept: int64 indices into the flattened weight, ascending, of the weights to keep unquantized instead of the
            outliers that ``entry`` asks for.
        statistics: calibration statistics of the matrix, for methods that need them.
        comparison: if given, collects the error of this method and that of rtn.
        scale: column scale that ``weight`` already includes; ``comparison`` removes it for rtn.

    Returns:
        The quantized matrix, on the device of the weight.

    Raises:
        InvalidArgumentError: if statistics that the method needs are missing; the message names them and the matrix.
        QuantratureError: any error of the kernels, with the name of the matrix added.
    """
    method, given, device = METHODS[entry.method], replace(statistics or Statistics(), name=name), weight.device
    for need in method.needs:
        if getattr(given, need) is None:
            raise InvalidArgumentError(
                f"[quantize] {name}: method {entry.method} needs calibration text, to compute the {need} of this matrix"
            )
    if not (weight.is_cuda and method.on_devices and cuda_device_count()[0]):
        weight = weight.cpu()
    place = weight.device
    given = given.to(place)
    try:
        found = method.quantize(weight, entry, None if kept is None else kept.to(place), given)
    except QuantratureError as e:
        raise type(e)(f"{name}: {e}") from None
    if entry.meta_bits is not None and not isinstance(getattr(found.dense, "scale", None), QuantizedTensor):
        _log.warning(
            "%s: meta_bits=%d would have multiplied the error of this matrix. Its scales and zero points are stored "
            "unquantized instead; the matrix takes %d bytes",
            name,
            entry.meta_bits,
            found.nbytes,
        )
    if comparison is not None:
        comparison.add(method, weight, entry, given, found, None if scale is None else scale.to(place))
    return found if device == place else found.to(device)


def image_of(
    name: str, weight: torch.Tensor, entry: PlanEntry, statistics: Statistics | None = None
) -> Callable[[], torch.Tensor]:
    """Quantize a matrix and return a function that dequantizes it to float32, (out_features, in_features)."""
    stored = quantize_matrix(name, weight.contiguous(), entry, statistics=statistics)
    return lambda: stored.dequantize("float32")
