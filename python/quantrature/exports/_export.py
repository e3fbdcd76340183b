"""The function ``export``: write a quantized model as another engine loads it."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._C import InvalidArgumentError
from ..checkpoint import is_quantized
from ..files.new_folder import check_new_folder, new_folder
from ..files.remote_code import REMOTE_CODE
from ..plan.fusion import fusion_groups
from ..plan.nearest import did_you_mean
from .grid import Floats
from .target import Content, Fit, Setting, Target, fitted
from .targets import TARGETS

_log = logging.getLogger(__name__)

NOT_COPIED = ("config.json", "README.md", "plan.json", "requant.json", f"{REMOTE_CODE}.py")
"""Files of a quantized folder that do not describe the exported one."""


@dataclass(frozen=True)
class ExportedMatrix:
    """How one matrix was written.

    Attributes:
        name: name in checkpoints of transformers.
        result: ``exact`` if the engine's values are those of the quantized model bit for bit, computed in float32;
            ``rounded`` if scales or biases were rounded; ``refit`` if the matrix was quantized again.
        error: squared error that the export adds, divided by the squared norm of the weights: of the original matrix
            if ``source`` was given, else of the quantized matrix. It can be negative for a refit from ``source``.
        setting: how the matrix is stored in the target.
        nbytes: bytes there.
    """

    name: str
    result: str
    error: float
    setting: Setting
    nbytes: int


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        target: name of the target.
        matrices: the quantized matrices.
        other_bytes: bytes of all other tensors.
    """

    target: str
    matrices: tuple[ExportedMatrix, ...]
    other_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of the quantized matrices."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def inexact(self) -> tuple[ExportedMatrix, ...]:
        """The matrices that are not exact."""
        return tuple(matrix for matrix in self.matrices if matrix.result != "exact")

    def count(self, result: str) -> int:
        """Return the number of matrices with a result."""
        return sum(matrix.result == result for matrix in self.matrices)


