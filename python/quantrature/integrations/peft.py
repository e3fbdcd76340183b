"""LoRA adapters of the package PEFT (arXiv 2106.09685) on quantized layers.

Importing this module makes PEFT put :class:`LoraQuantLinear` on quantized linear layers, for any ``LoraConfig``,
``target_modules="all-linear"`` included. ``import quantrature`` does so once PEFT is there
(:mod:`quantrature.integrations._import_hook`). This may be in the middle of PEFT's own import, so only those of its
modules that are complete by then are imported.
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
"""Initial adapters that leave the weights of the layer alone."""


def prepare(config: LoraConfig) -> LoraConfig:
    """Refuse a configuration that quantized layers cannot have, before a model is built for it.

    PEFT takes the configuration as it is; it refuses the same settings when it comes to the first quantized layer.

    Returns:
        The same configuration.

    Raises:
        UnsupportedError: for a setting that needs the weights of the layer to be plain numbers.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name, False):
            raise UnsupportedError(f"[adapters] {name} needs plain weights, which quantized layers have not")
    start = config.init_lora_weights
    if not any(start is known or start == known for known in _INITIAL):
        raise UnsupportedError(
            f"[adapters] init_lora_weights must be one of {', '.join(map(str, _INITIAL))} on quantized layers, whose "
            f"weights it must leave alone: got {start!r}"
        )
    return config


class LoraQuantLinear(Linear):
    """A quantized linear layer and the adapters on top of it.

    Once the layer is dense (``model.dequantize()``), adapters are merged into it as into any other. Into a quantized
    layer they are merged on request, see :meth:`merge`.
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
        """Add adapters to the weight of the layer.

        The sum of a quantized weight and an adapter is not on the grid. With ``safe_merge`` the weight is dequantized,
        added to and quantized again with the bits, groups and kinds of scales that it has, its outliers at the places
        where they are; grids are fitted without calibration (method mse). That costs accuracy, a second time: what it
        moved the weights by is logged at level INFO. ``model.dequantize()`` before the merge costs none.

        Args:
            safe_merge: quantize again.
            adapter_names: the adapters; by default those that are active.

        Raises:
            UnsupportedError: for a quantized layer without ``safe_merge``, and for a weight that has several places in
                the model.
            InvalidArgumentError: for adapters that are not finite; the layer is then as it was.
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
            raise InvalidArgumentError(f"[adapters] adapters {', '.join(names)} make weights that are not finite")
        matrix = requantized(base.matrix, weight)
        error = float((matrix.dequantize("float32").to(weight) - weight).norm() / weight.norm())
        setting = base.spec.dense.setting
        _log.info("merged %s into a layer (%s): quantizing again moved it by %.2e", ", ".join(names), setting, error)
        warnings.warn(
            "adapters are merged into quantized weights, which are quantized again without calibration; what that "
            "moves is logged for each layer by quantrature.integrations.peft, at level INFO",
            stacklevel=2,
        )
        base.become(matrix)
        self.merged_adapters.extend(names)

    def check_merge(self, safe_merge: bool) -> None:
        """Refuse what :meth:`merge` refuses for the layer as it is."""
        base = self.get_base_layer()
        if isinstance(base, Tied):
            raise UnsupportedError(
                "[adapters] adapters of a layer whose weight is that of another one, too (tied embeddings), cannot be "
                "merged: call model.dequantize() first, or leave the layer out of target_modules"
            )
        if isinstance(base, QuantLayer) and not safe_merge:
            raise UnsupportedError(
                "[adapters] adapters cannot be merged into quantized weights as they are: call model.dequantize() "
                "first, which loses nothing; or merge with safe_merge=True, which quantizes the sum again and loses "
                "accuracy by that"
            )

    def unmerge(self) -> None:
        """Take merged adapters out of the weight again.

        Raises:
            UnsupportedError: for a quantized layer, which does not have the weight from before the merge any more.
        """
        if self.merged and isinstance(self.get_base_layer(), QuantLayer):
            raise UnsupportedError("[adapters] what was merged into quantized weights cannot be taken out again")
        super().unmerge()


def requantized(matrix: QuantizedMatrix, weight: torch.Tensor) -> QuantizedMatrix:
    """Quantize another weight the way a matrix is: bits, groups, kinds of scales and tables, places of outliers.

    Args:
        matrix: tells how.
        weight: float32, (out_features, in_features), on the device of the matrix.

    Raises:
        UnsupportedError: for a stored form that no method makes.
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
        entry = PlanEntry(spec.bits, METHODS["squeezellm"].group_size or -1, solver="squeezellm")
        statistics = Statistics(fisher=torch.ones(weight.shape))  # all weights count alike
    elif isinstance(spec, TrellisSpec):
        options = {"state_bits": spec.state_bits, "code": spec.code}
        entry = PlanEntry(spec.bits, METHODS["qtip"].group_size or -1, solver="qtip", options=options)
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
    """Make PEFT find quantized layers and wrap them."""
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
                "[adapters] a quantized token embedding takes no adapter: leave it out of target_modules, or quantize "
                "without embedding_bits"
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
    """Lists of experts that are layers of their own, since they are quantized, by the name of what they stand for."""
    return {
        f"{name}.{attribute}": layers
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for attribute, layers in module.lists.items()
    }


def _lists_named(parameter: str, model: nn.Module) -> list[str]:
    return [name for name in _expert_lists(model) if name == parameter or name.endswith(f".{parameter}")]


def _layers_named(config: Any, model: nn.Module) -> set[str]:
    """Full names of the modules that a configuration means, each expert of a list of experts by itself."""
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
    """Names of the layers of all experts whose lists are called so, or end so."""
    lists = _expert_lists(model)
    wanted = {name for parameter in parameters for name in _lists_named(parameter, model)}
    return {f"{name}.{i}" for name in wanted for i in range(len(lists[name]))}


def _output_of(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _quantized_linears(model: Any) -> set[str]:
    """Names of the quantized linear layers, the output embedding and what adapters wrap already left out."""
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
    """Refuse settings under which PEFT would train a copy of a quantized layer, or of some of its rows.

    Raises:
        UnsupportedError: naming the setting and the layer.
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
                    f"[adapters] {setting} names {name}, which is quantized and cannot be trained itself: leave it "
                    "out, or leave the layer dense when you quantize"
                )


def _parameters(config: Any) -> list[str]:
    return list(getattr(config, "target_parameters", None) or ())


_register()
