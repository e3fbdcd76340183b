"""Read the JSON files of the package: what is wrong with one is said in one line that names it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .._C import InvalidArgumentError


def read_json(path: str | os.PathLike[str], op: str) -> Any:
    """The content of a JSON file.

    Raises:
        InvalidArgumentError: beginning with op, naming the file that cannot be read, or the line where it is no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as e:
        raise InvalidArgumentError(f"[{op}] cannot read {path}: {e.strerror}") from None
    except json.JSONDecodeError as e:
        raise InvalidArgumentError(f"[{op}] {path} is not JSON: {e.msg} in line {e.lineno}") from None
    except UnicodeDecodeError as e:
        raise InvalidArgumentError(f"[{op}] {path} is not JSON: byte {e.start} is not UTF-8") from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; lists in lists in lists
        raise InvalidArgumentError(
            f"[{op}] {path} is nested too deeply, or has a number that is too long: {e}"
        ) from None


def read_format(path: str | os.PathLike[str], op: str, name: str, version: int) -> dict[str, Any]:
    """The same for an object that says of which format and version it is.

    Raises:
        InvalidArgumentError: likewise, and for another format or version.
    """
    data = read_json(path, op)
    if not isinstance(data, dict) or data.get("format") != name or data.get("format_version") != version:
        raise InvalidArgumentError(
            f"[{op}] {path} is not of the format {name}, version {version}, that this version reads"
        )
    return data
