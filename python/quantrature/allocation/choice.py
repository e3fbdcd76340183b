"""The result of a strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..plan.option import Option


@dataclass(frozen=True)
class Choice:
    """The option that a strategy chose for each matrix, the reasons, and notes on the whole plan."""

    options: list[Option]
    reasons: list[str]
    about: dict[str, Any]
