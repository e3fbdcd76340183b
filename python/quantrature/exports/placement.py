"""Take a quantized model apart into matrices and other tensors, by the names that checkpoints of transformers use.

The names in a model and in its original checkpoint can differ: since transformers 5, the experts of a mixture are one
parameter in the model, and one matrix each in checkpoints. Other engines read the names of checkpoints. transformers
knows how to convert a model's tensors back. To learn which rows of which quantized matrix a tensor of the checkpoint
consists of, we let it convert row numbers in the place of weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .._C import InvalidArgumentError
from ..checkpoint.carried import read_carried
from ..nn import QuantEmbedding, QuantLayer, quantized_layers
from ..packed import GgufMatrix
from .grid import Floats, Grid
from .target import Setting

_EXPERT = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class Place:
    """A matrix of the checkpoint: some rows of a quantized layer.

    Attributes:
        layer: the quantized layer.
        rows: row numbers, in the order of the checkpoint; ``None`` for all rows in order.
    """

    layer: QuantLayer
    rows: npt.NDArray[np.int64] | None

    @property
    def setting(self) -> Setting:
        """How the matrix is stored."""
        found = Setting.of(self.layer.spec, self.layer.matrix, isinstance(self.layer, QuantEmbedding))
        return found if self.rows is None else replace(found, shape=(len(self.rows), found.shape[1]))

    @property
    def form(self) -> Any:
        """The stored form: a :class:`Grid`, or the blocks of a matrix of kind gguf."""
        dense: Any = self.layer.matrix.dense
        if isinstance(dense, GgufMatrix):
            return dense if self.rows is None else dense.take(self.rows)
        found = Grid.of(dense)
        return found if self.rows is None else found.rows(self.rows)

    @property
    def values(self) -> Floats:
        """The dequantized weights."""
        found: Floats = self.layer.dequantize().cpu().numpy()
        return found if self.rows is None else found[self.rows]


@dataclass(frozen=True)
class Placement:
    """A quantized model by the names of checkpoints.

    Attributes:
        matrices: name of a quantized matrix, without ``.weight``, to its place.
        tensors: all other tensors, each once.
    """

    matrices: Mapping[str, Place]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any) -> Placement:
        """Take a model apart.

        Raises:
            InvalidArgumentError: for a quantized matrix that checkpoints do not hold as a matrix of its own, for
                example because they store all experts as one tensor, and for a layer of which only some experts are
                quantized; the message names it.
        """
        layers = quantized_layers(model)
        numbers, owners = _row_numbers(model, layers)
        matrices = {}
        for name, found in _as_in_checkpoints(model, numbers).items():
            matrices[name.removesuffix(".weight")] = _place(name, found, owners)
        inside = tuple(f"{name}." for name in layers)
        own = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not (name.startswith(inside) and name.rpartition(".")[0] in layers and _is_code(layers, name))
        }
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        own = {name: tensor for name, tensor in own.items() if name not in tied}
        carried = read_carried(getattr(getattr(model, "hf_quantizer", None), "carried", {}))
        return cls(matrices, {**_as_in_checkpoints(model, own), **carried})


def dense_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that is not quantized, by the names of checkpoints, each once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return _as_in_checkpoints(model, {name: t for name, t in model.state_dict().items() if name not in tied})


def _is_code(layers: Mapping[str, QuantLayer], name: str) -> bool:
    """Whether a tensor belongs to the stored matrix of a layer, and is not its bias."""
    module, _, part = name.rpartition(".")
    return part in dict(layers[module].named_buffers(recurse=False))


def _row_numbers(
    model: Any, layers: Mapping[str, QuantLayer]
) -> tuple[dict[str, torch.Tensor], list[tuple[int, QuantLayer, str]]]:
    """Number the rows of all quantized matrices.

    Returns:
        The numbers in the place of the weights, (rows, 1), or (experts, rows, 1) for a parameter with all experts; and
        for each layer its first number.
    """
    numbers: dict[str, torch.Tensor] = {}
    owners: list[tuple[int, QuantLayer, str]] = []
    experts: dict[str, list[str]] = {}
    count = 0
    for name, layer in layers.items():
        if getattr(layer, "transposed", False):
            raise InvalidArgumentError(
                f"[export] {name} is a Conv1D, whose weight checkpoints store transposed; export cannot write it"
            )
        rows = layer.spec.shape[0]
        owners.append((count, layer, name))
        mine = torch.arange(count, count + rows).view(rows, 1)
        count += rows
        fused = _EXPERT.fullmatch(name)
        if fused and isinstance(model.get_submodule(fused[1]), nn.ModuleList) and "experts" in name:
            experts.setdefault(fused[1], []).append(name)
        numbers[name] = mine
    found = {f"{name}.weight": mine for name, mine in numbers.items()}
    for parameter, names in experts.items():
        module: Any = model.get_submodule(parameter)
        if len(names) != len(module):
            raise InvalidArgumentError(
                f"[export] {parameter} must have all experts quantized, or none: {len(names)} of {len(module)} are"
            )
        found[parameter] = torch.stack([found.pop(f"{name}.weight") for name in names])
    return found, owners


def _place(name: str, found: torch.Tensor, owners: list[tuple[int, QuantLayer, str]]) -> Place:
    """Return the layer and its rows for the row numbers that a tensor of the checkpoint consists of."""
    starts = [start for start, _, _ in owners]
    numbers = found.numpy().astype(np.int64)
    which = {int(i) for i in np.unique(np.searchsorted(starts, numbers.ravel(), side="right") - 1)}
    start, layer, layer_name = owners[min(which)]
    if found.ndim != 2 or found.shape[1] != 1 or len(which) > 1:
        raise InvalidArgumentError(
            f"[export] {layer_name} is not a matrix of its own in checkpoints, where it is part of {name}; "
            "keep it unquantized"
        )
    rows = numbers[:, 0] - start
    everything = np.array_equal(rows, np.arange(layer.spec.shape[0]))
    return Place(layer, None if everything else rows)


def _as_in_checkpoints(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert tensors of a model to those of a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    own = vars(model).pop("_weight_conversions", None)  # without it, transformers takes those of the architecture
    try:
        return dict(revert_weight_conversion(model, tensors))
    finally:
        if own is not None:
            model._weight_conversions = own
