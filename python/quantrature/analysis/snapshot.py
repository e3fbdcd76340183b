"""What an interrupted analysis leaves behind, so that the next one goes on from there."""

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
    """A file with the accumulators and how far they have come.

    Attributes:
        path: the safetensors file.
        fingerprint: what must be equal for the state to be of use: model, calibration, settings.
        resume: ``auto`` takes up a fitting snapshot if there is one, ``required`` fails without, ``never`` starts over.
        caller: public function that was called, for messages.
        every: least seconds between two savings; there are more where saving would take over a twentieth of the time.
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
        """Fill the accumulators; returns how many units they hold.

        Raises:
            InvalidArgumentError: when resuming is required and no fitting snapshot exists.
        """
        found = None if self.resume == "never" else self._file.read()
        if found is None or not ({"done", "signed"} <= found[0].keys() and sums.keys() <= found[1].keys()):
            if self.resume == "required":
                raise InvalidArgumentError(
                    f"[{self.caller}] resume is required, but {self.path} holds no state of this work"
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
        """Save the state after `done` units, unless the previous saving is too recent."""
        started = time.monotonic()
        if not last and started < self._due:
            return
        self._file.write({"done": done, "signed": dict(signed)}, sums)
        now = time.monotonic()
        self._due = now + max(self.every, 20 * (now - started))

    def discard(self) -> None:
        """Remove the file: the integral is complete."""
        self._file.discard()

    @property
    def _file(self) -> StateFile:
        return StateFile(self.path, self.fingerprint)
