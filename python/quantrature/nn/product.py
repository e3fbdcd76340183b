"""The torch operator ``quantrature::linear``: multiply activations with a quantized matrix.

If torch traces nothing and needs no gradient, as in decoding, :func:`linear` bypasses the operator, because torch's
dispatcher would take longer than a small product.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch.autograd import forward_ad

from .._C import InvalidArgumentError
from ..packed import MatrixSpec
from ..packed.product import FEW, PreparedMatrix


def describe(spec: MatrixSpec) -> str:
    """Return the description of a matrix as a string for the operator. Layers of equal layout have equal strings."""
    return json.dumps(replace(spec, digest="").to_json())


def linear(x: torch.Tensor, stored: list[torch.Tensor], description: str, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply ``x`` with the transposed matrix and add the bias, like ``F.linear`` with the dequantized matrix.

    The result differs from ``F.linear`` only by rounding. For a few rows, sums are computed as in
    :func:`quantrature.ops.matvec`, within its error bound, and rounded to the dtype of ``x`` once, after the bias. For
    many rows, torch multiplies with weights in the dtype of ``x`` (float32 if ``x`` is float16). Trellis codes are
    always multiplied in float32. The gradient with respect to ``x`` is computed in float32.

    Args:
        x: float32, bfloat16 or float16 tensor (..., in_features).
        stored: tensors of the matrix, in the order of its layout.
        description: description of the matrix from :func:`describe`.
        bias: tensor (out_features,), or ``None``.

    Returns:
        Tensor (..., out_features) in the dtype of ``x``.

    Raises:
        InvalidArgumentError: if the dtype or the last dimension of ``x`` is wrong.
    """
    if not torch.compiler.is_compiling():
        ready = ready_at_once(stored, description, x, bias)
        if ready is not None:
            return _multiplied(ready, x, bias)
    result: torch.Tensor = torch.ops.quantrature.linear(x, stored, description, bias)
    return result


@functools.cache
def spec_of(description: str) -> MatrixSpec:
    """Undo :func:`describe`: return the description from its string."""
    return MatrixSpec.from_json(json.loads(description))


_ADDRESS = torch.Tensor.data_ptr
_VERSION = attrgetter("_version")


def _versions(stored: Sequence[torch.Tensor]) -> list[int | None]:
    try:
        return list(map(_VERSION, stored))
    except RuntimeError:  # tensors of inference mode have none
        return [None if tensor.is_inference() else tensor._version for tensor in stored]


class _Kept:
    """A prepared matrix in the cache, with the stored tensors that it was made from.

    Args:
        stored: the tensors. The cache does not keep the codes alive.
        description: their description.
        forget: function to call with this object when the codes are freed.
    """

    def __init__(self, stored: Sequence[torch.Tensor], description: str, forget: Any) -> None:
        self.ready = _made(stored, description)
        self.description = description
        self.at_once = all(_is_plain(tensor) for tensor in stored)
        self._codes, self._others = weakref.ref(stored[0], lambda _: forget(self)), stored[1:]
        self._ids = list(map(id, stored))
        # The version tells of writing to a tensor, the address of other memory, as an assignment to .data gives it.
        self._versions, self._addresses = _versions(stored), list(map(_ADDRESS, stored))

    def is_of(self, stored: Sequence[torch.Tensor], description: str) -> bool:
        """Whether the matrix was made from these tensors and none has been modified since."""
        return (
            self._codes() is stored[0]
            and list(map(id, stored)) == self._ids
            and _versions(stored) == self._versions
            and list(map(_ADDRESS, stored)) == self._addresses
            and description == self.description
        )


# By the id of the tensor with the codes, with which it dies; casts, moves and loading make another tensor.
_prepared: dict[int, _Kept] = {}


def prepare(stored: Sequence[torch.Tensor], description: str) -> PreparedMatrix:
    """Prepare a matrix for products. The result is cached until its tensors are freed or modified."""
    key = id(stored[0])
    kept = _prepared.get(key)
    if kept is None or not kept.is_of(stored, description):

        def forget(dead: _Kept) -> None:
            if _prepared.get(key) is dead:
                del _prepared[key]

        kept = _prepared[key] = _Kept(stored, description, forget)
    return kept.ready


