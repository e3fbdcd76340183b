"""Quantize a model while transformers loads it, one parameter at a time; the dense model is never in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from .._C import InvalidArgumentError, QuantratureError
from ..methods import METHODS, Comparison, quantize_matrix
from ..models import Linears, LinearWeight
from ..nn.experts import split
from ..packed import MatrixSpec
from ..plan import Plan, PlanEntry
from .layers import check_weight, put


class QuantizeOnLoad(ConversionOps):
    """Conversion that transformers applies to each parameter to quantize, after it has read the parameter.

    Args:
        linears: the quantizable matrices of the model, which is on the meta device.
        plan: how to quantize them.

    Raises:
        InvalidArgumentError: for a method that needs calibration text.
    """

    def __init__(self, linears: Linears, plan: Plan) -> None:
        self._waiting: dict[str, list[tuple[LinearWeight, PlanEntry]]] = {}
        self._first: dict[str, str] = {}
        self._specs: dict[str, MatrixSpec] = {}
        self._comparison = Comparison()
        self._failure: QuantratureError | None = None
        for name, entry in plan:
            if entry.keeps:
                continue
            if METHODS[entry.method].needs:
                raise InvalidArgumentError(
                    f"[load] {name}: method {entry.method} needs a calibration text: load the model, then quantize it"
                )
            linear = linears.find(name)
            first = _parameter(linear.name, linear)
            self._waiting.setdefault(first, []).append((linear, entry))
            self._first |= {_parameter(place, linear): first for place in (linear.name, *linear.aliases)}

    def wants(self, parameter: str) -> bool:
        """Return whether to quantize the parameter with this full name."""
        return parameter in self._first

    def bits_of(self, parameter: str) -> float:
        """Return an estimate of the bits per weight of a quantized parameter."""
        entries = [entry for _, entry in self._waiting.get(self._first[parameter], ())]
        return max((entry.bits + 32 / max(entry.group_size, 32) for entry in entries), default=8.0)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **about: Any,
    ) -> dict[str, Any]:
        """Put the quantized form of parameters into the model, and return the parameters that stay dense."""
        rest, missing = {}, about.get("missing_keys")
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.wants(name) or not self._quantize(about["model"], self._first[name], tensor):
                rest[name] = value
            elif missing is not None:
                missing.difference_update(other for other, first in self._first.items() if first == self._first[name])
        return rest

    def _quantize(self, model: Any, parameter: str, tensor: torch.Tensor) -> bool:
        """Put the quantized form of a parameter into the model; return false if it cannot be quantized."""
        if parameter not in self._waiting:
            return True  # it was quantized before, under another name
        work = self._waiting[parameter]
        if any(tensor.shape != linear.parameter.shape for linear, _ in work):
            return False  # transformers reports the wrong shape
        matrices = []
        try:
            for linear, entry in work:
                weight = linear.view(tensor)
                check_weight(linear.name, weight)
                found = quantize_matrix(linear.name, weight.contiguous(), entry, comparison=self._comparison)
                matrices.append(found.to("cpu"))
        except QuantratureError as error:
            # transformers would wrap it in a long report; `finish` raises it instead.
            self._failure = self._failure or error
            return False
        del self._waiting[parameter]
        if work[0][0].expert is not None:
            _split_as(work[0][0], tensor, {linear.expert for linear, _ in work})
        for (linear, _), matrix in zip(work, matrices, strict=True):
            self._specs[linear.name] = put(model, linear, matrix, tensor.device)
        return True

    def finish(self, model: Any) -> dict[str, MatrixSpec]:
        """Quantize the parameters that were loaded without a conversion, and return the descriptions of all matrices.

        Raises:
            QuantratureError: for the first matrix that could not be quantized, or that the checkpoint lacks.
        """
        for parameter, work in list(self._waiting.items()):
            value = work[0][0].parameter
            if self._failure is None and not value.is_meta:
                self._quantize(model, parameter, value.detach())
        if self._failure is not None:
            raise self._failure
        if self._waiting:
            raise QuantratureError(f"[load] the checkpoint lacks {next(iter(self._waiting))}")
        self._comparison.report()
        return self._specs


def _parameter(place: str, linear: LinearWeight) -> str:
    """Return the full name of the parameter of a matrix; for an expert, of the parameter with all experts."""
    return f"{place}.{linear.attribute}" if linear.expert is None else place.rpartition(".")[0]


def _split_as(linear: LinearWeight, tensor: torch.Tensor, quantized: set[int | None]) -> None:
    """Split fused experts into layers, and copy the weights of the experts that stay dense."""
    split(linear)
    layers: Any = getattr(linear.module, linear.attribute)
    for expert, layer in enumerate(layers):
        if expert not in quantized:
            weight = tensor[expert].mT if linear.transposed else tensor[expert]
            layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
            layer.weight._is_hf_initialized = True
