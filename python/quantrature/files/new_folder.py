"""Create an output folder atomically: it appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .._C import InvalidArgumentError, QuantratureError


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to write into. It is renamed to ``folder`` at the end, or removed after an error.

    A killed process leaves a hidden folder ``.NAME.partial`` beside it, which the next attempt removes.

    Raises:
        InvalidArgumentError: if ``folder`` is a file, or is not empty and ``overwrite`` is false.
        QuantratureError: if the disk is full.
    """
    target = Path(folder)
    check_new_folder(target, overwrite)
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise QuantratureError(f"[save] the disk is full; nothing was written to {target}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Check an output folder before long work starts.

    Raises:
        InvalidArgumentError: if ``folder`` is a file, or is not empty and ``overwrite`` is false.
    """
    target = Path(folder)
    if target.is_file():
        raise InvalidArgumentError(f"[save] {target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InvalidArgumentError(f"[save] {target} exists and is not empty; set overwrite to replace it")
