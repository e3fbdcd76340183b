"""Rename the codes of a quantized matrix: ``weight`` in files, ``codes`` in modules.

In files the codes have the name of the weight that they replace, so that a reader that expects a dense weight fails on
their shape, (bytes,). In modules the name ``weight`` is used by :attr:`quantrature.nn.QuantLayer.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers.core_model_loading import WeightRenaming

IN_FILES, IN_MODULES = "weight", "codes"


class CodesAreCalledWeight(WeightRenaming):
    """Renames the codes of these matrices from ``weight``, in files, to ``codes``, in modules.

    Args:
        names: names of the matrices.
        source_patterns, target_patterns: old and new name; by default from files to modules.
    """

    __slots__ = ("names",)

    def __init__(
        self, names: Iterable[str], source_patterns: str = IN_FILES, target_patterns: str = IN_MODULES
    ) -> None:
        super().__init__(source_patterns, target_patterns)
        self.names = frozenset(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the new name of a tensor, and the pattern if the tensor holds the codes of one of the matrices."""
        name, _, part = source_key.rpartition(".")
        if part != self.source_patterns[0] or name not in self.names:
            return source_key, None
        self._was_used = True
        return f"{name}.{self.target_patterns[0]}", part

    def reverse_transform(self) -> CodesAreCalledWeight:
        """Return the reverse renaming, for saving."""
        return CodesAreCalledWeight(self.names, self.target_patterns[0], self.source_patterns[0])
