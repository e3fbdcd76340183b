"""What a strategy answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..plan.option import Option


@dataclass(frozen=True)
class Choice:
    """What a strategy chose for each matrix, why, and what is to be said of the whole."""

    options: list[Option]
    reasons: list[str]
    about: dict[str, Any]
