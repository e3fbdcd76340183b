"""The straight way from a model's weights to their quantized images, and gradients along it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from .._C import cuda_device_count
from ..models import LinearWeight
from ..models.ranks import rank_of

Image = Callable[[], torch.Tensor]
"""Makes the quantized image of a weight, (out_features, in_features); called at every node and dropped after use."""

CPU = torch.device("cpu")
SHARE_OF_DEVICE = 0.25
"""Of a device's free memory that originals and stored forms may take."""


def works_on(linear: LinearWeight) -> torch.device:
    """Where the core can work on a matrix: where the model has it, or on the CPU."""
    device = linear.parameter.device
    return device if device.type == "cuda" and cuda_device_count()[0] else CPU


def homes_of(linears: Iterable[LinearWeight], folder: Path | None = None) -> dict[str, torch.device]:
    """Where the original of each matrix and its stored form are to be kept: beside the matrix, or on the CPU.

    Beside it they take no more than another copy of the matrix and its codes, at most a byte for each weight. On a
    device where that would be more than a quarter of the free memory they are kept on the CPU, all of them: the sums
    of gradients, in float32, take at least as much again, and passes need the rest. With a folder, where
    originals are in files, everything stays on the CPU. The numbers are the same either way.
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
    """Bytes that torch could get, or has and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass(frozen=True)
class Moved:
    """A weight matrix on its way: where it is, and how to make its quantized image.

    Attributes:
        linear: the matrix.
        image: makes its quantized image.
        home: where its original is kept, and images are made.
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
        """Where its gradients are added up."""
        return works_on(self.linear)

    def stored_image(self) -> torch.Tensor:
        """The quantized image in the order the parameter stores it."""
        image = self.image()
        return image.mT.contiguous() if self.linear.transposed else image


class WeightPath:
    """Puts a model's weights anywhere between the originals (t = 0) and their quantized images (t = 1).

    v(t) = w + t * (w~ - w) is formed in float32 and rounded to the parameter's dtype. All matrices move together.
    The originals are kept in their own dtype, each in its home, and come back, bit for bit, when the ``with`` block
    ends.

    Args:
        model: on any device.
        moved: its matrices.
        folder: keep the originals in files there, which the system pages, instead of in memory.
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
        """The matrix as it was, in its home, in the order the parameter stores it."""
        return self._originals[m.name]

    def ends(self, m: Moved, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix as it was and its quantized image, on a device, in the order the parameter stores them."""
        return self.original(m).to(device), m.stored_image().to(device)

    def of(self, linear: LinearWeight) -> Moved:
        """The matrix on its way, of a matrix of the model."""
        return self._by_name[linear.name]

    def move_to(self, t: float) -> None:
        """Put every matrix at v(t)."""
        for m in self.moved:
            place, original = self._in_model(m), self.original(m)
            if t == 0:
                place.copy_(original)
            elif place.device == m.home and place.is_contiguous():
                ops.interpolate(original, m.stored_image(), t, place)
            else:  # the same bits on every device
                place.copy_(ops.interpolate(original, m.stored_image(), t))


def new_on_cpu(
    shape: torch.Size, dtype: torch.dtype, folder: Path | None, name: str, *, named: bool = True
) -> torch.Tensor:
    """A tensor of zeros in memory, or in a file of a folder that the system pages.

    Args:
        shape, dtype: of the tensor.
        folder: ``None`` for memory.
        name: of the file; processes of one run have files of their own.
        named: leave the file there; else it goes with the tensor.
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
