"""Read JSON files, with one-line errors that name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .._C import InvalidArgumentError


class _RepeatedFieldError(Exception):
    """A field is there twice; :mod:`json` would take the last one."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields, each of which must be there once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedFieldError(repr(next(name for name in names if names.count(name) > 1)))
    return made


def read_json(path: str | os.PathLike[str], op: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        op: name of the public function, for messages.

    Raises:
        InvalidArgumentError: if the file cannot be read or is not JSON; the message names the file and line.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_object)
    except OSError as e:
        raise InvalidArgumentError(f"[{op}] cannot read {path}: {e.strerror}") from None
    except json.JSONDecodeError as e:
        raise InvalidArgumentError(f"[{op}] {path} is not JSON: {e.msg} in line {e.lineno}") from None
    except UnicodeDecodeError as e:
        raise InvalidArgumentError(f"[{op}] {path} is not JSON: byte {e.start} is not UTF-8") from None
    except _RepeatedFieldError as e:
        raise InvalidArgumentError(f"[{op}] {path} has the field {e} twice in one object") from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; lists in lists in lists
        raise InvalidArgumentError(
            f"[{op}] {path} is nested too deeply, or has a number that is too long: {e}"
        ) from None


def read_format(path: str | os.PathLike[str], op: str, name: str, version: int) -> dict[str, Any]:
    """Return the content of a JSON file that must have the given format name and version.

    Raises:
        InvalidArgumentError: as for :func:`read_json`, and for another format or version.
    """
    data = read_json(path, op)
    if not isinstance(data, dict) or data.get("format") != name or data.get("format_version") != version:
        raise InvalidArgumentError(
            f"[{op}] {path} is not of the format {name}, version {version}, which this release reads"
        )
    return data
