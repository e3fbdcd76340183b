"""What a bench has measured so far, in a file: a run that was cut short goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Notes:
    """Rows and figures that survive the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def of(self, key: str, make: Callable[[], Any]) -> Any:
        """What was noted, or is found and noted now."""
        if key not in self.known:
            self.known[key] = make()
            self.path.write_text(json.dumps(self.known, indent=1))
        return self.known[key]
