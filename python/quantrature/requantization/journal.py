"""Save the results of finished ReQuant steps to a file, so that an interrupted run resumes with the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..analysis.snapshot import Snapshot
from ..files.resume import StateFile, check_resume, remove_with_folder
from ..models.ranks import of_first_rank, rank_of

Found = tuple[Any, dict[str, torch.Tensor]]
"""Result of a step: a value that JSON can store, and tensors by matrix name."""


class Journal:
    """The results of the finished steps, by name of the step, in memory and in a file.

    With ``torch.distributed``, the first process reads and writes the file for all processes. Each process saves the
    state of its own integral in a second file.

    Args:
        folder: folder of the files; ``None`` saves nothing.
        about: settings and fingerprints of the run. Files of a run with other settings or fingerprints are not used.
        resume: ``auto`` resumes from the files of this run, if there are any; ``required`` fails without them;
            ``never`` starts over.
        caller: name of the public function that was called, for messages.

    Raises:
        InvalidArgumentError: for another ``resume``, ``required`` without a folder, or a folder that is a file.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, about: Mapping[str, Any], resume: str, caller: str
    ) -> None:
        check_resume(caller, resume, folder)
        self._caller = caller
        self._path = None if folder is None else Path(folder) / "journal.safetensors"
        self._about = json.loads(json.dumps(about))
        self._resume = resume
        rank, ranks = rank_of()
        self._keeps = rank == 0
        self._of_rank = f".rank-{rank}-of-{ranks}" if ranks > 1 else ""
        self._found: dict[str, Found] = of_first_rank(self._read() if self._keeps else {})

    def __contains__(self, step: str) -> bool:
        return step in self._found

    def of(self, step: str, make: Callable[[], Found]) -> Found:
        """Return the recorded result of a step. If there is none, call ``make`` and record its result."""
        if step not in self._found:
            self._found[step] = make()
            if self._path is not None and self._keeps:
                self._write(self._path)
        return self._found[step]

    def snapshot(self, step: str, nodes: int) -> Snapshot | None:
        """Return the file for the state of a step's integral, with this number of nodes; ``None`` without a folder."""
        if self._path is None:
            return None
        resume = "auto" if self._found and self._resume == "required" else self._resume
        return Snapshot(self._integral, {**self._about, "step": step, "nodes": nodes}, resume, self._caller)

    def discard(self) -> None:
        """Remove the files. Call this when the run is complete."""
        if self._path is not None:
            remove_with_folder([self._integral, self._path] if self._keeps else [self._integral])

    @property
    def _integral(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f"integral{self._of_rank}.safetensors")

    def _read(self) -> dict[str, Found]:
        state = None if self._path is None or self._resume == "never" else StateFile(self._path, self._about).read()
        if state is None:
            return {}
        noted, tensors = state
        try:
            found: dict[str, Found] = {step: (value, {}) for step, value in noted["steps"].items()}
            for key, tensor in tensors.items():
                step, name = key.split("/", 1)
                found[step][1][name] = tensor
        except (AttributeError, KeyError, TypeError, ValueError):
            return {}
        return found

    def _write(self, path: Path) -> None:
        tensors = {f"{step}/{name}": t for step, (_, found) in self._found.items() for name, t in found.items()}
        steps = {step: value for step, (value, _) in self._found.items()}
        StateFile(path, self._about).write({"steps": steps}, tensors)
