"""The folder of a run that goes on where it was interrupted, and when it may."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from .._C import InvalidArgumentError

RESUME = ("auto", "required", "never")


def check_resume(caller: str, resume: str, folder: str | os.PathLike[str] | None) -> None:
    """Refuse settings that say nothing of where an interrupted run goes on.

    Args:
        caller: public function that was called, for the message.
        resume: one of ``RESUME``.
        folder: the ``resume_folder``.

    Raises:
        InvalidArgumentError: for another ``resume``, ``required`` without a folder, or a folder that is a file.
    """
    if resume not in RESUME:
        raise InvalidArgumentError(f"[{caller}] resume must be one of {', '.join(RESUME)}: got {resume!r}")
    if folder is None and resume == "required":
        raise InvalidArgumentError(f"[{caller}] resume='required' needs a resume_folder to resume from")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise InvalidArgumentError(f"[{caller}] resume_folder must be a folder: {folder} is a file")


def remove_with_folder(files: Iterable[Path]) -> None:
    """Remove what an interrupted run left behind, and its folder, unless something else is in it."""
    for file in files:
        file.unlink(missing_ok=True)
        file.with_name(f"{file.name}.partial").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.parent.rmdir()
