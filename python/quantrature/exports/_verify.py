"""Compare an exported folder with the model that it was made from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .._C import QuantratureError
from ..checkpoint import is_quantized
from .read import weights_of

if TYPE_CHECKING:
    import torch

    from ..checkpoint.verify import Verification

NOT_COMPARED = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"),
    *("quantization", "quantization_config"),
)
"""Fields of config.json that an export may change."""


def verify(
    folder: str | os.PathLike[str], source: str | os.PathLike[str], trust_remote_code: bool = False
) -> Verification:
    """Compare an exported folder with the original or the quantized model.

    Quantized matrices are compared by error, other tensors bit for bit, and config.json field by field.

    Args:
        folder: a folder that :func:`quantrature.export` wrote.
        source: the original model, folder or id on the Hugging Face Hub, or the quantized folder that was exported. If
            scales were folded (as ``awq`` does), give the quantized folder: the original has other weights.
        trust_remote_code: run Python code from the model's folder, as in transformers.

    Returns:
        The comparisons; ``changed`` also has names of fields of config.json that differ.

    Raises:
        InvalidArgumentError, QuantratureError: as for :func:`quantrature.exports.load`, and if the source has no matrix
            of this name and shape; the message names it.
    """
    import torch

    from ..checkpoint.verify import Verification, compare_values

    _, weights = weights_of(folder)
    theirs = _tensors_of(source, trust_remote_code)
    modules = {}
    for name, values in weights.quantized.items():
        matrix = name.removesuffix(".weight")
        if name not in theirs or theirs[name].shape != values.shape:
            what = "no such matrix" if name not in theirs else f"another shape: {tuple(theirs[name].shape)}"
            raise QuantratureError(f"[verify] {matrix}, of shape {tuple(values.shape)}, has in {source} {what}")
        modules[matrix] = compare_values(values, theirs[name])
    changed = [
        name
        for name in dict.fromkeys([*weights.others, *theirs])
        if name not in weights.quantized
        and not (name in weights.others and name in theirs and torch.equal(weights.others[name], theirs[name]))
    ]
    return Verification(modules, (*changed, *_changed_fields(folder, source, trust_remote_code)))


def _tensors_of(source: str | os.PathLike[str], trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of a dense or quantized model by the names of checkpoints."""
    import torch

    from ..checkpoint.carried import carried_tensors, read_carried, source_tensors
    from ..models import load_model
    from .placement import Placement, dense_tensors

    model: Any = load_model(source, trust_remote_code=trust_remote_code)
    if not is_quantized(source):
        return {**dense_tensors(model), **read_carried(carried_tensors(model, source_tensors(model)))}
    found = Placement.of(model)
    values = {f"{name}.weight": torch.from_numpy(place.values) for name, place in found.matrices.items()}
    return {**found.tensors, **values}


def _changed_fields(
    folder: str | os.PathLike[str], source: str | os.PathLike[str], trust_remote_code: bool
) -> list[str]:
    from ..models import load_config

    ours, theirs = (load_config(each, trust_remote_code).to_dict() for each in (folder, source))
    names = [name for name in dict.fromkeys([*ours, *theirs]) if name not in NOT_COMPARED]
    return [f"config.json: {name}" for name in names if ours.get(name) != theirs.get(name)]
