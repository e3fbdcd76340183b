"""Set the weights of a model to points on the straight line from the original to the quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from .._C import cuda_device_count
from ..methods import Statistics, image_of
from ..models import Linears, LinearWeight
from ..models.ranks import rank_of
from ..plan import PlanEntry

Image = Callable[[], torch.Tensor]
"""Function that returns the quantized weights of a matrix as floats, (out_features, in_features).

It is called at every node, and the result is freed after use.
"""

CPU = torch.device("cpu")
SHARE_OF_DEVICE = 0.25
"""Fraction of a device's free memory that the original weights and the quantized matrices may use."""


def works_on(linear: LinearWeight) -> torch.device:
    """Return the device on which the core works on a matrix: the matrix's own if the core supports it, else the CPU."""
    device = linear.parameter.device
    return device if device.type == "cuda" and cuda_device_count()[0] else CPU


def homes_of(linears: Iterable[LinearWeight], folder: Path | None = None) -> dict[str, torch.device]:
    """Choose where to keep the original weights and the quantized form of each matrix: on its device, or on the CPU.

    On a device, they need a copy of the matrix, and its codes of at most one byte per weight. If that is more than a
    quarter of the device's free memory, all matrices of this device are kept on the CPU. The rest is needed for the
    sums of gradients, which are float32 and take at least as much, and for forward and backward passes. The choice does
    not change the results.

    Args:
        linears: the matrices.
        folder: folder for files with the original weights; if given, everything is kept on the CPU.

    Returns:
        Matrix name to device.
    """
    wanted: dict[torch.device, int] = {}
    linears = list(linears)
    for linear in linears:
        device = works_on(linear)
        wanted[device] = wanted.get(device, 0) + linear.numel * (linear.parameter.element_size() + 1)
    there = {
        device
        for device, needed in wanted.items()
        if folder is None and device != CPU and needed <= SHARE_OF_DEVICE * _free(device)
    }
    return {linear.name: device if (device := works_on(linear)) in there else CPU for linear in linears}


def _free(device: torch.device) -> int:
    """Return the free memory of a device in bytes, including memory that torch reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass(frozen=True)
class Moved:
    """A matrix whose weights a :class:`WeightPath` moves.

    Attributes:
        linear: the matrix.
        image: function that returns its quantized weights.
        home: device on which its original weights are kept and its quantized weights are computed.
    """

    linear: LinearWeight
    image: Image
    home: torch.device = CPU

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.linear.name

    @property
    def device(self) -> torch.device:
        """Device on which its gradients are summed."""
        return works_on(self.linear)

    def stored_image(self) -> torch.Tensor:
        """Return the quantized weights in the order of the parameter: transposed for GPT-2."""
        image = self.image()
        return image.mT.contiguous() if self.linear.transposed else image


class WeightPath:
    """Sets a model's weights to points v(t) between the original weights w (t = 0) and the quantized w~ (t = 1).

    v(t) = w + t * (w~ - w) is computed in float32 and rounded to the dtype of the parameter. All matrices move
    together. The original weights are kept in their own dtype. At the end of the ``with`` block they are restored, bit
    for bit.

    Args:
        model: the model, on any device.
        moved: the matrices to move.
        folder: folder for memory-mapped files with the original weights; ``None`` keeps them in memory.
    """

    def __init__(self, model: torch.nn.Module, moved: Sequence[Moved], folder: Path | None = None) -> None:
        self.model = model
        self.moved = list(moved)
        self._folder = folder
        self._originals: dict[str, torch.Tensor] = {}
        self._by_name = {m.name: m for m in self.moved}

    def __enter__(self) -> WeightPath:
        for number, m in enumerate(self.moved):
            weight = self._in_model(m)
            kept = (
                new_on_cpu(weight.shape, weight.dtype, self._folder, f"original-{number:05d}", named=False)
                if m.home == CPU
                else torch.empty_like(weight, memory_format=torch.contiguous_format)
            )
            self._originals[m.name] = kept.copy_(weight)
        return self

    def __exit__(self, *_: object) -> None:
        self.move_to(0)
        self._originals.clear()

    @staticmethod
    def _in_model(m: Moved) -> torch.Tensor:
        return m.linear.stored(m.linear.parameter.detach())

    def original(self, m: Moved) -> torch.Tensor:
        """Return the original weights of a matrix, on its home device, in the order of the parameter."""
        return self._originals[m.name]

    def ends(self, m: Moved, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the original and the quantized weights of a matrix on a device, in the order of the parameter."""
        return self.original(m).to(device), m.stored_image().to(device)

    def of(self, linear: LinearWeight) -> Moved:
        """Return the entry of ``moved`` for a matrix of the model."""
        return self._by_name[linear.name]

    def move_to(self, t: float) -> None:
        """Set the weights of every matrix to v(t)."""
        for m in self.moved:
            place, original = self._in_model(m), self.original(m)
            if t == 0:
                place.copy_(original)
            elif place.device == m.home and place.is_contiguous():
                ops.interpolate(original, m.stored_image(), t, place)
            else:  # computed on the home device; the results are the same bits on every device
                place.copy_(ops.interpolate(original, m.stored_image(), t))


def new_on_cpu(
    shape: torch.Size, dtype: torch.dtype, folder: Path | None, name: str, *, named: bool = True
) -> torch.Tensor:
    """Return a tensor of zeros on the CPU, in memory or in a memory-mapped file.

    Args:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        folder: folder of the file; ``None`` for memory.
        name: name of the file; with ``torch.distributed``, each process adds its rank.
        named: whether the file stays in the folder; if false, it is deleted together with the tensor.
    """
    if folder is None:
        return torch.zeros(shape, dtype=dtype)
    rank, ranks = rank_of()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"{name}-of-rank-{rank}" if ranks > 1 else name)
    file.unlink(missing_ok=True)
    mapped = torch.from_file(str(file), shared=True, size=shape.numel(), dtype=dtype).view(shape)
    if not named:
        file.unlink()
    return mapped


def towards(
    linears: Linears,
    homes: Mapping[str, torch.device],
    entries: Mapping[str, PlanEntry],
    given: Mapping[str, Statistics],
) -> list[Moved]:
    """Quantize matrices as their plan entries say, each on its device in ``homes``, and return what a path moves."""
    moved = []
    for name, entry in entries.items():
        linear = linears.find(name)
        home = homes[linear.name]
        moved.append(Moved(linear, image_of(name, linear.weight.to(home), entry, given.get(name)), home))
    return moved
