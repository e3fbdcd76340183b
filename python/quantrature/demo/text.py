"""Text of the demo: the source code of Python's standard library, split into three parts.

The CRC-32 of a file's path inside the library selects its part. So a file is in the same part in all Python versions,
and files that were held out in training stay held out.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def training_text() -> str:
    """Return the training text: about 80 percent of the library's files, joined in path order."""
    return _joined(path for path in _library_paths() if _checksum(path) % 10 > 1)


def calibration_text() -> str:
    """Return the calibration text: about 10 percent of the library's files, which the model was not trained on.

    Files are joined in the order of their checksums, which is random in effect. So the beginning of the text is a
    sample of all files, and not the library's first long module.
    """
    return _joined(_held_out(1))


def evaluation_text() -> str:
    """Return the evaluation text: about 10 percent of the library's files, used in neither training nor calibration.

    Files are joined in the order of their checksums, as in :func:`calibration_text`.
    """
    return _joined(_held_out(0))


def _held_out(part: int) -> list[str]:
    return sorted((path for path in _library_paths() if _checksum(path) % 10 == part), key=_checksum)


def _checksum(path: str) -> int:
    return zlib.crc32(path.encode())


def _joined(paths: Iterable[str]) -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return "".join(_text(root / path) for path in paths)


def _library_paths() -> list[str]:
    """Return the library's source files as sorted slash-separated paths below its root."""
    return sorted(_walk(Path(sysconfig.get_paths()["stdlib"])))


def _walk(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _text(path: Path) -> str:
    """Return a file's text with ``\\n`` line ends; an empty string if the file is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
