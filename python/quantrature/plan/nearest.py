"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'bits'?`` with the most similar known name, or an empty string if none is similar."""

    def likeness(other: str) -> float:
        """Similarity, 0 to 1, to the whole name or to its beginning: ``outliers`` is close to ``outlier_fraction``."""
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in (other, other[: len(name)]))

    best = max(known, key=likeness, default=None)
    return f"; did you mean {best!r}?" if best is not None and likeness(best) > 0.5 else ""
