"""Register quantrature with transformers, so that ``from_pretrained`` loads and quantizes models in this format.

The format is registered when this module is imported. ``import quantrature`` imports it as soon as transformers is
imported (:mod:`quantrature.integrations._import_hook`). transformers' own import may not be finished then, so only
what is needed to register is imported at the top.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import __version__
from .._C import InvalidArgumentError, QuantratureError
from ..checkpoint import FORMAT_VERSION, QUANT_METHOD, stored_tensors
from ..checkpoint.declaration import on_quantized
from ..files.remote_code import REMOTE_CODE
from ..plan.nearest import did_you_mean

if TYPE_CHECKING:
    from ..models import Linears
    from ..models.folding import Fold
    from ..packed import MatrixSpec


@auto.register_quantization_config(QUANT_METHOD)
class QuantratureConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``from_pretrained``, for a dense or a quantized checkpoint.

    Pass it to ``from_pretrained`` to quantize a dense checkpoint while it is loaded. For a quantized checkpoint it is
    read from config.json.

    Args:
        bits, group_size, method, sym, zero, scale_dtype, meta_bits, outlier_fraction, embedding_bits, plan, ignore: as
            in :func:`quantrature.quantize`, for dense checkpoints. ``plan`` may also be the content of a plan.json.
        modules: for quantized checkpoints, matrix name to its description (:class:`quantrature.packed.MatrixSpec`).
        format_version: version of the checkpoint format.
        dequantize: whether to load a quantized checkpoint as a dense model.
        folds: for quantized checkpoints, the scales that were folded into other layers
            (:class:`quantrature.models.folding.Fold`).

    Raises:
        InvalidArgumentError: for an unknown setting, and for a checkpoint of another format version.
    """

    def __init__(
        self,
        bits: int | None = None,
        group_size: int = 64,
        method: str = "rtn",
        sym: bool = False,
        zero: str = "float",
        scale_dtype: str = "auto",
        meta_bits: int | None = None,
        outlier_fraction: float = 0.0,
        embedding_bits: int | None = None,
        plan: Any = None,
        ignore: str | Iterable[str] = (),
        modules: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        folds: Sequence[Any] = (),
        **others: Any,
    ) -> None:
        known = [name for name in inspect.signature(QuantratureConfig).parameters if name != "others"]
        for name in others:
            if name not in ("quant_method", "quantrature_version"):  # which config.json has, too
                raise InvalidArgumentError(f"[QuantratureConfig] {name} is not a setting{did_you_mean(name, known)}")
        if format_version != FORMAT_VERSION:
            raise InvalidArgumentError(
                f"[load] format_version of the checkpoint is {format_version}; quantrature {__version__} reads "
                f"{FORMAT_VERSION}"
            )
        self.quant_method: Any = QUANT_METHOD
        if not (modules is None or isinstance(modules, Mapping)):
            raise InvalidArgumentError(f"[load] modules of the checkpoint must be an object: got {modules!r}")
        self.modules = None if modules is None else dict(modules)
        if not isinstance(folds, Sequence) or isinstance(folds, str):
            raise InvalidArgumentError(f"[load] folds of the checkpoint must be a list: got {folds!r}")
        self.folds = list(folds)
        self.dequantize = dequantize
        self.wish = {
            "bits": bits,
            "group_size": group_size,
            "method": method,
            "sym": sym,
            "zero": zero,
            "scale_dtype": scale_dtype,
            "meta_bits": meta_bits,
            "outlier_fraction": outlier_fraction,
            "embedding_bits": embedding_bits,
            "plan": plan,
            "ignore": ignore,
        }

    def __repr__(self) -> str:
        """Return the settings that differ from their defaults, with plans and modules as a number of matrices."""
        given = {**self.wish, "modules": self.modules, "dequantize": self.dequantize, "folds": self.folds or ()}
        defaults = inspect.signature(QuantratureConfig).parameters
        shown = []
        for name, value in given.items():
            if value == defaults[name].default:
                continue
            many = name in ("plan", "modules", "folds") and isinstance(value, Sized)
            shown.append(f"{name}=<{len(value)} entries>" if many else f"{name}={value!r}")
        return f"QuantratureConfig({', '.join(shown)})"

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the settings that a caller of ``from_pretrained`` may change for a quantized checkpoint."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``quantization_config`` in config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "quantrature_version": __version__,
            "modules": self.modules or {},
            **({"folds": self.folds} if self.folds else {}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as :meth:`to_dict`: no field is left out as a default."""
        return self.to_dict()


# Without this, transformers ignores what callers set for a quantized checkpoint.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (QuantratureConfig,)  # type: ignore[assignment]


class _NamesInModel:
    """Maps module names in a checkpoint to names in the model, by transformers' rules for tensor names.

    They can differ: a checkpoint of a causal language model can be loaded as its base model or with another head, and
    the reverse; and multimodal models use other names in checkpoints.

    Args:
        model: the model on the meta device, not yet quantized.
        linears: its matrices, embeddings included.
    """

    def __init__(self, model: Any, linears: Linears) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        matrices = [name for linear in linears for name in (linear.name, *linear.aliases)]
        self._matrices = frozenset(matrices)
        self._here = {f"{name}.weight": True for name in [*dict(model.named_modules()), *matrices]}
        self._renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        self._prefix: str = model.base_model_prefix
        self._blocks = tuple(f"{stack}." for stack in linears.stacks)
        self._same_class = type(model).__name__ in (model.config.architectures or ())

    def of(self, name: str) -> str | None:
        """Return the name in the model; ``None`` for a part that the model's class does not have, such as a head.

        A name inside the model's blocks that does not exist is returned unchanged, so that the caller reports an error.
        """
        from transformers.core_model_loading import rename_source_key

        found = name
        for renamings in (self._renamings, []):
            found = rename_source_key(f"{name}.weight", renamings, [], self._prefix, self._here)[0]
            if found in self._here:
                return found.removesuffix(".weight")
        inside = any(each.startswith(self._blocks) for each in (name, f"{self._prefix}.{name}", found))
        stripped = name.removeprefix(f"{self._prefix}.").startswith(self._blocks)
        return name if self._same_class or inside or stripped else None

    def all_of(self, names: Iterable[str]) -> Iterator[str]:
        """Yield possible names in the model for each name: unchanged, and with and without the base model's prefix."""
        for name in names:
            yield from (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}."))

    def has(self, name: str) -> bool:
        """Whether the model has a matrix of this name that can be quantized."""
        return name in self._matrices


@auto.register_quantizer(QUANT_METHOD)
class QuantratureHfQuantizer(HfQuantizer):
    """Loads quantized checkpoints, and quantizes dense checkpoints while they are loaded."""

    requires_calibration = False
    quantization_config: QuantratureConfig
    folds: tuple[Fold, ...] = ()
    """Scales that were folded into the model. They are needed to compare it with the original, not to run it."""
    _matrices: frozenset[str] = frozenset()
    """Names of the quantized matrices: name in the checkpoint to name in the model."""
    carried: Mapping[str, Path] = MappingProxyType({})
    """Tensors of the original checkpoint that are not in the model, with their files; they are saved unchanged."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            from ..plan import Plan
            from ..quantization import Request, plan_for
            from ..quantization.on_load import QuantizeOnLoad

            wish = dict(self.quantization_config.wish)
            if isinstance(wish["plan"], Mapping):
                wish["plan"] = Plan.from_json(wish["plan"], "plan of the quantization_config")
            self._on_load = QuantizeOnLoad(*plan_for(model, Request(**wish), caller="QuantratureConfig"))
            return
        from ..models import find_linears
        from ..nn import install
        from ..packed import MatrixSpec

        linears = find_linears(model, embeddings=True, watch=False)
        files = [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        stored = stored_tensors(files)
        names = _NamesInModel(model, linears)
        self._read_folds(model, files, names)
        here: dict[str, Any] = {}
        missing = []
        for name, described in (self.quantization_config.modules or {}).items():
            place = names.of(name)
            if place is None:
                missing.append(name)
                continue
            here[place] = described
            if not names.has(place):
                why = next(
                    (each.reason for each in linears.skipped if each.name == place), "the model has no such matrix"
                )
                raise InvalidArgumentError(f"[load] {name} is not a matrix that can be quantized: {why}")
            try:
                linear, spec = linears.find(place), MatrixSpec.from_json(described)
                shape = (linear.out_features, linear.in_features)
                if spec.shape != shape:
                    raise InvalidArgumentError(f"the checkpoint has shape {spec.shape}, the model has {shape}")
                install(model, linear, spec)  # says whether the place takes such a form
                for tensor, dimensions, dtype in spec.layout():
                    if f"{name}.{tensor}" in stored:
                        stored[f"{name}.{tensor}"].check(f"{name}.{tensor}", dimensions, dtype)
                    elif stored:
                        raise QuantratureError(f"[load] the checkpoint lacks the tensor {name}.{tensor}")
            except InvalidArgumentError as e:
                raise InvalidArgumentError(f"[load] {name}: {str(e).removeprefix('[checkpoint] ')}") from None
        blocks = [name for name in missing if re.search(r"\.\d+\.", name)]
        if blocks and not any(linears.find(place).in_block for place in here):
            saved = ", ".join(model.config.architectures or ()) or "another class"
            raise InvalidArgumentError(
                f"[load] {type(model).__name__} has none of the quantized matrices of this checkpoint, which was saved "
                f"from {saved}; the checkpoint has {blocks[0]}, the model has {linears[0].name}"
            )
        self._matrices = frozenset((*names.all_of(self.quantization_config.modules or ()), *here))
        self.quantization_config.modules = here
        self._carry(model, files)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from ..nn import dequantize_layers, quantized_layers, settle
        from ..nn.names import CodesAreCalledWeight

        if not self.pre_quantized:
            from ..quantization import declare

            declare(model, self._on_load.finish(model))
            self.quantization_config.modules = model.config.quantization_config.modules
            return model
        for name, layer in quantized_layers(model).items():
            if any(tensor.is_meta for tensor in layer.stored().values()):
                if self._on_disk(model):
                    continue
                raise QuantratureError(f"[load] {name}: tensors of this matrix are missing from the checkpoint")
            if not layer.intact:
                raise QuantratureError(
                    f"[load] {name}: the stored tensors are damaged: their hash is not the digest in config.json"
                )
            try:
                layer.spec.matrix(layer.stored())  # looks at the positions of outliers
            except InvalidArgumentError as e:
                raise InvalidArgumentError(f"[load] {name}: {str(e).removeprefix('[checkpoint] ')}") from None
        if not model.is_remote_code() and REMOTE_CODE in str(getattr(model.config, "auto_map", "")):
            del model.config.auto_map  # it names a file that save_pretrained would not write
        if self.quantization_config.dequantize:
            dequantize_layers(model, model.dtype)
            model._weight_conversions = None
            self.folds = ()
        else:
            from ..nn.counting import count_as_dense

            count_as_dense(model)
            settle(model)
            model._weight_conversions = [CodesAreCalledWeight(quantized_layers(model))]
        return model

    def _read_folds(self, model: Any, files: Sequence[str], names: _NamesInModel) -> None:
        from safetensors import safe_open

        from ..models.folding import FOLDED_SCALE, Fold

        scales: dict[str, Any] = {}
        for path in files if self.quantization_config.folds else ():
            with safe_open(path, "pt") as file:
                scales |= {name: file.get_tensor(name) for name in file.keys() if name.endswith(f".{FOLDED_SCALE}")}  # noqa: SIM118
        found = []
        for described in self.quantization_config.folds:
            producer = described.get("producer") if isinstance(described, Mapping) else None
            if f"{producer}.{FOLDED_SCALE}" not in scales:
                raise QuantratureError(f"[load] the checkpoint lacks the tensor {producer}.{FOLDED_SCALE}")
            fold = Fold.from_json(described, scales[f"{producer}.{FOLDED_SCALE}"])
            consumers = tuple(names.of(name) or name for name in fold.consumers)
            found.append(replace(fold, producer=names.of(fold.producer) or fold.producer, consumers=consumers))
        self.folds = tuple(found)
        self.quantization_config.folds = [each.to_json() for each in found]
        ignored = {rf"\.{FOLDED_SCALE}$"} if found else set()
        model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())

    def _carry(self, model: Any, files: Sequence[str]) -> None:
        from safetensors import safe_open

        from ..checkpoint.carried import carried_tensors, correct_announced

        names: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                names |= dict.fromkeys(file.keys(), Path(path))
        self.carried = carried_tensors(model, names)
        if not self.carried:
            correct_announced(model, names)
        ignored = {re.escape(name) for name in self.carried} | set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Return the tensors to save, with folded scales and the tensors copied from the original checkpoint."""
        from ..checkpoint.carried import read_carried
        from ..models.folding import FOLDED_SCALE
        from ..nn import quantized_layers

        modules = model.config.quantization_config.modules or {}
        for name, layer in quantized_layers(model).items():
            if name in modules:  # adapters may have been merged since
                modules[name] = layer.spec.to_json()
        if not (self.folds or self.carried) or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        scales = {f"{each.producer}.{FOLDED_SCALE}": each.scale for each in self.folds}
        return {**model.state_dict(), **scales, **read_carried(self.carried)}, {}

    def get_weight_conversions(self) -> list[Any]:
        """Return the renamings that transformers applies to tensor names of a checkpoint while loading."""
        from ..nn.names import CodesAreCalledWeight

        return [CodesAreCalledWeight(self._matrices)] if self._matrices else []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Add these renamings to the model's own, which are dropped for a folder saved from the same class.

        Such a folder has the model's own names. Patterns for the original checkpoint would wrongly match some of them
        (Laguna's ``mlp.shared_expert.``).
        """
        if self.pre_quantized:
            architectures = (model.config.architectures or ()) if model is not None else ()
            own = [] if type(model).__name__ in architectures else weight_conversions
            return [*own, *self.get_weight_conversions()]
        base: Any = super()
        updated: list[Any] = base.update_weight_conversions(weight_conversions, model)
        return updated

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether to quantize a parameter of a dense checkpoint."""
        return not self.pre_quantized and self._on_load.wants(param_name)

    def get_quantize_ops(self) -> Any:
        """Return the operation that quantizes a parameter as soon as it is loaded."""
        return self._on_load

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Return the bytes per element that a parameter will take, for device maps."""
        if self.param_needs_quantization(model, param_name):
            return self._on_load.bits_of(param_name) / 8
        return float(param.element_size())

    @staticmethod
    def _on_disk(model: Any) -> bool:
        """Whether a device map offloads weights to disk; Accelerate then leaves meta tensors in the model."""
        return "disk" in (getattr(model, "hf_device_map", None) or {}).values()

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Replace all quantized layers of a model by dense ones.

        Args:
            model: the quantized model.
            dtype: dtype for all parameters except those of adapters; by default the dtype of the current parameters.
        """
        import torch

        from ..nn import dequantize_layers

        def own() -> Any:
            return (p for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name)

        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize_layers(model, wanted or next((p.dtype for p in own()), model.dtype))
        if wanted is not None:
            for parameter in own():
                parameter.data = parameter.data.to(wanted)
        model._weight_conversions = None
        typed: Any = self
        typed.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """Return true: quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return true: adapters on quantized layers can be trained (the codes cannot)."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return true: torch.compile sees each quantized layer as one operator."""
        return True


@on_quantized
def declare(model: Any, specs: Mapping[str, MatrixSpec], folds: tuple[Fold, ...]) -> None:
    """Mark a transformers model as quantized, as if it had been loaded from a quantized folder."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    from ..checkpoint.carried import carried_from_source
    from ..nn import settle
    from ..nn.counting import count_as_dense
    from ..nn.names import CodesAreCalledWeight

    typed: Any = model
    carried = carried_from_source(typed)
    config = QuantratureConfig(
        modules={name: spec.to_json() for name, spec in specs.items()}, folds=[each.to_json() for each in folds]
    )
    typed.config.quantization_config = config
    typed.hf_quantizer = QuantratureHfQuantizer(config, pre_quantized=True)
    typed.hf_quantizer.folds = folds
    typed.hf_quantizer.carried = carried
    count_as_dense(model)
    typed.is_quantized = True
    typed.quantization_method = config.quant_method
    typed._weight_conversions = [CodesAreCalledWeight(specs)]  # all else is saved under the names that modules have
    settle(model)
