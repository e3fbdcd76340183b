"""Make transformers and PEFT know quantrature as soon as they are imported, before it or after it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TRIGGERS = {"transformers.quantizers.auto": ".transformers", "peft.tuners.lora.model": ".peft"}
"""Modules that hold the registers, and the module of quantrature that registers when it is imported."""


class _Watcher(MetaPathFinder):
    """Waits for a trigger to be imported."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave every import to others, but see to what follows that of the trigger."""
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(fullname)

            loader.exec_module = execute_and_register
        return spec


def _register(trigger: str) -> None:
    importlib.import_module(TRIGGERS[trigger], __package__)


def install() -> None:
    """Register with what is there now, with the rest when it comes."""
    waiting = {finder.trigger for finder in sys.meta_path if isinstance(finder, _Watcher)}
    for trigger in TRIGGERS:
        if trigger in sys.modules:
            _register(trigger)
        elif trigger not in waiting:
            sys.meta_path.insert(0, _Watcher(trigger))
