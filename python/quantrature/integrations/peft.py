"""LoRA adapters of the package PEFT (arXiv 2106.09685) on quantized layers.

If this module is imported, PEFT puts a :class:`LoraQuantLinear` on each quantized linear layer that a ``LoraConfig``
selects, also with ``target_modules="all-linear"``. ``import quantrature`` imports it as soon as PEFT is imported
(:mod:`quantrature.integrations._import_hook`). PEFT's own import may not be finished then, so this module imports only
those modules of PEFT that are complete.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._C import InvalidArgumentError, UnsupportedError
from ..methods import METHODS, Statistics, quantize_matrix
from ..nn import QuantEmbedding, QuantLayer, QuantLinear, Tied, TiedEmbedding, TiedLinear
from ..nn.experts import SplitExperts, fuse
from ..packed import CodebookSpec, GridSpec, MatrixSpec, QuantizedMatrix, TrellisSpec
from ..plan import PlanEntry

_log = logging.getLogger(__name__)

_UNSUPPORTED = ("use_dora", "lora_bias")
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that do not change the weights of the layer."""


def prepare(config: LoraConfig) -> LoraConfig:
    """Check that quantized layers support a LoRA configuration, before the adapters are created.

    Calling it is optional: without it, PEFT raises the same error at the first quantized layer.

    Returns:
        The same configuration.

    Raises:
        UnsupportedError: for a setting that needs floating-point weights in the layer.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name, False):
            raise UnsupportedError(
                f"[adapters] {name} needs floating-point weights, which quantized layers do not have; remove it"
            )
    start = config.init_lora_weights
    if not any(start is known or start == known for known in _INITIAL):
        raise UnsupportedError(
            f"[adapters] init_lora_weights must be one of {', '.join(map(str, _INITIAL))} on quantized layers, because "
            f"other values change the layer's weights: got {start!r}"
        )
    return config


class LoraQuantLinear(Linear):
    """A quantized linear layer with LoRA adapters.

    After ``model.dequantize()``, adapters can be merged as into any linear layer. To merge into a quantized layer, see
    :meth:`merge`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, *more: Any, **settings: Any
    ) -> None:
        prepare(config)
        with warnings.catch_warnings():  # PEFT does not know the class, but all that it reads from it is there
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(base_layer, adapter_name, config, *more, **settings)
        self.fan_in_fan_out = bool(getattr(self.get_base_layer(), "transposed", False))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the weight of the layer.

        The sum of a quantized weight and an adapter must be quantized again. With ``safe_merge``, the weight is
        dequantized, the adapter added, and the sum quantized with the same bits, group size, scale dtypes and outlier
        positions, without calibration (method mse). This loses accuracy a second time; the relative change of the
        weights is logged at level INFO. To merge without loss, call ``model.dequantize()`` first.

        Args:
            safe_merge: whether to quantize the merged weight again; required for a quantized layer.
            adapter_names: names of the adapters; by default the active ones.

        Raises:
            UnsupportedError: for a quantized layer without ``safe_merge``, and for a weight that the model uses in
                several layers (tied embeddings).
            InvalidArgumentError: if the merged weights are not finite; the layer is then unchanged.
        """
        base = self.get_base_layer()
        if not isinstance(base, QuantLayer | Tied):
            super().merge(safe_merge, adapter_names)
            return
        self.check_merge(safe_merge)
        assert isinstance(base, QuantLayer)
        names = [
            name
            for name in tuners_utils.check_adapters_to_merge(self, adapter_names) or ()
            if name in self.lora_A and name not in self.merged_adapters
        ]
        if not names:
            return
        weight = base.dequantize(torch.float32)
        for name in names:
            delta = self.get_delta_weight(name).to(weight)
            weight += delta.mT if self.fan_in_fan_out else delta
        if not weight.isfinite().all():
            raise InvalidArgumentError(f"[adapters] merging {', '.join(names)} would give weights that are not finite")
        matrix = requantized(base.matrix, weight)
        error = float((matrix.dequantize("float32").to(weight) - weight).norm() / weight.norm())
        setting = base.spec.dense.setting
        _log.info(
            "merged %s into a layer (%s): quantizing again changed the weights by %.2e (relative)",
            ", ".join(names),
            setting,
            error,
        )
        warnings.warn(
            "adapters are merged into quantized weights, which are then quantized again without calibration; the "
            "logger quantrature.integrations.peft reports the change of each layer at level INFO",
            stacklevel=2,
        )
        base.become(matrix)
        self.merged_adapters.extend(names)

    def check_merge(self, safe_merge: bool) -> None:
        """Raise the errors that :meth:`merge` raises for the layer in its current state."""
        base = self.get_base_layer()
        if isinstance(base, Tied):
            raise UnsupportedError(
                "[adapters] adapters of a layer that shares its weight with another layer (tied embeddings) cannot be "
                "merged: call model.dequantize() first, or leave the layer out of target_modules"
            )
        if isinstance(base, QuantLayer) and not safe_merge:
            raise UnsupportedError(
                "[adapters] adapters cannot be merged into quantized weights directly: call model.dequantize() first, "
                "which loses nothing; or merge with safe_merge=True, which quantizes the sum again and loses accuracy"
            )

    def unmerge(self) -> None:
        """Remove merged adapters from the weight.

        Raises:
            UnsupportedError: for a quantized layer, because the weight before the merge is lost.
        """
        if self.merged and isinstance(self.get_base_layer(), QuantLayer):
            raise UnsupportedError(
                "[adapters] adapters merged into quantized weights cannot be unmerged; load the model again"
            )
        super().unmerge()


def requantized(matrix: QuantizedMatrix, weight: torch.Tensor) -> QuantizedMatrix:
    """Quantize a weight with the bits, group size, kinds of scales and tables, and outlier positions of a matrix.

    Args:
        matrix: the quantized matrix whose settings are used.
        weight: float32 tensor (out_features, in_features), on the device of the matrix.

    Raises:
        UnsupportedError: for a stored form that no quantization method makes.
    """
    spec = MatrixSpec.of(matrix).dense
    kept = None if matrix.outliers is None else matrix.outliers.positions().cpu()
    statistics = None
    if isinstance(spec, GridSpec):
        entry = PlanEntry(spec.bits, spec.group_size, spec.sym, "mse", _meta_bits(spec.scale))
    elif isinstance(spec, CodebookSpec) and spec.codebook in METHODS:
        assert spec.group_size is not None
        entry = PlanEntry(spec.bits, spec.group_size, False, spec.codebook, _meta_bits(spec.scale))
    elif isinstance(spec, CodebookSpec) and spec.codebook == "rows":
        entry = PlanEntry(spec.bits, METHODS["squeezellm"].group_size or -1, method="squeezellm")
        statistics = Statistics(fisher=torch.ones(weight.shape))  # all weights count alike
    elif isinstance(spec, TrellisSpec):
        options = {"state_bits": spec.state_bits, "code": spec.code}
        entry = PlanEntry(spec.bits, METHODS["qtip"].group_size or -1, method="qtip", options=options)
        statistics = Statistics(hessian=torch.eye(weight.shape[1]))
    else:
        raise UnsupportedError(f"[adapters] a weight stored as {spec.setting} cannot be quantized again")
    exact = weight.cpu().to(getattr(torch, spec.dtype))
    scale = matrix.input_scale
    inner = exact if scale is None else (weight / scale).cpu().to(exact.dtype)
    places = torch.empty(0, dtype=torch.int64) if kept is None else kept
    found = quantize_matrix("the merged weight", inner.contiguous(), entry, places, statistics)
    if matrix.outliers is not None:  # these act on the inputs as they are
        found = replace(found, outliers=replace(matrix.outliers, values=exact.flatten()[places]))
    return replace(found, input_scale=scale)


def _meta_bits(scale: Any) -> int | None:
    return scale.bits if isinstance(scale, GridSpec) else None


def _register() -> None:
    """Patch PEFT so that it finds quantized layers and wraps them."""
    of_lora: Any = lora_model
    of_all: Any = tuners_utils
    default, all_linear = of_lora.dispatch_default, of_all._maybe_include_all_linear_layers
    inject, unload = of_all.BaseTuner.inject_adapter, of_all.BaseTuner._unload_and_optionally_merge
    named: dict[int, tuple[set[str], dict[str, Any]]] = {}  # what a configuration said before PEFT changed it

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *more: Any, **settings: Any) -> Any:
        config = self.peft_config[adapter_name]
        _check_trained_copies(config, model)
        if _expert_lists(model):
            # PEFT takes names of experts for those of fused parameters, which quantized experts have not.
            patterns = {name: dict(getattr(config, name, None) or {}) for name in ("rank_pattern", "alpha_pattern")}
            named[id(config)] = _layers_named(config, model), patterns
        try:
            return inject(self, model, adapter_name, *more, **settings)
        finally:
            named.pop(id(config), None)

    def include(peft_config: Any, model: nn.Module) -> Any:
        asked = getattr(peft_config, "target_modules", None)
        found = all_linear(peft_config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            found.target_modules |= _quantized_linears(model)
        if id(peft_config) in named:
            fused = [name for name in _parameters(found) if _lists_named(name, model)]
            found.target_parameters = [name for name in _parameters(found) if name not in fused] or None
            layers, patterns = named[id(peft_config)]
            found.target_modules = layers | _experts_of(fused, model)
            vars(found).update(patterns)
        return found

    def dispatch(target: nn.Module, adapter_name: str, config: LoraConfig, *more: Any, **settings: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(base, QuantLinear | TiedLinear):
            return LoraQuantLinear(target, adapter_name, config, *more, **settings)
        if isinstance(base, QuantEmbedding | TiedEmbedding):
            raise UnsupportedError(
                "[adapters] a quantized token embedding cannot have an adapter: leave it out of target_modules, or "
                "quantize without embedding_bits"
            )
        return default(target, adapter_name, config, *more, **settings)

    def unload_and_fuse(
        self: Any, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        for module in self.model.modules():
            if merge and isinstance(module, LoraQuantLinear):
                module.check_merge(safe_merge)  # before anything is merged
        found = unload(self, merge, progressbar, safe_merge, adapter_names)
        fuse(self.model)  # experts that became dense while there were adapters on them
        return found

    of_all.BaseTuner._unload_and_optionally_merge = unload_and_fuse
    of_all.BaseTuner.inject_adapter = inject_adapter
    of_lora.dispatch_default = dispatch
    of_all._maybe_include_all_linear_layers = include


def _expert_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of quantized expert layers, by the name of the fused parameter that each replaces."""
    return {
        f"{name}.{attribute}": layers
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for attribute, layers in module.lists.items()
    }


