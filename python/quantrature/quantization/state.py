"""What an interrupted calibration leaves behind: the quantized matrices of each finished block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._C import InvalidArgumentError
from ..files.resume import StateFile, remove_with_folder
from ..models.folding import Fold
from ..packed import MatrixSpec, QuantizedMatrix, digest

BLOCKS = "block-?????.safetensors*"
"""Names of the files, partial ones included."""


@dataclass(frozen=True)
class FinishedBlock:
    """What is known of a block whose matrices are quantized.

    Attributes:
        matrices: matrix name to its quantized form.
        folds: scales that the matrices have and that are folded into what makes their inputs.
    """

    matrices: Mapping[str, QuantizedMatrix]
    folds: tuple[Fold, ...] = ()


@dataclass
class BlockState:
    """A folder with a file for each finished block.

    Attributes:
        folder: made when the first block is finished.
        resume: ``auto`` takes up blocks that fit if there are some, ``required`` fails without, ``never`` starts over.
        fingerprint: what must be equal for a block to be of use: model, text, plan, settings.
    """

    folder: Path
    resume: str = "auto"
    fingerprint: Mapping[str, Any] | None = None

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Say what the blocks must belong to.

        Raises:
            InvalidArgumentError: when resuming is required and there is no first block.
        """
        self.fingerprint = fingerprint
        if self.resume == "required" and self.load(0) is None:
            raise InvalidArgumentError(f"[quantize] resume is required, but {self.folder} holds no block of this work")

    def _file(self, number: int) -> StateFile:
        return StateFile(self.folder / f"block-{number:05}.safetensors", self.fingerprint or {})

    def load(self, number: int) -> FinishedBlock | None:
        """A finished block; ``None`` if there is none, or of other work, or it is damaged."""
        found = None if self.resume == "never" else self._file(number).read()
        if found is None:
            return None
        about, stored = found
        try:
            matrices = {}
            for name, described in about["matrices"].items():
                spec = MatrixSpec.from_json(described)
                tensors = {part: stored[f"{name}:{part}"] for part, _, _ in spec.layout()}
                if digest(tensors) != spec.digest:
                    return None
                matrices[name] = spec.matrix(tensors)
            folds = [Fold.from_json(described, stored[f"fold:{i}"]) for i, described in enumerate(about["folds"])]
        except (InvalidArgumentError, KeyError, TypeError, ValueError):
            return None
        return FinishedBlock(matrices, tuple(folds))

    def save(self, number: int, block: FinishedBlock) -> None:
        """Write a finished block."""
        specs = {name: MatrixSpec.of(matrix) for name, matrix in block.matrices.items()}
        tensors = {
            f"{name}:{part}": tensor.contiguous()
            for name, matrix in block.matrices.items()
            for part, tensor in specs[name].tensors(matrix).items()
        }
        tensors |= {f"fold:{i}": each.scale for i, each in enumerate(block.folds)}
        about = {
            "folds": [each.to_json() for each in block.folds],
            "matrices": {name: spec.to_json() for name, spec in specs.items()},
        }
        self._file(number).write(about, tensors)

    def discard(self) -> None:
        """Remove the blocks, and the folder where nothing else is in it: the work is complete."""
        remove_with_folder({self.folder / path.name.removesuffix(".partial") for path in self.folder.glob(BLOCKS)})
