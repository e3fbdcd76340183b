"""A device where there is none: CPU tensors that say they are on ``cuda:0`` and mix with no others.

What a real device refuses is refused: operations on tensors of both kinds, NumPy's view, and so on. The core takes
them to the backend that ``QUANTRATURE_CUDA_PLUGIN`` names, which runs its kernels on the host (tests/cuda_on_host).
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
"""Bytes of its memory."""


class OnDevice(torch.Tensor):
    """A tensor of the device; what is computed from it is, too."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


class _Device(TorchFunctionMode):
    """For what is not computed from tensors of the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


READ_OTHERS = (torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__)
"""What a device does with tensors of the CPU: copy them, and take them for places."""


def _compute(function: Any, args: Any, kwargs: Any) -> Any:
    if function == torch.Tensor.backward:  # whose hooks compute, too
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
    """A hook that sees where tensors are, within the backward pass of tensors that do not say it."""

    def seeing(x: torch.Tensor) -> None:
        with _Device():
            hook(x)

    return seeing


def on_device(x: torch.Tensor) -> torch.Tensor:
    """A copy there."""
    return x.detach().clone().as_subclass(OnDevice)


@contextlib.contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While inside, ``cuda:0`` is there, for tensors and for the core."""

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
    """The model with all that it has on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(on_device(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_device(buffer)
    return model
