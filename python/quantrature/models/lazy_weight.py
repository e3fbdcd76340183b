"""A tensor that has the shape, dtype and device of a weight at once, and its values when they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default}
_ONLY_THE_KIND = {
    getattr(_aten, f"{values}{ending}")
    for values, ending in [
        *((values, "_like") for values in ("empty", "zeros", "ones", "full", "rand", "randn")),
        *((values, "") for values in ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")),
    ]
}
"""Operators that take shape, dtype and device from a tensor, but no values."""


class LazyWeight(torch.Tensor):
    """The weight of a layer that does not keep it in this form.

    Code that reads dtype, shape or device gets those of the float weight. Code that computes with it gets the values,
    which are made anew for each operation; code that takes a single row (``weight[i]``) gets that one alone.

    Args:
        shape, dtype, device: of the weight.
        make: gives the values of some rows, or of all for ``None``.
        write: is told the name of an operation that would write to the weight, which is then left out. It may raise.
    """

    _is_hf_initialized = True  # transformers must not draw random values for it
    _make: Callable[[slice | None], torch.Tensor]
    _write: Callable[[str], None]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[slice | None], torch.Tensor],
        write: Callable[[str], None],
    ) -> LazyWeight:
        """Make the tensor, which has no memory."""
        made: LazyWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._make, made._write = make, write
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def of(self, make: Callable[[slice | None], torch.Tensor]) -> bool:
        """Whether this is the weight that a function makes."""
        return self._make == make

    def data_ptr(self) -> int:
        """A number that weights of the same layer have in common, and others have not; there is no memory."""
        return id(getattr(self._make, "__self__", self._make))

    @property
    def data(self) -> LazyWeight:
        """The same weight, outside of autograd; setting it is a change."""
        return LazyWeight(tuple(self.shape), self.dtype, self.device, self._make, self._write)

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        self._write("an assignment to data")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operator on the values."""
        named = kwargs or {}
        if func in _SAME:
            weight = args[0]
            return cls(tuple(weight.shape), weight.dtype, weight.device, weight._make, weight._write)
        if func is _aten.select.int and args[1] == 0:
            row = args[2] % len(args[0])
            return args[0]._make(slice(row, row + 1))[0]
        for i, argument in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) else named.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, LazyWeight):
                given._write(func.overloadpacket.__name__)
                return given
        values = _placeholder if func.overloadpacket in _ONLY_THE_KIND else _values
        return func(*tree_map_only(LazyWeight, values, args), **tree_map_only(LazyWeight, values, named))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _values(weight: LazyWeight) -> torch.Tensor:
    return weight._make(None)


def _placeholder(weight: LazyWeight) -> torch.Tensor:
    return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