def ready_at_once(
    stored: Sequence[torch.Tensor], description: str, x: torch.Tensor, bias: torch.Tensor | None = None
) -> PreparedMatrix | None:
    """Return the cached matrix if a product can bypass the operator, else ``None``.

    It can for plain tensors on the CPU, while torch computes no gradient and runs no tracing, transform or profiler.
    """
    kept = _prepared.get(id(stored[0]))
    if (
        kept is None
        or not kept.at_once
        or not _is_plain(x)
        or _modes().raw_repr() not in _QUIET
        or _function_mode()
        or _profile()
        or forward_ad._current_level >= 0
        or not kept.is_of(stored, description)
    ):
        return None
    if bias is not None and not _is_plain(bias):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    return kept.ready


def _made(stored: Sequence[torch.Tensor], description: str) -> PreparedMatrix:
    spec = spec_of(description)
    # Not the tensors themselves: the codes would be kept alive by what is to die with them.
    names = (name for name, _, _ in spec.layout())
    matrix = spec.matrix({name: tensor.data for name, tensor in zip(names, stored, strict=True)})
    return spec.dense.prepared(matrix)


# What torch's dispatcher goes by. Tensors that are not strided, that negate, of other devices or of transforms such as
# vmap have other keys; modes that trace, transforms and jit.trace add keys to those of all tensors.
_keys = torch._C._dispatch_keys
_modes = torch._C._dispatch_tls_local_include_set
_function_mode = torch._C._is_torch_function_mode_enabled
_profile = torch._C._autograd._profiler_enabled
_PLAIN, _QUIET = set(), set()
for _inference in (False, True):
    with torch.inference_mode(_inference):
        _PLAIN.add(_keys(torch.empty(0, device="cpu")).raw_repr())
        _QUIET.add(_modes().raw_repr())


def _is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary strided CPU tensor, of no subclass."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and _keys(x).raw_repr() in _PLAIN


def _check(x: torch.Tensor, cols: int) -> None:
    if x.dtype not in FEW:
        raise InvalidArgumentError(f"[linear] x must be float32, float16 or bfloat16: got dtype={x.dtype}")
    if x.ndim == 0 or x.shape[-1] != cols:
        raise InvalidArgumentError(f"[linear] x must have shape (..., {cols}): got shape={tuple(x.shape)}")


def _multiplied(ready: PreparedMatrix, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    _check(x, ready.matrix.dense.shape[1])
    return ready.product(x, bias)


def _product(x: torch.Tensor, stored: list[torch.Tensor], description: str, bias: torch.Tensor | None) -> torch.Tensor:
    return _multiplied(prepare(stored, description), x, bias)


def _gradient_product(gradient: torch.Tensor, stored: list[torch.Tensor], description: str) -> torch.Tensor:
    ready = prepare(stored, description)
    rows, cols = ready.matrix.dense.shape
    total = ready.transposed_product(gradient.reshape(-1, rows).float())
    return total.to(gradient.dtype).view(*gradient.shape[:-1], cols)


def _fake(x: torch.Tensor, stored: list[torch.Tensor], description: str, bias: torch.Tensor | None) -> torch.Tensor:
    rows, cols = spec_of(description).shape
    _check(x, cols)
    return x.new_empty((*x.shape[:-1], rows))


def _fake_gradient(gradient: torch.Tensor, stored: list[torch.Tensor], description: str) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], spec_of(description).shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, stored, ctx.description, bias = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(*stored)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    of_x = of_bias = None
    stored = list(ctx.saved_tensors)
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.quantrature.linear_gradient(gradient, stored, ctx.description)
    if ctx.bias is not None and ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias)
    return of_x, [None] * len(stored), None, of_bias


library = torch.library.Library("quantrature", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
library.define("linear(Tensor x, Tensor[] stored, str description, Tensor? bias) -> Tensor", tags=_tags)
library.define("linear_gradient(Tensor gradient, Tensor[] stored, str description) -> Tensor", tags=_tags)
for _device in ("CPU", "CUDA"):
    library.impl("linear", _product, _device)
    library.impl("linear_gradient", _gradient_product, _device)
torch.library.register_fake("quantrature::linear", _fake, lib=library)
torch.library.register_fake("quantrature::linear_gradient", _fake_gradient, lib=library)
torch.library.register_autograd("quantrature::linear", _backward, setup_context=_keep, lib=library)
