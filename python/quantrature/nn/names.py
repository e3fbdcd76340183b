"""What the codes of a quantized matrix are called: ``weight`` in files, ``codes`` in modules.

In files they have the name of the weight that they stand for, so that a reader which expects a plain weight fails on
their shape, (bytes,). In modules ``weight`` is what models read: :attr:`quantrature.nn.QuantLayer.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers.core_model_loading import WeightRenaming

IN_FILES, IN_MODULES = "weight", "codes"


class CodesAreCalledWeight(WeightRenaming):
    """The name of the codes of some matrices in files, ``weight``, and in modules, ``codes``.

    Args:
        names: of the matrices.
        source_patterns, target_patterns: the two names; by default from those in files to those in modules.
    """

    __slots__ = ("names",)

    def __init__(
        self, names: Iterable[str], source_patterns: str = IN_FILES, target_patterns: str = IN_MODULES
    ) -> None:
        super().__init__(source_patterns, target_patterns)
        self.names = frozenset(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name of a tensor, and the pattern if it is the codes of one of the matrices."""
        name, _, part = source_key.rpartition(".")
        if part != self.source_patterns[0] or name not in self.names:
            return source_key, None
        self._was_used = True
        return f"{name}.{self.target_patterns[0]}", part

    def reverse_transform(self) -> CodesAreCalledWeight:
        """The way back, for saving."""
        return CodesAreCalledWeight(self.names, self.target_patterns[0], self.source_patterns[0])
