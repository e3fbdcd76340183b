"""The interface of a quantization method, and the calibration statistics that a method can ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .. import ops
from .._C import InvalidArgumentError
from ..ops import SparseCSR, groups_in_row, row_bytes
from ..packed import QuantizedMatrix

if TYPE_CHECKING:
    import torch

    from ..plan import PlanEntry


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics of one matrix. A field is ``None`` if the method does not need it.

    Attributes:
        name: name of the matrix, for messages.
        hessian: float32 (in_features, in_features), the mean of x x^T over the tokens that reach the matrix.
        fisher: float32 (out_features, in_features), diagonal Fisher information: the squared gradient of a window's
            mean loss, summed over the windows.
        activations: float32 (tokens, in_features), inputs of the matrix at tokens spread evenly over the text.
        tokens: number of tokens that reached the matrix.
    """

    name: str = "the matrix"
    hessian: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    activations: torch.Tensor | None = None
    tokens: int = 0

    def to(self, device: torch.device | str) -> Statistics:
        """Return a copy with all tensors on a device."""
        parts = {name: getattr(self, name) for name in STATISTICS}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})


STATISTICS = ("hessian", "fisher", "activations")
"""The fields of :class:`Statistics` that a method can need."""

Quantizer = Callable[["torch.Tensor", "PlanEntry", "torch.Tensor | None", Statistics], QuantizedMatrix]
"""Quantizes one matrix. Arguments: the weight (out_features, in_features), contiguous, on the CPU, or with
:attr:`Method.on_devices` on a CUDA device; its plan entry; the weights to keep unquantized (int64 indices into the
flattened weight, ascending), or ``None`` for the outliers that the entry asks for; the statistics. All tensors and the
result are on the device of the weight."""


InputScale = Callable[[Sequence[tuple["torch.Tensor", "PlanEntry"]], "torch.Tensor", tuple[int, int]], "torch.Tensor"]
"""Finds a scale of input channels. Arguments: matrices with their plan entries; the inputs that they all read, float32
(tokens, in_features); how the scale repeats (:class:`quantrature.models.folding.Fold`). Returns the scale, float32
(in_features,)."""

Objective = Callable[["torch.Tensor", Statistics], float]
"""Computes the error that a method minimizes. Arguments: the weight error (dequantized minus original), float32
(out_features, in_features), which may be overwritten; the statistics."""

META_GROUP = 128
"""Number of scales that share one second-level scale and zero point, if ``meta_bits`` is set."""


def grid_settings(entry: PlanEntry) -> dict[str, Any]:
    """Return the arguments of :func:`quantrature.ops.quantize` and :func:`~quantrature.ops.gptq` that an entry sets."""
    return {
        "bits": entry.bits,
        "group_size": entry.group_size,
        "sym": entry.sym,
        "scale_dtype": entry.scale_dtype,
        "zero": entry.zero,
    }


def scale_bytes(rows: int, columns: int, entry: PlanEntry, *, zeros: bool) -> int:
    """Compute the bytes of the scales of all groups and, with ``zeros``, of the zero points.

    Scales are counted in the dtype of the entry, with ``auto`` as float16. If some are then out of the range of
    float16, which depends on the weights, they take more (:func:`quantrature.ops.quantize`). With ``meta_bits``,
    second-level scales and zero points are counted as float16, except the scales of scales: these are mostly too small
    for float16 and are counted as float32.
    """
    parameters = rows * groups_in_row(columns, entry.group_size)
    if entry.meta_bits is None:
        return (4 if entry.scale_dtype == "float32" else 2) * parameters * (2 if zeros else 1)
    inner, pairs = row_bytes(parameters, entry.meta_bits), groups_in_row(parameters, META_GROUP)
    return inner + 8 * pairs + (inner + 4 * pairs if zeros else 0)


def grid_bytes(rows: int, columns: int, entry: PlanEntry) -> int:
    """Compute the bytes of codes, scales and zero points."""
    return rows * row_bytes(columns, entry.bits) + scale_bytes(rows, columns, entry, zeros=not entry.sym)


def _anything(entry: PlanEntry) -> None:
    pass


