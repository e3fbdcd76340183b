"""What an interrupted analysis leaves behind, so that the next one goes on from there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError
from .resume_folder import remove_with_folder


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
        state = self._read()
        if state is None:
            if self.resume == "required":
                raise InvalidArgumentError(
                    f"[{self.caller}] resume is required, but {self.path} holds no state of this work"
                )
            return 0
        tensors, done, shares = state
        for name, total in sums.items():
            total.copy_(tensors[name])
        signed.update(shares)
        return done

    def _read(self) -> tuple[dict[str, torch.Tensor], int, dict[str, float]] | None:
        from safetensors import SafetensorError, safe_open

        if self.resume == "never" or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["state"])
                if about["fingerprint"] != json.loads(json.dumps(self.fingerprint)):
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, about["done"], about["signed"]  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(
        self, done: int, sums: Mapping[str, torch.Tensor], signed: Mapping[str, float], last: bool = False
    ) -> None:
        """Save the state after `done` units, unless the previous saving is too recent."""
        from safetensors.torch import save_file

        started = time.monotonic()
        if not last and started < self._due:
            return
        state = {"fingerprint": self.fingerprint, "done": done, "signed": dict(signed)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(dict(sums), partial, metadata={"state": json.dumps(state)})
        os.replace(partial, self.path)
        now = time.monotonic()
        self._due = now + max(self.every, 20 * (now - started))

    def discard(self) -> None:
        """Remove the file: the integral is complete."""
        remove_with_folder([self.path])
