"""LoRA adapters of the package PEFT (arXiv 2106.09685) on quantized layers."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners import lora

from ._C import UnsupportedError
from .nn import QuantLinear

_UNSUPPORTED = ("use_dora", "lora_bias")


def prepare(config: LoraConfig) -> LoraConfig:
    """Tell PEFT, by a configuration, how adapters go on quantized layers; plain layers are wrapped as ever.

    To be called before ``get_peft_model(model, config)`` and ``model.add_adapter(config)``, and, as PEFT does not write
    it down, on a configuration that was loaded again: ``PeftModel.from_pretrained(model, folder,
    config=prepare(LoraConfig.from_pretrained(folder)))``. ``target_modules`` must name the layers: PEFT's
    ``"all-linear"`` looks for its own list of classes.

    Args:
        config: it is changed.

    Returns:
        The same configuration.

    Raises:
        UnsupportedError: for a setting that needs the weights of the layer to be plain numbers.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name, False):
            raise UnsupportedError(f"[adapters] {name} needs plain weights, which quantized layers have not")
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


class LoraQuantLinear(lora.Linear):
    """A quantized layer and the adapters on top of it. They are never merged: the sum would not be on the grid."""

    def __init__(self, base_layer: QuantLinear, *arguments: Any, **settings: Any) -> None:
        with warnings.catch_warnings():  # PEFT does not know the class, but all that it reads from it is there
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, *arguments, **settings)

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "[adapters] adapters cannot be merged into quantized weights: dequantize the model first"
        )
