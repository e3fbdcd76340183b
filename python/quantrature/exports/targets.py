"""All export targets by name."""

from __future__ import annotations

from .mlx import MLX
from .target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (MLX,)}
"""Export targets; one file each."""
