"""A tensor with the shape, dtype and device of a weight, whose values are computed only when they are used."""

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
"""Operators that use the shape, dtype and device of a tensor, but not its values."""


class LazyWeight(torch.Tensor):
    """The float weight of a layer that stores it in another form.

    Reading dtype, shape or device computes no values. Each operation on the values computes them again. Reading a
    single row (``weight[i]``) computes only this row.

    Args:
        shape, dtype, device: of the weight.
        make: function that returns the values of a slice of rows, or of all for ``None``.
        write: function that is called with the name of an operation that would write to the weight. It may raise; if
            it returns, the operation is skipped.
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
        """Create the tensor, without memory for values."""
        made: LazyWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._make, made._write = make, write
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def of(self, make: Callable[[slice | None], torch.Tensor]) -> bool:
        """Return whether the values are computed by the function ``make``."""
        return self._make == make

    def data_ptr(self) -> int:
        """Return a number that identifies the layer of the weight; it is not an address, as there is no memory."""
        return id(getattr(self._make, "__self__", self._make))

    @property
    def data(self) -> LazyWeight:
        """The same weight, outside of autograd. Setting it counts as writing."""
        return LazyWeight(tuple(self.shape), self.dtype, self.device, self._make, self._write)

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        self._write("an assignment to data")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute the values and run an operator on them."""
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
