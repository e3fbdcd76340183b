"""Describe a folder with a dense model, and estimate its size after quantization, without reading the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .._C import InvalidArgumentError
from ..checkpoint import QUANT_METHOD, StoredTensor, stored_tensors
from ..models import empty_model, load_config
from ..models.loading import weight_files
from ..plan.option import stored_bytes

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class DenseContents:
    """A dense model in a folder.

    Attributes:
        model_class: name of the model's class.
        bytes: size of all tensors.
        dtypes: dtype (safetensors name) to its number of parameters.
        blocks: number of blocks.
        matrices: number of matrices that :func:`quantrature.quantize` quantizes by default.
        matrix_parameters: number of weights in these matrices.
        matrix_bytes: their current size.
        kept: reason for not quantizing other weights, to the number of these weights.
        quantized_bytes: size of the whole model with these matrices at 4 bits and group size 64.
    """

    model_class: str
    bytes: int
    dtypes: Mapping[str, int]
    blocks: int
    matrices: int
    matrix_parameters: int
    matrix_bytes: int
    kept: Mapping[str, int]
    quantized_bytes: int

    @property
    def parameters(self) -> int:
        """Number of parameters in all tensors of the folder."""
        return sum(self.dtypes.values())


def describe_dense(folder: str | os.PathLike[str], trust_remote_code: bool = False) -> DenseContents:
    """Describe a dense model from its configuration and the headers of its files.

    Args:
        folder: model folder with safetensors files.
        trust_remote_code: whether to run Python code from the model's folder.

    Raises:
        InvalidArgumentError: for a folder without a model, with weights in another format, or with a quantized model;
            and as for :func:`quantrature.models.load_config`.
        QuantratureError: for a file that is truncated or corrupted; the message names it.
    """
    from .model import Request, plan_for

    folder = Path(folder)
    config = load_config(folder, trust_remote_code)
    about = getattr(config, "quantization_config", None)
    if about is not None:
        method = about.get("quant_method") if isinstance(about, dict) else about.quant_method
        raise InvalidArgumentError(
            f"[inspect] {folder} holds a model quantized by {method}: inspect reads dense models and those that "
            f"{QUANT_METHOD} quantized"
        )
    files = weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        raise InvalidArgumentError(
            f"[inspect] {files[0]} has no header that says what is in it: load the model and save it as safetensors"
        )
    stored = stored_tensors(files)
    model = empty_model(config, trust_remote_code)
    linears, plan = plan_for(model, Request(bits=4))
    dtypes: dict[str, int] = {}
    for tensor in stored.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.numel
    most = max(dtypes, key=lambda name: dtypes[name])

    def bytes_now(name: str, numel: int) -> int:
        found: StoredTensor | None = stored.get(f"{name}.weight")
        return found.nbytes if found is not None else numel * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(most, 1)

    before = sum(bytes_now(linear.name, linear.numel) for linear in linears)
    after = sum(
        stored_bytes(linear.out_features, linear.in_features, plan.entries[linear.name], DTYPES.get(most, "float32"))
        for linear in linears
    )
    kept: dict[str, int] = {}
    for skipped in linears.skipped:
        if skipped.reason.startswith("tied to"):
            continue  # counted once, under the name that it is tied to
        kept[skipped.reason] = kept.get(skipped.reason, 0) + math.prod(skipped.shape)
    total = sum(tensor.nbytes for tensor in stored.values())
    return DenseContents(
        model_class=type(model).__name__,
        bytes=total,
        dtypes=dtypes,
        blocks=sum(len(list(model.get_submodule(stack).children())) for stack in linears.stacks),
        matrices=len(linears),
        matrix_parameters=sum(linear.numel for linear in linears),
        matrix_bytes=before,
        kept=kept,
        quantized_bytes=total - before + after,
    )
