"""Save the measurements of a bench to a file, so that an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Notes:
    """Measurements by key, in a JSON file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def of(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the saved measurement. If there is none, call ``make`` and save its result."""
        if key not in self.known:
            self.known[key] = make()
            self.path.write_text(json.dumps(self.known, indent=1))
        return self.known[key]
