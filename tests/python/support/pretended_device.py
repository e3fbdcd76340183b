"""Simulate a CUDA device on a machine without one: CPU tensors that report ``cuda:0`` as their device.

Operations that fail on a real device fail here, too: mixing these tensors with CPU tensors, ``numpy()``, and so on. The
core passes the tensors to the backend in ``QUANTRATURE_CUDA_PLUGIN``, whose kernels are compiled for the CPU
(tests/cuda_on_host).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from quantrature.ops import _arrays

CUDA = torch.device("cuda", 0)
FREE = 1 << 40
"""Memory of the simulated device in bytes."""


class OnDevice(torch.Tensor):
    """A tensor on the simulated device; results of operations on it are on the device, too."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


class _Device(TorchFunctionMode):
    """Handles functions without a tensor on the device among their arguments, such as ``torch.zeros(device=...)``."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


READ_OTHERS = (torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__)
"""Operations that a real device allows with CPU tensors as arguments: copying them, and indexing with them."""


def _compute(function: Any, args: Any, kwargs: Any) -> Any:
    if function == torch.Tensor.backward:  # gradient hooks run operations, too
        with torch._C.DisableTorchFunctionSubclass():
            root = args[0].as_subclass(torch.Tensor)
        return torch.autograd.backward(root)
    if function == torch.Tensor.register_post_accumulate_grad_hook:
        args = args[0], _in_sight(args[1])
    inputs = tree_leaves((args, kwargs))
    there = any(isinstance(x, OnDevice) for x in inputs)
    if isinstance(kwargs.get("device"), str):
        kwargs = {**kwargs, "device": torch.device(kwargs["device"])}
        inputs = tree_leaves((args, kwargs))
    where = [x for x in inputs if isinstance(x, torch.device)]
    with torch._C.DisableTorchFunctionSubclass():
        if function == torch.Tensor.device.__get__ and there:
            return CUDA
        if function == torch.Tensor.is_cuda.__get__:
            return there
        if function == torch.Tensor.numpy and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function in READ_OTHERS:
            there = isinstance(args[0], OnDevice)
        elif there and any(isinstance(x, torch.Tensor) and x.dim() and not isinstance(x, OnDevice) for x in inputs):
            raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
        if function == torch.Tensor.cpu:
            there = False
        elif where:
            there = where[0].type == "cuda"
        cpu = torch.device("cpu")
        args, kwargs = tree_map(lambda x: cpu if isinstance(x, torch.device) else x, (args, kwargs))
        found = function(*args, **kwargs)

        def placed(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice) == there:
                return x
            return x.as_subclass(OnDevice if there else torch.Tensor)

        return found if isinstance(found, torch.Size) else tree_map(placed, found)


def _in_sight(hook: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """Return a gradient hook that sees tensors on the simulated device, although the backward pass runs on the CPU."""

    def seeing(x: torch.Tensor) -> None:
        with _Device():
            hook(x)

    return seeing


def on_device(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor on the simulated device."""
    return x.detach().clone().as_subclass(OnDevice)


@contextlib.contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make ``cuda:0`` exist in a ``with`` block, for tensors and for the core."""

    def capsule(x: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            x = x.as_subclass(torch.Tensor)
            return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()

    monkeypatch.setattr(_arrays, "stream_of", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.utils.dlpack, "to_dlpack", capsule)
    with _Device():
        yield


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Move the parameters and buffers of a model to the simulated device, and return the model."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(on_device(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_device(buffer)
    return model
