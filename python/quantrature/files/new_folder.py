"""A folder that appears complete or not at all."""

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
    """A folder to write into that becomes ``folder`` when the ``with`` block ends well, and vanishes otherwise.

    What a killed process left behind is a hidden ``.NAME.partial`` beside it, which the next attempt removes.

    Raises:
        InvalidArgumentError: when the folder is a file, or is there, not empty, and not to be overwritten.
        QuantratureError: when the disk is full.
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
    """Refuse an output folder that holds something; asked before long work starts.

    Raises:
        InvalidArgumentError: naming the folder.
    """
    target = Path(folder)
    if target.is_file():
        raise InvalidArgumentError(f"[save] {target} is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InvalidArgumentError(f"[save] {target} exists and is not empty; it is only replaced with overwrite")
