"""Save the state of an analysis from time to time, so that an interrupted analysis can resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..files.resume import StateFile


@dataclass
class Snapshot:
    """A file with the accumulators of an integral and the number of finished units.

    Attributes:
        path: the safetensors file.
        fingerprint: model, calibration text and settings. A saved state is used only if its fingerprint is equal.
        resume: ``auto`` reads a saved state of the same work, if there is one; ``required`` fails if there is none;
            ``never`` starts over.
        caller: name of the public function that was called, for messages.
        every: least number of seconds between two saves. If saving is slow, the time between two saves is at least 20
            times as long as a save takes.
    """

    path: Path
    fingerprint: Mapping[str, Any]
    resume: str = "auto"
    caller: str = "analyze"
    every: float = 60.0
    _due: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._due = time.monotonic() + self.every

    def restore(self, sums: Mapping[str, torch.Tensor], signed: dict[str, float]) -> int:
        """Read the saved state into the accumulators.

        Args:
            sums: accumulators, which are overwritten.
            signed: matrix name to the sum of signed S_i, which is updated.

        Returns:
            Number of finished units; 0 if there is no saved state of this work.

        Raises:
            InvalidArgumentError: if ``resume`` is ``required`` and there is no saved state of this work.
        """
        found = None if self.resume == "never" else self._file.read()
        if found is None or not ({"done", "signed"} <= found[0].keys() and sums.keys() <= found[1].keys()):
            if self.resume == "required":
                raise InvalidArgumentError(
                    f"[{self.caller}] resume is required, but {self.path} holds no state of this model, text and "
                    "settings: set resume to auto to start over"
                )
            return 0
        state, tensors = found
        for name, total in sums.items():
            total.copy_(tensors[name])
        signed.update(state["signed"])
        return int(state["done"])

    def save(
        self, done: int, sums: Mapping[str, torch.Tensor], signed: Mapping[str, float], last: bool = False
    ) -> None:
        """Save the state after ``done`` units, unless the previous save is too recent; always if ``last``."""
        started = time.monotonic()
        if not last and started < self._due:
            return
        self._file.write({"done": done, "signed": dict(signed)}, sums)
        now = time.monotonic()
        self._due = now + max(self.every, 20 * (now - started))

    def discard(self) -> None:
        """Remove the file, once the integral is complete."""
        self._file.discard()

    @property
    def _file(self) -> StateFile:
        return StateFile(self.path, self.fingerprint)
