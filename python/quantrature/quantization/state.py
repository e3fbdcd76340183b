"""Save the quantized matrices of each finished block, so that an interrupted calibration can resume."""

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
"""Pattern of the file names, which also matches files that are being written."""


@dataclass(frozen=True)
class FinishedBlock:
    """The results for one block.

    Attributes:
        matrices: matrix name to quantized matrix.
        folds: scales that the matrices include, and that are folded into the layers that compute their inputs.
    """

    matrices: Mapping[str, QuantizedMatrix]
    folds: tuple[Fold, ...] = ()


@dataclass
class BlockState:
    """A folder with a file for each finished block.

    Attributes:
        folder: the folder; it is created when the first block is finished.
        resume: ``auto`` reads the finished blocks of the same work, if there are any; ``required`` fails if there are
            none; ``never`` starts over.
        fingerprint: model, text, plan and settings. A saved block is used only if its fingerprint is equal.
    """

    folder: Path
    resume: str = "auto"
    fingerprint: Mapping[str, Any] | None = None

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Set the fingerprint.

        Raises:
            InvalidArgumentError: if ``resume`` is ``required`` and the first block was not saved.
        """
        self.fingerprint = fingerprint
        if self.resume == "required" and self.load(0) is None:
            raise InvalidArgumentError(
                f"[quantize] resume is required, but {self.folder} holds no block of this model, text, plan and "
                "settings: set resume to auto to start over"
            )

    def _file(self, number: int) -> StateFile:
        return StateFile(self.folder / f"block-{number:05}.safetensors", self.fingerprint or {})

    def load(self, number: int) -> FinishedBlock | None:
        """Return a finished block; ``None`` if it is missing, damaged or of other work, or ``resume`` is ``never``."""
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
        """Save a finished block."""
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
        """Remove the saved blocks at the end, and the folder if it is empty then."""
        remove_with_folder({self.folder / path.name.removesuffix(".partial") for path in self.folder.glob(BLOCKS)})
