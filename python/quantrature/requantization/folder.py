"""ReQuant on a folder that holds a quantized model: the most significant weights restored within a budget of bytes."""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError, QuantratureError
from ..analysis.path import homes_of
from ..analysis.proving import Effort
from ..analysis.quadrature import quadrature
from ..checkpoint import save
from ..checkpoint.verify import compare
from ..files.new_folder import check_new_folder
from ..models import LinearWeight, check_loaded, find_linears, fingerprint, load_model, load_tokenizer, processor_files
from ..models.folding import fold, folds_of
from ..models.gradients import Share, gradient_checkpointing
from ..models.ranks import rank_of
from ..models.running import not_training
from ..nn import QuantLinear, put_everywhere, quantized_layers
from ..ops._outliers import offset_dtype
from ..packed import MatrixSpec, QuantizedMatrix
from ..progress import progress as progress_bar
from ..quantization.model import declare
from ..text import bos_of, token_windows
from .journal import Journal
from .matrices import Matrices
from .record import KeptWeights, Requantization

_log = logging.getLogger(__name__)

OFFSET_BYTES = {"uint16": 2, "int32": 4, "int64": 8}


def requant_folder(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    tokens: Any,
    *,
    significant_fraction: float | None = None,
    avg_bits: float | None = None,
    target_bytes: int | None = None,
    steps: int = 2,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    text_column: str | None = None,
    batch_size: int = 1,
    rule: str = "gauss",
    nodes: int = 4,
    tol: float | None = None,
    max_nodes: int = 32,
    abs_mode: str = "after_mean",
    checkpointing: bool = False,
    map_folder: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    prove: bool = True,
    resume_folder: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> Requantization:
    """Improve a quantized folder: restore the weights of the largest PQI from the source, whatever the host was.

    Codes, scales and zeros stay as they are, and so do weights that are kept exactly already; this is step 4 of
    :func:`quantrature.requant`. Embeddings and fused experts stay as they are, and the budget is for the other
    matrices. The budget is given in one of three ways.

    Args:
        folder: with a model that quantrature quantized.
        source: the model it was made from.
        tokens: calibration text: whatever :func:`quantrature.text.token_windows` takes.
        significant_fraction: fraction of the quantized weights, 0 to 1, to restore.
        avg_bits: bits of storage for each quantized weight, everything included, that the result may take.
        target_bytes: bytes that the quantized matrices of the result may take.
        steps, tokenizer, nsamples, seqlen, seed, bos, text_column, batch_size: as in :func:`quantrature.requant`; the
            tokenizer is that of the source unless given.
        rule, nodes, tol, max_nodes, abs_mode, checkpointing, map_folder, prove: as there.
        resume_folder, resume, progress: as there.
        output: folder to write, complete or not at all; ``None`` replaces ``folder``, for which overwrite is needed.
        overwrite: replace a folder that is not empty.
        dtype: of the forward and backward passes.
        device_map, max_memory: of the source, as in :func:`quantrature.models.load_model`.
        max_shard_size: of one safetensors file.
        trust_remote_code: run code that comes with the model.

    Returns:
        The record, which is also written to the folder as requant.json. A plan.json of the folder is left out of the
        result, which it would no longer describe.

    Raises:
        InvalidArgumentError: naming the argument, or for a budget that has no room for a single weight more.
        QuantratureError: naming a matrix that was not made from the source.
    """
    if output is None and not overwrite:
        raise InvalidArgumentError(f"[requant_folder] {folder} is only replaced with overwrite; or give output")
    if sum(given is not None for given in (significant_fraction, avg_bits, target_bytes)) != 1:
        raise InvalidArgumentError(
            "[requant_folder] the budget is given as exactly one of significant_fraction, avg_bits, target_bytes"
        )
    if significant_fraction is not None and not 0 < significant_fraction <= 1:
        raise InvalidArgumentError(
            f"[requant_folder] significant_fraction must be a fraction above 0, at most 1: got {significant_fraction}"
        )
    if steps < 1:
        raise InvalidArgumentError(f"[requant_folder] steps must be at least 1: got steps={steps}")
    quadrature(rule, nodes, "requant_folder")
    target = Path(folder if output is None else output)
    check_new_folder(target, overwrite)
    quantized = load_model(folder, trust_remote_code=trust_remote_code)
    present = quantized_layers(quantized)
    if not present:
        raise InvalidArgumentError(f"[requant_folder] {folder} holds no matrix quantized by quantrature")
    original = load_model(source, dtype, device_map, trust_remote_code, max_memory)
    found = find_linears(original, embeddings=True, watch=False)
    inside = {name: layer for name, layer in present.items() if found.find(name).in_block}
    layers = {name: layer for name, layer in inside.items() if found.find(name).expert is None}
    if not layers:
        raise InvalidArgumentError(
            f"[requant] every quantized matrix of {folder} is one of fused experts, which ReQuant leaves as they are"
        )
    if len(layers) < len(inside):
        _log.warning(
            "%d matrices of fused experts stay as they are; budget and measurements are of the other %d, with dense "
            "experts",
            len(inside) - len(layers),
            len(layers),
        )
    linears = [found.find(name) for name in layers]
    check_loaded("requant_folder", linears)
    folds = folds_of(quantized)
    fold(original, found, folds)
    for linear, (name, layer) in zip(linears, layers.items(), strict=True):
        same = tuple(linear.weight.shape) == layer.spec.shape
        if not same or not compare(layer, linear.weight.cpu()).fits:
            raise QuantratureError(f"[requant_folder] {name} of {folder} was not made from {source}")
    tokenizer = load_tokenizer(source, trust_remote_code) if tokenizer is None else tokenizer
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, bos=bos, text_column=text_column, model=original
    )

    stored = {linear.name: layer.matrix for linear, layer in zip(linears, layers.values(), strict=True)}
    weights = sum(linear.numel for linear in linears)
    if significant_fraction is not None:
        count = round(significant_fraction * weights)
    else:
        budget = int(avg_bits * weights / 8) if avg_bits is not None else target_bytes
        assert budget is not None
        count = affordable(stored, budget)
    before = {name: 0 if matrix.outliers is None else matrix.outliers.nnz for name, matrix in stored.items()}
    if not 0 < count <= weights - sum(before.values()):
        raise InvalidArgumentError(
            f"[requant_folder] the budget must have room for 1 to {weights - sum(before.values())} more weights: "
            f"got {count}"
        )
    settings = {
        "significant_fraction": significant_fraction,
        "avg_bits": avg_bits,
        "target_bytes": target_bytes,
        "steps": steps,
        "rule": rule,
        "nodes": nodes,
        "tol": tol,
        "abs_mode": abs_mode,
        "batch_size": batch_size,
        "nsamples": len(windows),
        "seqlen": windows.shape[1],
        "seed": seed,
        "bos": bos_of(windows, tokenizer, original),
        "dtype": dtype,
    }
    model_print, text_print = fingerprint.of_matrices(linears), fingerprint.of_tokens(windows)

    def kept_as(linear: LinearWeight) -> torch.Tensor:
        return linear.weight.to(homes[linear.name]).contiguous().to(getattr(torch, stored[linear.name].dense.dtype))

    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder))
    homes = homes_of(linears, effort.map_folder)
    digests = {name: layer.spec.digest for name, layer in layers.items()}
    about = {**settings, "prove": prove, "model": model_print, "calibration": text_print, "quantized": digests}
    journal = Journal(resume_folder, about, resume, "requant_folder")
    blocks = [block for stack in found.stacks for block in original.get_submodule(stack).children()]
    passes = (steps + prove) * nodes * len(Share(windows).windows)
    with (
        not_training(original),
        progress_bar("requantizing", passes, progress) as bar,
        gradient_checkpointing(original, blocks) if checkpointing else contextlib.nullcontext(),
        Matrices(
            original, linears, homes, stored, kept_as, windows, batch_size, effort, journal, bar.advance
        ) as matrices,
    ):
        restored, last = matrices.detach_stepwise("host", count, steps, prove=prove)
        result, stages = matrices.stored, tuple(matrices.stages)
    specs = {name: layer.spec for name, layer in present.items()}
    for linear, (name, layer) in zip(linears, layers.items(), strict=True):
        assert isinstance(layer, QuantLinear)
        specs[name] = MatrixSpec.of(result[linear.name])
        improved = QuantLinear(specs[name], layer.bias, layer.transposed, "meta", layer.dtype)
        improved.store(result[linear.name], layer.device)
        put_everywhere(quantized, linear, improved)
    declare(quantized, specs, folds)
    record = Requantization(
        tuple(
            KeptWeights(
                linear.name,
                linear.numel,
                before[linear.name],
                restored[linear.name],
                predicted_loss_change=last[linear.name] if last is not None else None,
            )
            for linear in linears
        ),
        stages,
        (),
        None,
        sum(matrix.nbytes for matrix in result.values()),
        sum(matrix.dense.nbytes for matrix in result.values()),
        settings,
        model_print,
        text_print,
    )
    if rank_of()[0]:  # the first process has the same, and writes it
        journal.discard()
        return record
    save(
        quantized,
        target,
        tokenizer=tokenizer,
        processor=processor_files(source),
        requant=record,
        source=str(source),
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )
    journal.discard()
    return record


def affordable(stored: dict[str, QuantizedMatrix], budget: int) -> int:
    """How many more weights can be kept exactly for so many bytes; never one too many, and below 0 for none.

    Every matrix is charged for row offsets, whether it will need them or not, that are wide enough should all of the
    weights fall to it.
    """
    fixed, dearest, offsets = 0, 0, []
    for matrix in stored.values():
        rows, cols = matrix.dense.shape
        kept = 0 if matrix.outliers is None else matrix.outliers.nnz
        fixed += matrix.nbytes - (0 if matrix.outliers is None else int(matrix.outliers.row_offsets.nbytes))
        value = 4 if matrix.dense.dtype == "float32" else 2
        dearest = max(dearest, value + (2 if cols <= 1 << 16 else 4))
        offsets.append((rows + 1, kept, rows * cols))

    def fits(count: int) -> bool:
        wide = (rows * OFFSET_BYTES[offset_dtype(min(kept + count, numel))] for rows, kept, numel in offsets)
        return fixed + sum(wide) + dearest * count <= budget

    if not fits(0):
        return -1
    return bisect.bisect_left(range(budget), True, key=lambda count: not fits(count + 1))
