"""Text that every Python installation has: the sources of its own standard library, split three ways.

A file belongs to one part by the CRC-32 of its path below the library's root, so a file that two Python
versions share is in the same part in both, and what was held out in training stays held out.
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
    """Return the files the demo model learns from, about four fifths of the library, joined in path order."""
    return _joined(path for path in _library_paths() if _checksum(path) % 10 > 1)


def calibration_text() -> str:
    """Return the tenth of the files set aside to calibrate quantizers on, which no weight was fitted to.

    They are joined in the order of their checksums, which is no order to a reader, so that the beginning of
    the text is a sample of it and not the library's first long module.
    """
    return _joined(_held_out(1))


def evaluation_text() -> str:
    """Return the tenth of the files set aside to measure perplexity on, which nothing was fitted to.

    They are joined in the same order as those of :func:`calibration_text`.
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
    """Return a file's text with line ends as newlines, or nothing where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