def _outliers(weights: int, entry: PlanEntry) -> int:
    return round(entry.outlier_fraction * weights)


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        about: one-line description.
        quantize: function that quantizes one matrix.
        needs: the :data:`STATISTICS` that it needs; empty for a method without calibration.
        options: names and default values of its own settings, which a plan entry may set.
        check: function that raises InvalidArgumentError for an entry that the method does not support.
        group_size: the only supported group size; ``None`` for any.
        bits: the supported numbers of bits; ``None`` for 1 to 8.
        spread: function from weights by name and the fraction of outliers in all matrices together to the fraction in
            each matrix; ``None`` for the same fraction in each.
        kept: function from a number of weights and an entry to the number of weights that stay unquantized.
        uniform: whether the values of its codes are evenly spaced, so that other tools can express them.
        nsamples, seqlen: default number of calibration windows, and of tokens per window (less if the model's context
            length is shorter); the values of the method's authors.
        dense_bytes: function from rows, columns and an entry to the bytes stored besides outliers, as far as they
            depend on these alone.
        input_scale: function that finds a scale of input channels for all matrices with the same input. The scale is
            folded into the layer that computes the input. A method with ``input_scale`` has the options ``scale`` and
            ``fold``; ``scale`` is false in entries of matrices whose weights already include the scale.
        objective: function that computes the error that the method minimizes; ``None`` if it minimizes none.
        on_devices: whether ``quantize`` also takes weights on a CUDA device, and leaves the result there.
    """

    about: str
    quantize: Quantizer
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[PlanEntry], None] = _anything
    group_size: int | None = None
    bits: tuple[int, ...] | None = None
    spread: Callable[[Mapping[str, torch.Tensor], float], dict[str, float]] | None = None
    dense_bytes: Callable[[int, int, PlanEntry], int] = grid_bytes
    input_scale: InputScale | None = None
    kept: Callable[[int, PlanEntry], int] = _outliers
    uniform: bool = True
    nsamples: int = 128
    seqlen: int = 2048
    objective: Objective | None = None
    on_devices: bool = False

    def __str__(self) -> str:
        """Return the description, with the options and their defaults."""
        given = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return self.about + (f" ({given})" if given else "")

    def check_entry(self, entry: PlanEntry) -> None:
        """Check that the method supports a plan entry.

        Raises:
            InvalidArgumentError: if it does not; the message names the field or option.
        """
        for name, value in entry.options.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise InvalidArgumentError(f"options of {entry.method} must be one of {known}: got {name!r}")
            kind = type(self.options[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InvalidArgumentError(f"option {name} of {entry.method} must be {kind.__name__}: got {value!r}")
        if self.group_size not in (None, entry.group_size):
            raise InvalidArgumentError(
                f"group_size of {entry.method} must be {self.group_size}: got {entry.group_size}"
            )
        if not self.uniform and (entry.zero != "float" or entry.scale_dtype != "auto"):
            raise InvalidArgumentError(
                f"zero and scale_dtype of {entry.method} must be float and auto: got {entry.zero} and "
                f"{entry.scale_dtype}"
            )
        self.check(entry)

    def settings(self, entry: PlanEntry) -> dict[str, Any]:
        """Return the options of an entry, with the method's defaults for those not given."""
        return {**self.options, **entry.options}


def squared(apart: torch.Tensor, statistics: Statistics) -> float:
    """Sum of the squared errors of the weights."""
    return float(apart.square_().sum())


def of_outputs(apart: torch.Tensor, statistics: Statistics) -> float:
    """Squared error of the outputs, mean over the tokens: the trace of E H E^T."""
    assert statistics.hessian is not None
    return float((apart @ statistics.hessian).mul_(apart).sum())


def kept_beside(weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None) -> SparseCSR | None:
    """Return the unquantized weights: those at the indices ``kept``, or the outliers that the entry asks for."""
    if kept is not None and len(kept):
        return ops.extract_outliers(weight, indices=kept)[1]
    if kept is None and _outliers(weight.numel(), entry):
        return ops.extract_outliers(weight, fraction=entry.outlier_fraction)[1]
    return None
