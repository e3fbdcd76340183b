"""What a name that is not known may have been meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'bits'?`` with the known name that is most similar, for the end of a message; or nothing."""

    def likeness(other: str) -> float:
        """Of the whole, or of the beginning: ``outliers`` is much like ``outlier_fraction``."""
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in (other, other[: len(name)]))

    best = max(known, key=likeness, default=None)
    return f"; did you mean {best!r}?" if best is not None and likeness(best) > 0.5 else ""