def export(
    model: Any,
    to: str,
    path: str | os.PathLike[str],
    *,
    allow_refit: bool = False,
    source: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a quantized model to a folder as another engine loads it.

    Codes, scales and zero points are converted, not quantized again, so that the engine's weights equal those of the
    quantized model. The functions of a target compute the engine's values back; they are compared for each matrix.

    Args:
        model: a folder that quantrature wrote, or a model in memory that :func:`quantrature.quantize` returned. For a
            model in memory, save the tokenizer in ``path`` yourself.
        to: name of the target, one of ``exports.TARGETS``.
        path: folder to write. If an error occurs, no partial folder is left.
        allow_refit: if the target cannot hold the grid of a matrix, whether to quantize the matrix again, on the
            nearest grid that it can hold. Without it, such a matrix is an error. Rounding that adds a relative squared
            error of at most 1e-7, less than the rounding of float16, is no refit and always allowed.
        source: the original model, folder or id on the Hugging Face Hub. A matrix that needs a refit is quantized from
            its weights; without it, from the dequantized weights, which adds a second rounding error.

    Returns:
        For each matrix whether it is exact, and the error that the export adds.

    Raises:
        InvalidArgumentError: for an unknown target, a model that quantrature did not quantize, an output folder that is
            not empty, and matrices that the target cannot hold; the message names each, and the nearest setting that
            the target can hold.
    """
    target = find_target(to)
    check_new_folder(path)
    loaded, files = _loaded(model)
    from .placement import Placement

    placement = Placement.of(loaded)
    if not placement.matrices:
        raise InvalidArgumentError("[export] model must have quantized matrices: got a dense model")
    config = _config(loaded)
    target.check(config, (*(f"{name}.weight" for name in placement.matrices), *placement.tensors), files)
    fits = {name: target.fit(place.setting) for name, place in placement.matrices.items()}
    _check(target, fits, allow_refit)
    settings = {name: fit.stored for name, fit in fits.items() if fit.stored is not None}
    _check_alike(target, settings)
    originals = _Originals(source, loaded) if source is not None and any(f.refits for f in fits.values()) else None
    encoded, matrices = {}, []
    for name, place in placement.matrices.items():
        stored = settings[name]
        form, quantized = place.form, place.values
        wanted = quantized if originals is None or not fits[name].refits else originals.weight(name, stored)
        if fits[name].refits:
            form = form.refit(wanted)
        encoded[name] = target.encode(fitted(form, stored), stored)
        written = target.decode(encoded[name], stored)
        result = "refit" if fits[name].refits else "exact" if np.array_equal(written, quantized) else "rounded"
        error = _relative(written, wanted) - _relative(quantized, wanted)
        nbytes = sum(tensor.nbytes for tensor in encoded[name].values())
        matrices.append(ExportedMatrix(name, result, error, stored, nbytes))
    _check_rounding(target, matrices, allow_refit)
    content = Content(config, settings, encoded, placement.tensors, files)
    with new_folder(path) as partial:
        target.write(content, partial)
        generation = getattr(loaded, "generation_config", None)
        if generation is not None and not (partial / "generation_config.json").exists():
            generation.save_pretrained(partial)
    return Exported(target.name, tuple(matrices), sum(t.nbytes for t in placement.tensors.values()))


def find_target(name: str) -> Target:
    """Return the target with a name.

    Raises:
        InvalidArgumentError: if there is none.
    """
    if name not in TARGETS:
        raise InvalidArgumentError(
            f"[export] to must be one of {', '.join(TARGETS)}: got {name!r}{did_you_mean(name, TARGETS)}"
        )
    return TARGETS[name]


def _loaded(model: Any) -> tuple[Any, dict[str, Path]]:
    """Return the model, and the files of its folder that are copied, by their paths in the folder."""
    if not isinstance(model, str | os.PathLike):
        return model, {}
    folder = Path(model)
    if not folder.is_dir() or not is_quantized(folder):
        raise InvalidArgumentError(f"[export] model must be a folder that quantrature wrote: got {folder}")
    from ..models import load_model

    files = [*sorted(folder.iterdir()), *sorted(folder.glob("additional_chat_templates/*.jinja"))]
    copied = {
        str(file.relative_to(folder)): file
        for file in files
        if file.is_file() and file.name not in NOT_COPIED and ".safetensors" not in file.suffixes
    }
    return load_model(folder), copied


def _config(model: Any) -> dict[str, Any]:
    """Return the content of config.json without the quantization, and without the code that quantrature added."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config.dtype = [type(model).__name__], model.dtype  # as transformers does when it saves
    found: dict[str, Any] = json.loads(config.to_json_string())
    for name, present in (getattr(config, "attribute_map", None) or {}).items():
        if present in found:
            found.setdefault(name, found[present])  # the name in the original config.json, which other engines read
    if REMOTE_CODE in str(found.get("auto_map", "")):
        del found["auto_map"]
    return found


class _Originals:
    """The weights of the original model, by the names of checkpoints; scales that were folded are folded into it."""

    def __init__(self, source: str | os.PathLike[str], model: Any) -> None:
        from ..models import find_linears, load_model
        from ..models.folding import fold, folds_of
        from .placement import dense_tensors

        original = load_model(source, "float32")
        fold(original, find_linears(original, embeddings=True, watch=False), folds_of(model))
        self._source, self._tensors = source, dense_tensors(original)

    def weight(self, name: str, setting: Setting) -> Floats:
        """Return the original weight of a matrix."""
        found = self._tensors.get(f"{name}.weight")
        if found is None or tuple(found.shape) != setting.shape:
            raise InvalidArgumentError(f"[export] source must have {name} of shape {setting.shape}: {self._source}")
        weight: Floats = found.float().numpy()
        return weight


def _relative(values: Floats, wanted: Floats) -> float:
    """Return the squared distance of two matrices, divided by the squared norm of the second."""
    norm = float(np.square(wanted, dtype=np.float64).sum())
    error = float(np.square(values.astype(np.float64) - wanted).sum())
    return error / norm if norm else error


def _check(target: Target, fits: Mapping[str, Fit], allow_refit: bool) -> None:
    """Raise InvalidArgumentError for matrices that the target cannot hold, or only after a refit."""
    never = {name: fit.reason for name, fit in fits.items() if fit.stored is None}
    if never:
        raise InvalidArgumentError(f"[export] {_listed(never)}")
    refits = {name: fit.reason for name, fit in fits.items() if fit.refits}
    if refits and not allow_refit:
        raise InvalidArgumentError(
            f"[export] {_listed(refits)}. Or set allow_refit, which quantizes them again and reports the added error"
        )


def _check_alike(target: Target, settings: Mapping[str, Setting]) -> None:
    """Raise InvalidArgumentError for matrices that the target stores as one, but with different settings."""
    first: dict[str, str] = {}
    for name, setting in settings.items():
        other = first.setdefault(target.alike(name), name)
        if target.scheme(setting) != target.scheme(settings[other]):
            raise InvalidArgumentError(
                f"[export] {name} must have the same setting as {other}, because {target.name} stores them as one "
                f"tensor: got {setting.form} and {settings[other].form}"
            )
    if not target.fuses_alike:
        return
    names = list(settings)
    for members in fusion_groups(names):
        fused = [names[i] for i in members]
        if any(target.scheme(settings[name]) != target.scheme(settings[fused[0]]) for name in fused):
            _log.warning("%s have different settings, but vLLM fuses them and will not load them", ", ".join(fused))
            return


def _check_rounding(target: Target, matrices: list[ExportedMatrix], allow_refit: bool) -> None:
    """Raise InvalidArgumentError for matrices whose parameters lose more than float16 would."""
    rounded = {m.name: m.error for m in matrices if m.result == "rounded" and not m.error <= target.rounding}
    if rounded and not allow_refit:
        name, error = max(rounded.items(), key=lambda item: item[1])
        raise InvalidArgumentError(
            f"[export] {name} loses {error:.2g} of its squared norm, because {target.name} rounds its scales or zero "
            f"points; {len(rounded)} matrices lose more than {target.rounding:g}. Set allow_refit to write them "
            "nevertheless"
        )


def _listed(reasons: Mapping[str, str]) -> str:
    """Name the matrices, with a reason that several share only once."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(_lines(by_reason))


def _lines(by_reason: Mapping[str, list[str]]) -> Iterator[str]:
    for reason, names in list(by_reason.items())[:3]:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{', '.join(names[:3])}{more}: {reason}"
    if len(by_reason) > 3:
        yield f"and {sum(map(len, list(by_reason.values())[3:]))} more matrices"
