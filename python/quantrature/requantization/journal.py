"""How far a ReQuant has come, in a file, so that an interrupted one goes on with the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..analysis.snapshot import Snapshot
from ..files.resume import StateFile, check_resume
from ..models.ranks import of_first_rank, rank_of

Found = tuple[Any, dict[str, torch.Tensor]]
"""What a step found out: something that JSON can hold, and tensors by matrix name."""


class Journal:
    """What the steps have found out so far, and the state of the integral that is being taken.

    Under ``torch.distributed`` the first process keeps the journal for all, and each the state of its own integral.

    Args:
        path: of the journal, and the beginning of the names of integrals' states; ``None`` keeps nothing.
        about: what must be equal for either to be of use.
        resume: ``auto`` takes up what fits, ``required`` fails where nothing does, ``never`` starts over.

    Raises:
        InvalidArgumentError: for another resume.
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any], resume: str) -> None:
        check_resume("requant", resume)
        if path is None and resume == "required":
            raise InvalidArgumentError("[requant] resume='required' needs a state_file to resume from")
        self._path = None if path is None else Path(path)
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
        return Snapshot(self._integral, {**self._about, "step": step, "nodes": nodes}, resume)

    def discard(self) -> None:
        """Remove the files: the work is done."""
        if self._path is not None:
            self._integral.unlink(missing_ok=True)
            if self._keeps:
                self._path.unlink(missing_ok=True)

    @property
    def _integral(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.integral{self._of_rank}")

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
