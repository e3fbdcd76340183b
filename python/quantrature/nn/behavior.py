"""Make a quantized model behave as transformers expects: configuration, dtype, device, resizing of embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._C import UnsupportedError
from .layers import QuantLayer, quantized_layers
from .tied import Tied


class DtypeAndDevice(nn.Module):
    """Holds an empty parameter, from which transformers reads dtype and device if a model has no other parameter.

    The parameter is not part of the state dict.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def settle(model: nn.Module) -> None:
    """Make a model with quantized layers behave as transformers expects of a quantized model.

    Its configuration is marked as quantized. ``dtype`` and ``device`` work even if no floating-point parameter is left.
    Resizing a quantized embedding raises an error.
    """
    layers = quantized_layers(model)
    if layers and not any(parameter.is_floating_point() for parameter in model.parameters()):
        first = next(iter(layers.values()))
        model.add_module("dtype_and_device", DtypeAndDevice(first.dtype, first.device))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inner: Any = module
            inner.config._is_quantized = True
            if _quantized_ends(inner):
                inner.resize_token_embeddings = RefuseToResize(inner)


def _quantized_ends(model: Any) -> list[str]:
    """Return which of token embedding and output embedding are quantized, by name."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    return [name for name, module in model.named_modules() if isinstance(module, QuantLayer | Tied) and module in ends]


class RefuseToResize:
    """Replaces ``resize_token_embeddings`` of a model whose token or output embedding is quantized.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Return the token embedding if its size does not change.

        Raises:
            UnsupportedError: if the size would change; the message names the quantized embedding.
        """
        embedding = self.model.get_input_embeddings()
        rows = embedding.weight.shape[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == rows:
            return embedding
        names = " and ".join(_quantized_ends(self.model))
        raise UnsupportedError(
            f"[embedding] {names} cannot be resized, because it is quantized: got new_num_tokens={wanted}, but the "
            f"table has {rows} rows; resize before you quantize, or call model.dequantize() first"
        )


def unsettle(model: nn.Module) -> None:
    """Undo :func:`settle`."""
    if isinstance(getattr(model, "dtype_and_device", None), DtypeAndDevice):
        del model.dtype_and_device
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inner: Any = module
            vars(inner.config).pop("_is_quantized", None)
            vars(inner).pop("resize_token_embeddings", None)
