"""Write Python code into a folder, so that transformers can load it without an import of quantrature."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

REMOTE_CODE = "modeling_quantrature"
"""Name of the Python file, without its suffix."""


def write_remote_code(folder: Path, name: str, auto_classes: Iterable[str]) -> None:
    """Write the Python file, and name it in config.json for the auto classes of the transformers class ``name``."""
    (folder / f"{REMOTE_CODE}.py").write_text(
        f"import quantrature  # registers the format\nimport transformers\n\n\n"
        f"class {name}(transformers.{name}):\n    pass\n"
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {auto: f"{REMOTE_CODE}.{name}" for auto in auto_classes}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
