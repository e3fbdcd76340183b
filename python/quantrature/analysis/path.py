"""The straight way from a model's weights to their quantized images, and gradients along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from .._C import cuda_device_count
from ..models import LinearWeight
from ..models.ranks import rank_of

Image = Callable[[], torch.Tensor]
"""Makes the quantized image of a weight, (out_features, in_features); called at every node and dropped after use."""


@dataclass(frozen=True)
class Moved:
    """A weight matrix on its way: where it is, and how to make its quantized image."""

    linear: LinearWeight
    image: Image

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.linear.name

    @property
    def device(self) -> torch.device:
        """Where its gradients are added up: where the model has it, if the core works there, else the CPU."""
        device = self.linear.parameter.device
        return device if device.type == "cuda" and cuda_device_count()[0] else torch.device("cpu")

    def stored_image(self) -> torch.Tensor:
        """The quantized image in the order the parameter stores it."""
        image = self.image()
        return image.mT.contiguous() if self.linear.transposed else image


class WeightPath:
    """Puts a model's weights anywhere between the originals (t = 0) and their quantized images (t = 1).

    v(t) = w + t * (w~ - w) is formed in float32 and rounded to the parameter's dtype. All matrices move together.
    The originals are kept on the CPU in their own dtype and come back, bit for bit, when the ``with`` block ends.

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
            kept = new_on_cpu(weight.shape, weight.dtype, self._folder, f"original-{number:05d}", named=False)
            self._originals[m.name] = kept.copy_(weight)
        return self

    def __exit__(self, *_: object) -> None:
        self.move_to(0)
        self._originals.clear()

    @staticmethod
    def _in_model(m: Moved) -> torch.Tensor:
        return m.linear.stored(m.linear.parameter.detach())

    def original(self, m: Moved) -> torch.Tensor:
        """The matrix as it was, on the CPU, in the order the parameter stores it."""
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
            elif place.device.type == "cpu":
                ops.interpolate(original, m.stored_image(), t, place)
            else:  # formed where the core runs: the same bits on every device
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
