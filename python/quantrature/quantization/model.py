"""Quantize a model in place."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from .._C import InvalidArgumentError, cuda_device_count
from ..checkpoint.declaration import tell
from ..files.resume import check_resume
from ..methods import METHODS, SOLVERS, Comparison, quantize_matrix, solver_of
from ..models import Linears, LinearWeight, check_loaded, fingerprint
from ..models.folding import Fold, fold
from ..nn import install
from ..nn.experts import part_with_memory
from ..packed import MatrixSpec, QuantizedMatrix
from ..plan import Plan, PlanEntry
from ..plan.nearest import did_you_mean
from ..progress import progress as progress_bar
from ..text import DEFAULT_SEQLEN, CalibrationText
from .request import Request, plan_for
from .sequential import Calibrated, calibrate, units
from .state import BlockState

_log = logging.getLogger(__name__)


def quantize(
    model: torch.nn.Module,
    *,
    bits: int | None = None,
    group_size: int = 64,
    method: str = "rtn",
    sym: bool = False,
    meta_bits: int | None = None,
    outlier_fraction: float = 0.0,
    embedding_bits: int | None = None,
    plan: Plan | None = None,
    ignore: str | Iterable[str] = (),
    calibration: Any = None,
    tokenizer: Any = None,
    nsamples: int | str | None = "auto",
    seqlen: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    text_column: str | None = None,
    batch_size: int = 1,
    true_sequential: bool = True,
    resume_folder: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    progress: bool | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Replace the linear layers in a model's blocks, and optionally its embeddings, by quantized layers.

    Give either ``bits``, for the same setting everywhere, or ``plan``, with a setting for each matrix.

    Args:
        model: language model from transformers; float32, float16 or bfloat16, on any device. It is changed in place.
            Methods that need calibration run it on text alone. In a multimodal model they quantize only the language
            model; in an encoder-decoder both halves. There the encoder gets a window, and the decoder the same window,
            shifted by one after ``decoder_start_token_id``.
        bits: bits per weight, 1 to 8.
        group_size: number of consecutive weights, along the input dimension, that share one scale; -1 for one scale
            per row (output channel).
        method: quantization method, one of ``quantrature.methods.METHODS``: ``rtn``, ``mse``, ``hqq``, ...
        sym: quantize symmetrically around zero, without zero points.
        meta_bits: bits of quantized scales and zero points, 1 to 8; ``None`` stores them as float16 or float32.
        outlier_fraction: fraction of the weights, 0 to 1, that stay unquantized: those of the largest magnitude.
        embedding_bits: also quantize the token embedding and the output embedding to this many bits, by rounding to
            nearest. At 8 bits each token has one scale; with fewer bits the group size is ``group_size``. Tied
            embeddings stay tied. Calibration uses the original embedding. ``None`` does not quantize embeddings.
        plan: plan to follow, instead of the seven arguments above. Matrices that it does not name stay unquantized.
        ignore: matrices not to quantize, as in :func:`quantrature.models.find_linears`; not with ``plan``.
        calibration: calibration text, for methods that need it; any source that
            :func:`quantrature.text.token_windows` takes.
        tokenizer, nsamples, seqlen, seed, bos, text_column: how to cut the calibration text, as in ``token_windows``;
            ``nsamples=None`` uses all windows. The defaults of ``nsamples`` and ``seqlen`` are those of the method's
            authors (:func:`text_settings`).
        batch_size: windows per forward pass of a block.
        true_sequential: within a block, compute the inputs of a matrix with the quantized matrices before it. If false,
            only the blocks before are quantized (:func:`quantrature.quantization.calibrate`).
        resume_folder: folder to save each finished block in; the files are removed at the end. Only used by methods
            that need calibration.
        resume: ``auto`` resumes from finished blocks of the same work in ``resume_folder``, ``required`` fails if there
            are none, ``never`` starts over. The result is the same as without an interruption, byte for byte.
        progress: whether to show a progress bar; by default if stderr is a terminal.
        **options: settings of the method, such as ``damp_percent=0.01``; not with ``plan``, whose entries have them.

    Returns:
        The same model. ``save_pretrained`` writes a checkpoint. Import quantrature before you load it with
        transformers.

    Raises:
        InvalidArgumentError: for an invalid argument or plan entry, or a matrix with weights that are not finite or of
            another dtype; the message names it, and the model is unchanged.
        QuantratureError: if activations are not finite; the message names module and sample, and the model is
            unchanged.
    """
    check_resume("quantize", resume, resume_folder)
    if plan is None:
        _check_options(method, options)
    request = Request(bits, group_size, method, sym, meta_bits, outlier_fraction, embedding_bits, plan, ignore, options)
    linears, plan = plan_for(model, request)
    work = [(linears.find(name), entry) for name, entry in plan if not entry.keeps]
    check_loaded("quantize", [linear for linear, _ in work])
    for linear, _ in work:
        check_weight(linear.name, linear.weight)
    comparison = Comparison()
    if any(SOLVERS[entry.solver].needs for _, entry in work):
        if calibration is None:
            name = next(entry.solver for _, entry in work if SOLVERS[entry.solver].needs)
            raise InvalidArgumentError(f"[quantize] method {name} needs calibration text: give calibration")
        wanted = text_settings(plan, nsamples)
        text = CalibrationText(calibration, tokenizer, wanted["nsamples"], seqlen, seed, bos, text_column)
        windows = text.windows(model, wanted["longest"])
        state = None if resume_folder is None else BlockState(Path(resume_folder), resume)
        found = _calibrated(
            model,
            linears,
            {linear.name: entry for linear, entry in work if linear.in_block},
            windows,
            batch_size,
            true_sequential,
            state,
            progress,
        )
        fold(model, linears, found.folds)
        specs = {}
        for linear, entry in work:
            matrix = found.matrices[linear.name] if linear.in_block else _by_weights(linear, entry, comparison)
            specs[linear.name] = put(model, linear, matrix)
        declare(model, specs, found.folds)
        return model
    specs = {}
    with progress_bar("quantizing", sum(linear.numel for linear, _ in work), progress) as bar:
        for linear, entry in work:
            specs[linear.name] = put(model, linear, _by_weights(linear, entry, comparison))
            bar.advance(linear.numel, linear.name)
    comparison.report()
    declare(model, specs)
    return model