def _lists_named(parameter: str, model: nn.Module) -> list[str]:
    return [name for name in _expert_lists(model) if name == parameter or name.endswith(f".{parameter}")]


def _layers_named(config: Any, model: nn.Module) -> set[str]:
    """Return the full names of the modules that a configuration selects, with each expert of a list by itself."""
    asked: Any = getattr(config, "target_modules", None) or ()
    every = isinstance(asked, str) and asked.lower() == "all-linear"

    def means(name: str) -> bool:
        if isinstance(asked, str):
            return re.fullmatch(asked, name) is not None
        return any(name == ending or name.endswith(f".{ending}") for ending in asked)

    lists = _expert_lists(model)
    found = _quantized_linears(model) if every else set()
    output = _output_of(model)
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D | QuantLinear | TiedLinear)
        if (not (every or name in lists) and means(name)) or (every and linear and module is not output):
            found.add(name)
    return found | _experts_of([name for name in lists if not every and means(name)], model)


def _experts_of(parameters: Iterable[str], model: nn.Module) -> set[str]:
    """Return the names of all expert layers whose list has one of these names, or a name that ends with it."""
    lists = _expert_lists(model)
    wanted = {name for parameter in parameters for name in _lists_named(parameter, model)}
    return {f"{name}.{i}" for name in wanted for i in range(len(lists[name]))}


