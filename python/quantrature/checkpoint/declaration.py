"""Callbacks that run when a model has been quantized, so that integrations can mark it as quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..packed import MatrixSpec

Listener = Callable[[Any, Mapping[str, MatrixSpec], tuple[Any, ...]], None]
"""Callback. Arguments: the model, the description of each quantized matrix, and the scales that were folded into the
model (:class:`quantrature.models.folding.Fold`)."""

_listeners: list[Listener] = []


def on_quantized(listener: Listener) -> Listener:
    """Register a callback for every model that is quantized; a decorator."""
    _listeners.append(listener)
    return listener


def tell(model: Any, specs: Mapping[str, MatrixSpec], folds: tuple[Any, ...] = ()) -> None:
    """Call all registered callbacks for a quantized model."""
    for listener in _listeners:
        listener(model, specs, folds)
