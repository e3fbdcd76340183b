"""All export targets by name."""

from __future__ import annotations

from .compressed_tensors import COMPRESSED_TENSORS
from .gguf import GGUF
from .mlx import MLX
from .target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (MLX, COMPRESSED_TENSORS, GGUF)}
"""Export targets; one file each."""
