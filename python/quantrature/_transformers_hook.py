"""Make transformers know the format as soon as both are imported, in whatever order, without importing it for that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TRIGGER = "transformers.quantizers.auto"
"""The module of transformers that holds the registers; importing it registers the format."""


class _Watcher(MetaPathFinder):
    """Waits for TRIGGER to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave every import to others, but see to what follows that of TRIGGER."""
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    importlib.import_module(".hf", __package__)


def install() -> None:
    """Register now if transformers is there, otherwise when it comes."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
