"""Where an interrupted run goes on: tensors and a JSON object in one file, which appears whole or not at all."""

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
"""``auto`` goes on from what is there and fits, ``required`` fails without it, ``never`` starts over."""


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


@dataclass(frozen=True)
class StateFile:
    """A file with the state of a run.

    Attributes:
        path: the safetensors file.
        fingerprint: what must be equal for the state to be of use: model, text, settings.
    """

    path: Path
    fingerprint: Mapping[str, Any]

    def read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What was written last; ``None`` if there is nothing, or of another run, or it is damaged."""
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
        """Replace the file by a new state."""
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {"fingerprint": self.fingerprint, **state}
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(dict(tensors), partial, metadata={"state": json.dumps(about)})
        os.replace(partial, self.path)

    def discard(self) -> None:
        """Remove the file, and its folder unless something else is in it: the run is complete."""
        remove_with_folder([self.path])
