"""What a host method is, and what it may be told about a matrix beside its weights."""

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
    """What calibration text says about one matrix; ``None`` where its method does not ask for it.

    Attributes:
        name: of the matrix, for messages.
        hessian: float32 (in_features, in_features), the mean of x x^T over the tokens that reach the matrix.
        fisher: float32 (out_features, in_features), the sum over the windows of the squared gradient of the mean
            loss of each.
        activations: float32 (tokens, in_features), inputs of the matrix at tokens spread evenly over the text.
        tokens: how many reached the matrix.
    """

    name: str = "the matrix"
    hessian: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    activations: torch.Tensor | None = None
    tokens: int = 0

    def to(self, device: torch.device | str) -> Statistics:
        """The same with all tensors on a device."""
        parts = {name: getattr(self, name) for name in STATISTICS}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})


STATISTICS = ("hessian", "fisher", "activations")
"""The parts of :class:`Statistics` that a method can ask for."""

Quantizer = Callable[["torch.Tensor", "PlanEntry", "torch.Tensor | None", Statistics], QuantizedMatrix]
"""Takes the weight, (out_features, in_features), contiguous, on the CPU or where :attr:`Method.on_devices` says so on a
CUDA device; its plan entry; the places to keep exactly (int64 in the flattened weight, ascending), or ``None`` for as
many outliers as the entry says; and statistics. Places and statistics are where the weight is, and so is the result."""


InputScale = Callable[[Sequence[tuple["torch.Tensor", "PlanEntry"]], "torch.Tensor", tuple[int, int]], "torch.Tensor"]
"""Takes some matrices with their plan entries, the inputs that all of them read, float32 (tokens, in_features), and
how the scale repeats (:class:`quantrature.models.folding.Fold`); returns the scale, float32 (in_features,)."""

Objective = Callable[["torch.Tensor", Statistics], float]
"""Takes the error of the matrix, float32 (out_features, in_features), which it may overwrite, and statistics; returns
what a method minimizes."""

META_GROUP = 128
"""Scales that share a second-level scale and zero where ``meta_bits`` is set."""


def scale_bytes(rows: int, columns: int, entry: PlanEntry, *, zeros: bool) -> int:
    """Bytes of the scales, and perhaps zeros, of all groups.

    They are float16, unless some are out of its range, which only the weights tell (:func:`quantrature.ops.quantize`).
    Quantized once more they have float16 scales and zeros in turn, but for the scales of scales, which are mostly too
    small for it and counted as float32.
    """
    parameters = rows * groups_in_row(columns, entry.group_size)
    if entry.meta_bits is None:
        return 2 * parameters * (2 if zeros else 1)
    inner, pairs = row_bytes(parameters, entry.meta_bits), groups_in_row(parameters, META_GROUP)
    return inner + 8 * pairs + (inner + 4 * pairs if zeros else 0)


def grid_bytes(rows: int, columns: int, entry: PlanEntry) -> int:
    """Bytes of codes, scales and zeros."""
    return rows * row_bytes(columns, entry.bits) + scale_bytes(rows, columns, entry, zeros=not entry.sym)


def _anything(entry: PlanEntry) -> None:
    pass


def _outliers(weights: int, entry: PlanEntry) -> int:
    return round(entry.outlier_fraction * weights)


@dataclass(frozen=True)
class Method:
    """A way to find the codes of a matrix.

    Attributes:
        about: a line about it.
        solver: what stands for it in a plan's entry.
        quantize: does it to one matrix.
        needs: which of :data:`STATISTICS` it must be given; none for a method that looks at the weights alone.
        options: names and default values of its own settings, which a plan's entry may set.
        check: refuses the settings of an entry that the method cannot do, with an InvalidArgumentError.
        group_size: the only one there is; ``None`` for any.
        spread: how much of each matrix is outliers, from weights by name and the share of all matrices together;
            ``None`` for the same share everywhere.
        kept: how many of so many weights it keeps exactly by an entry.
        uniform: whether its codes are steps of a grid, which other tools have, too.
        nsamples, seqlen: windows of calibration text, and tokens in each where the model was built for so many, that
            it is given by default: what its authors take.
        dense_bytes: of what it stores beside outliers, for rows, columns and an entry, as far as these tell.
        input_scale: finds a scale of inputs for all matrices that read them, to be folded into what makes them. Such
            a method has the options ``scale`` and ``fold``, and is given matrices with the scale in their weights
            under ``scale`` false.
        objective: the error that it minimizes; ``None`` for a method that minimizes nothing.
        on_devices: whether ``quantize`` also takes weights that are on a CUDA device, and leaves the result there.
    """

    about: str
    solver: str
    quantize: Quantizer
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[PlanEntry], None] = _anything
    group_size: int | None = None
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
        """The line about it, with its options."""
        given = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return self.about + (f" ({given})" if given else "")

    def check_entry(self, entry: PlanEntry) -> None:
        """Refuse an entry that the method cannot do.

        Raises:
            InvalidArgumentError: naming the field or option.
        """
        for name, value in entry.options.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise InvalidArgumentError(f"options of {entry.solver} must be among {known}: got {name!r}")
            kind = type(self.options[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InvalidArgumentError(f"option {name} of {entry.solver} must be {kind.__name__}: got {value!r}")
        if self.group_size not in (None, entry.group_size):
            raise InvalidArgumentError(
                f"group_size of {entry.solver} must be {self.group_size}: got {entry.group_size}"
            )
        self.check(entry)

    def settings(self, entry: PlanEntry) -> dict[str, Any]:
        """The options of an entry, defaults included."""
        return {**self.options, **entry.options}


def squared(apart: torch.Tensor, statistics: Statistics) -> float:
    """Sum of the squared errors of the weights."""
    return float(apart.square_().sum())


def of_outputs(apart: torch.Tensor, statistics: Statistics) -> float:
    """Squared error of the outputs, mean over the tokens: the trace of E H E^T."""
    assert statistics.hessian is not None
    return float((apart @ statistics.hessian).mul_(apart).sum())


def kept_beside(weight: torch.Tensor, entry: PlanEntry, kept: torch.Tensor | None) -> SparseCSR | None:
    """The weights that stay exact beside a grid: those at the places, or the largest, as many as the entry says."""
    if kept is not None and len(kept):
        return ops.extract_outliers(weight, indices=kept)[1]
    if kept is None and _outliers(weight.numel(), entry):
        return ops.extract_outliers(weight, fraction=entry.outlier_fraction)[1]
    return None
