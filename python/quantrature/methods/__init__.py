"""Host methods: how the codes of a matrix are found once its plan entry says what they are to be."""

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
    "SOLVERS",
    "STATISTICS",
    "Compared",
    "Comparison",
    "Method",
    "Statistics",
    "image_of",
    "kept_beside",
    "quantize_matrix",
    "solver_of",
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
}
"""Names that ``method`` takes, and what each is."""

SOLVERS: dict[str, Method] = {method.solver: method for method in METHODS.values()}
"""What the ``solver`` of a plan's entry takes."""


def solver_of(method: str) -> str:
    """What stands for a method in a plan's entry.

    Raises:
        InvalidArgumentError: for an unknown method.
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"[quantize] method must be one of {', '.join(METHODS)}: got {method!r}")
    return METHODS[method].solver


def quantize_matrix(
    name: str,
    weight: torch.Tensor,
    entry: PlanEntry,
    kept: torch.Tensor | None = None,
    statistics: Statistics | None = None,
    comparison: Comparison | None = None,
    scale: torch.Tensor | None = None,
) -> QuantizedMatrix:
    """Quantize one matrix, (out_features, in_features) and contiguous, as its plan entry says.

    Args:
        name: for messages.
        weight: float32, float16 or bfloat16, on the CPU or, where the core works there, a CUDA device. A method that
            does not run there works on a copy on the CPU; the result is where the weight is all the same.
        entry: the method, its grid, and how many outliers are left out of its fit and kept exactly.
        kept: int64 places in the flattened weight, ascending, to be left out and kept in place of the outliers.
        statistics: what calibration text says about the matrix, for methods that need it.
        comparison: is given the errors of this method and of rtn.
        scale: of columns, which the weight has already and rtn would not have.

    Returns:
        The quantized matrix, where the weight is.

    Raises:
        InvalidArgumentError: naming the matrix and the statistics that its method needs and was not given.
        QuantratureError: of the kind the op raised, naming the matrix.
    """
    method, given, device = SOLVERS[entry.solver], replace(statistics or Statistics(), name=name), weight.device
    for need in method.needs:
        if getattr(given, need) is None:
            raise InvalidArgumentError(
                f"[quantize] {name}: method {entry.solver} needs a calibration text, for the {need} of this matrix"
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
            "%s: meta_bits=%d would have multiplied the error of this matrix; its scales and zero points are stored "
            "unquantized, and it takes %d bytes",
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
    """A function that makes the float32 image of a matrix from its stored form, which it keeps."""
    stored = quantize_matrix(name, weight.contiguous(), entry, statistics=statistics)
    return lambda: stored.dequantize("float32")
