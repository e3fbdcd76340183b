"""Register quantrature with transformers and PEFT, whether these are imported before or after it."""

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
"""Module to wait for to the module of quantrature that registers the integration when it is imported."""


class _Watcher(MetaPathFinder):
    """An import hook that waits until a module is imported."""

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find no module itself; after the module to wait for has been imported, import the integration."""
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
    """Register with the packages that are imported already, and with the others when they are imported."""
    waiting = {finder.trigger for finder in sys.meta_path if isinstance(finder, _Watcher)}
    for trigger in TRIGGERS:
        if trigger in sys.modules:
            _register(trigger)
        elif trigger not in waiting:
            sys.meta_path.insert(0, _Watcher(trigger))