def _output_of(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _quantized_linears(model: Any) -> set[str]:
    """Return the names of quantized linear layers, except the output embedding and layers that have adapters."""
    output = _output_of(model)
    inside = [name for name, module in model.named_modules() if isinstance(module, tuners_utils.BaseTunerLayer)]
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | TiedLinear)
        and module is not output
        and not any(name.startswith(f"{wrapped}.") for wrapped in inside)
    }


def _check_trained_copies(config: Any, model: nn.Module) -> None:
    """Check that PEFT would not train a copy of a quantized layer, or of some of its rows.

    Raises:
        UnsupportedError: for a setting that would; the message names the setting and the layer.
    """
    tokens = getattr(config, "trainable_token_indices", None)
    settings = {
        "modules_to_save": getattr(config, "modules_to_save", None) or (),
        "trainable_token_indices": () if not tokens else tokens if isinstance(tokens, dict) else ("embed_tokens",),
        "target_parameters": [name.removesuffix(".weight") for name in _parameters(config)],
    }
    for name, module in model.named_modules():
        if not isinstance(module, QuantLayer | Tied):
            continue
        for setting, ends in settings.items():
            if any(name == end or name.endswith(f".{end}") for end in ends):
                raise UnsupportedError(
                    f"[adapters] {setting} names {name}, which is quantized and cannot be trained: remove it from "
                    f"{setting}, or do not quantize this layer (ignore)"
                )


def _parameters(config: Any) -> list[str]:
    return list(getattr(config, "target_parameters", None) or ())


_register()
