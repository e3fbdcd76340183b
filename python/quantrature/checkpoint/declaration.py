"""What a quantized model says of itself, so that it is saved, and loaded again, as a quantized one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..packed import MatrixSpec

Listener = Callable[[Any, Mapping[str, MatrixSpec], tuple[Any, ...]], None]
"""Is told a model, the description of each of its quantized matrices, and the scales that were folded into it
(:class:`quantrature.models.folding.Fold`)."""

_listeners: list[Listener] = []


def on_quantized(listener: Listener) -> Listener:
    """Have a function told of every model that is quantized; a decorator."""
    _listeners.append(listener)
    return listener


def tell(model: Any, specs: Mapping[str, MatrixSpec], folds: tuple[Any, ...] = ()) -> None:
    """Tell all listeners what a model has become."""
    for listener in _listeners:
        listener(model, specs, folds)
