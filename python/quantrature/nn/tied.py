"""Further places at which a model uses the weight of a quantized layer."""

from __future__ import annotations

import torch
from torch import nn

from .._C import InvalidArgumentError
from .layers import QuantLayer
from .names import IN_MODULES
from .product import linear


class Tied(nn.Module):
    """Stands where a model uses the weight of a quantized layer under a further name; the weight is held only once.

    Args:
        layer: holds the weight.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, or its buffers would be saved under this name, too

    @property
    def layer(self) -> QuantLayer:
        """What holds the weight.

        Raises:
            InvalidArgumentError: when a device map leaves it on disk.
        """
        layer = self._layer[0]
        if layer.get_buffer(IN_MODULES).is_meta:
            raise InvalidArgumentError(
                "[linear] a quantized weight that is used under several names must be on a device: the device_map has "
                "it on disk"
            )
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """As :attr:`QuantLayer.weight`."""
        return self.layer.weight


class TiedEmbedding(Tied):
    """A further place at which a model looks up tokens in the same table."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As :meth:`QuantEmbedding.forward`."""
        found: torch.Tensor = self.layer(ids)
        return found


class TiedLinear(Tied):
    """A linear layer that multiplies with the weight of another one, or with the table of a token embedding.

    Args:
        layer: holds the weight.
        bias: the bias, a parameter of shape (out_features,), or ``None``.
    """

    def __init__(self, layer: QuantLayer, bias: nn.Parameter | None = None) -> None:
        super().__init__(layer)
        self.out_features, self.in_features = layer.spec.shape
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X times the weight, plus bias; see :func:`quantrature.nn.product.linear`."""
        layer = self.layer
        device = layer.get_buffer(IN_MODULES).device
        y = linear(x.to(device), layer._in_order(), layer._description, None).to(x.device)
        return y if self.bias is None else y + self.bias
