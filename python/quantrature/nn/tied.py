"""Tied weights: modules that use the weight of a quantized layer elsewhere in the model."""

from __future__ import annotations

import torch
from torch import nn

from .._C import InvalidArgumentError
from .layers import QuantLayer
from .names import IN_MODULES
from .product import linear


class Tied(nn.Module):
    """Uses the weight of a quantized layer under another name. The weight is stored only once.

    Args:
        layer: the layer that holds the weight.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, or its buffers would be saved under this name, too

    @property
    def layer(self) -> QuantLayer:
        """The layer that holds the weight.

        Raises:
            InvalidArgumentError: if a device map has offloaded the layer to disk.
        """
        layer = self._layer[0]
        if layer.get_buffer(IN_MODULES).is_meta:
            raise InvalidArgumentError(
                "[linear] a quantized weight that several layers use must be on a device: the device_map has it on "
                "disk; change the device_map"
            )
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """As :attr:`QuantLayer.weight`."""
        return self.layer.weight


class TiedEmbedding(Tied):
    """A token embedding that uses the table of another one."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As :meth:`QuantEmbedding.forward`."""
        found: torch.Tensor = self.layer(ids)
        return found


class TiedLinear(Tied):
    """A linear layer that uses the weight of another one, or the table of a token embedding.

    Args:
        layer: the layer that holds the weight.
        bias: parameter of shape (out_features,), or ``None``.
    """

    def __init__(self, layer: QuantLayer, bias: nn.Parameter | None = None) -> None:
        super().__init__(layer)
        self.out_features, self.in_features = layer.spec.shape
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x``, (..., in_features), with the weight and add the bias; returns (..., out_features)."""
        layer = self.layer
        device = layer.get_buffer(IN_MODULES).device
        y = linear(x.to(device), layer._in_order(), layer._description, None).to(x.device)
        return y if self.bias is None else y + self.bias
