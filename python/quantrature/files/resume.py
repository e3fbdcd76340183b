"""The state of an interrupted run: tensors and a JSON object in one file, which is written atomically."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._C import InvalidArgumentError

if TYPE_CHECKING:
    import torch

RESUME = ("auto", "required", "never")
"""``auto`` resumes if there is a state of the same run, ``required`` fails without one, ``never`` starts over."""


def check_resume(caller: str, resume: str, folder: str | os.PathLike[str] | None) -> None:
    """Check the arguments ``resume`` and ``resume_folder``.

    Args:
        caller: name of the public function, for messages.
        resume: one of ``RESUME``.
        folder: the ``resume_folder``.

    Raises:
        InvalidArgumentError: for another ``resume``, ``required`` without a folder, or a folder that is a file.
    """
    if resume not in RESUME:
        raise InvalidArgumentError(f"[{caller}] resume must be one of {', '.join(RESUME)}: got {resume!r}")
    if folder is None and resume == "required":
        raise InvalidArgumentError(f"[{caller}] resume_folder must be given with resume='required': got None")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise InvalidArgumentError(f"[{caller}] resume_folder must be a folder: {folder} is a file")


def remove_with_folder(files: Iterable[Path]) -> None:
    """Remove the state files of a run, and their folder if it is then empty."""
    for file in files:
        file.unlink(missing_ok=True)
        file.with_name(f"{file.name}.partial").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.parent.rmdir()


@dataclass(frozen=True)
class StateFile:
    """A file with the state of a run.

    Attributes:
        path: the safetensors file.
        fingerprint: model, text and settings of the run. A state with another fingerprint is not used.
    """

    path: Path
    fingerprint: Mapping[str, Any]

    def read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Return the last state; ``None`` if there is none, or it is damaged or of another run."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                if state.pop("fingerprint") != json.loads(json.dumps(self.fingerprint)):
                    return None
                return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError):
            return None

    def write(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a new state, replacing the old one."""
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {"fingerprint": self.fingerprint, **state}
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(dict(tensors), partial, metadata={"state": json.dumps(about)})
        os.replace(partial, self.path)

    def discard(self) -> None:
        """Remove the file, and its folder if it is then empty. Call this when the run is complete."""
        remove_with_folder([self.path])