def _check_options(method: str, options: Iterable[str]) -> None:
    """Refuse a name that is neither an argument of :func:`quantize` nor an option of the method."""
    solver_of(method)
    known = METHODS[method].options
    for name in options:
        if name not in known:
            hint = did_you_mean(name, [*inspect.signature(quantize).parameters, *known])
            raise InvalidArgumentError(
                f"[quantize] {name} is not an argument, and not an option of method {method}, which has "
                f"{', '.join(known) or 'none'}{hint}"
            )


def _by_weights(linear: LinearWeight, entry: PlanEntry, comparison: Comparison) -> QuantizedMatrix:
    return quantize_matrix(linear.name, linear.weight.contiguous(), entry, comparison=comparison).to("cpu")


def text_settings(plan: Plan, nsamples: int | str | None) -> dict[str, Any]:
    """Return the default ``nsamples`` and ``longest`` for a plan: the largest values of its methods' authors.

    Most methods use 128 windows, SqueezeLLM 100; SqueezeLLM and AWQ use 512 tokens per window, others 2048.

    Raises:
        InvalidArgumentError: if ``nsamples`` is not an integer, ``None`` or ``"auto"`` (which means the default).
    """
    if isinstance(nsamples, str) and nsamples != "auto":
        raise InvalidArgumentError(f"[quantize] nsamples must be an integer, auto or None: got {nsamples!r}")
    methods = [SOLVERS[entry.solver] for _, entry in plan if not entry.keeps]
    needy = [method for method in methods if method.needs]
    return {
        "nsamples": max((method.nsamples for method in needy), default=128) if nsamples == "auto" else nsamples,
        "longest": max((method.seqlen for method in needy), default=DEFAULT_SEQLEN),
    }


def _calibrated(
    model: torch.nn.Module,
    linears: Linears,
    entries: dict[str, PlanEntry],
    windows: torch.Tensor,
    batch_size: int,
    true_sequential: bool,
    state: BlockState | None,
    progress: bool | None,
) -> Calibrated:
    """Quantize the matrices with calibration text; with ``state``, save each block so that a later run can resume."""
    if state is not None:
        state.begin(
            {
                "version": __version__,
                "model": fingerprint.of_matrices(linears),
                "calibration": fingerprint.of_tokens(windows),
                "plan": Plan(entries).to_json()["entries"],
                "batch_size": batch_size,
                "true_sequential": true_sequential,
            }
        )
    with progress_bar("quantizing", units(linears, entries, len(windows)), progress) as bar:
        found = calibrate(
            model,
            linears,
            entries,
            windows,
            batch_size=batch_size,
            true_sequential=true_sequential,
            state=state,
            report=bar.advance,
        )
    if state is not None:
        state.discard()
    return found


def check_weight(name: str, weight: torch.Tensor, caller: str = "quantize") -> None:
    """Raise an error for a matrix of another dtype or with a NaN or infinity, before the model is changed."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidArgumentError(f"[{caller}] {name} must be float32, float16 or bfloat16: got dtype={weight.dtype}")
    straight = weight if weight.is_contiguous() else weight.mT
    if not (straight.is_cuda and cuda_device_count()[0]):
        straight = straight.cpu()
    if not math.isfinite(float(ops.moments(straight.contiguous()).mean)):
        raise InvalidArgumentError(f"[{caller}] {name} must hold finite numbers: it has a NaN or infinity")


def put(model: torch.nn.Module, linear: LinearWeight, matrix: QuantizedMatrix, device: Any = None) -> MatrixSpec:
    """Replace the layer of a matrix by a quantized layer.

    Args:
        model: the model, which is changed in place.
        linear: the matrix.
        matrix: its quantized form.
        device: device of the quantized layer; by default that of the dense weight.

    Returns:
        The description of the matrix for config.json.
    """
    device = linear.weight.device if device is None else device
    layer = install(model, linear, MatrixSpec.of(matrix))
    layer.store(matrix, device)
    return layer.spec


def declare(model: torch.nn.Module, specs: dict[str, MatrixSpec], folds: Iterable[Fold] = ()) -> None:
    """Free the memory of the dense weights, and record in the model that it is quantized, for transformers."""
    part_with_memory(model)
    tell(model, specs, tuple(folds))
