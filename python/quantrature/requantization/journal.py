"""How far a ReQuant has come, in a folder, so that an interrupted one goes on with the same bits."""

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
"""What a step found out: something that JSON can hold, and tensors by matrix name."""


class Journal:
    """What the steps have found out so far, and the state of the integral that is being taken.

    Under ``torch.distributed`` the first process keeps the journal for all, and each the state of its own integral.

    Args:
        folder: of the journal and of the states of integrals; ``None`` keeps nothing.
        about: what must be equal for either to be of use.
        resume: ``auto`` takes up what fits, ``required`` fails where nothing does, ``never`` starts over.
        caller: public function that was called, for messages.

    Raises:
        InvalidArgumentError: for another resume, or ``required`` without a folder.
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
        """What a step found out, or finds out now."""
        if step not in self._found:
            self._found[step] = make()
            if self._path is not None and self._keeps:
                self._write(self._path)
        return self._found[step]

    def snapshot(self, step: str, nodes: int) -> Snapshot | None:
        """Where the integral of a step keeps its state."""
        if self._path is None:
            return None
        resume = "auto" if self._found and self._resume == "required" else self._resume
        return Snapshot(self._integral, {**self._about, "step": step, "nodes": nodes}, resume, self._caller)

    def discard(self) -> None:
        """Remove the files: the work is done."""
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
