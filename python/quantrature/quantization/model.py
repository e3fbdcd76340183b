"""Quantize a model in place: check the arguments, make the plan, and quantize each matrix by its plan entry."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._C import InvalidArgumentError
from ..files.resume import check_resume
from ..methods import METHODS, Comparison, check_method, quantize_matrix
from ..models import Linears, LinearWeight, Skipped, check_loaded, find_linears, fingerprint
from ..models.folding import fold
from ..nn import quantized_layers
from ..nn.experts import can_split
from ..packed import QuantizedMatrix
from ..plan import Plan, PlanEntry
from ..plan.nearest import did_you_mean
from ..progress import progress as progress_bar
from ..text import DEFAULT_SEQLEN, CalibrationText
from .layers import check_weight, declare, put
from .sequential import Calibrated, calibrate, units
from .state import BlockState

_log = logging.getLogger(__name__)

OF_ENTRIES = ("group_size", "method", "sym", "zero", "scale_dtype", "meta_bits", "outlier_fraction")
"""Arguments that cannot be combined with a plan, because each entry of a plan sets them."""


def quantize(
    model: torch.nn.Module,
    *,
    bits: int | None = None,
    group_size: int = 64,
    method: str = "rtn",
    sym: bool = False,
    zero: str = "float",
    scale_dtype: str = "auto",
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
        zero: ``float``, or ``integer`` for zero points that are integers from 0 to ``2**bits - 1``, as most inference
            engines need them.
        scale_dtype: dtype of scales and zero points: ``auto`` (float16, or float32 where that is too narrow),
            ``float16``, ``bfloat16``, ``float32``, or ``e8m0`` for powers of two.
        meta_bits: bits of quantized scales and zero points, 1 to 8; ``None`` stores them as float16 or float32.
        outlier_fraction: fraction of the weights, 0 to 1, that stay unquantized: those of the largest magnitude.
        embedding_bits: also quantize the token embedding and the output embedding to this many bits, by rounding to
            nearest. At 8 bits each token has one scale; with fewer bits the group size is ``group_size``. Tied
            embeddings stay tied. Calibration uses the original embedding. ``None`` does not quantize embeddings.
        plan: plan to follow, instead of the nine arguments above. Matrices that it does not name stay unquantized.
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
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.
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
    request = Request(
        bits,
        group_size,
        method,
        sym,
        zero,
        scale_dtype,
        meta_bits,
        outlier_fraction,
        embedding_bits,
        plan,
        ignore,
        options,
    )
    linears, plan = plan_for(model, request)
    windows = None
    if calibration is not None and _needing_text(plan) is not None:
        wanted = text_settings(plan, nsamples)
        text = CalibrationText(calibration, tokenizer, wanted["nsamples"], seqlen, seed, bos, text_column)
        windows = text.windows(model, wanted["longest"])
    return quantize_by_plan(
        model,
        linears,
        plan,
        windows,
        batch_size=batch_size,
        true_sequential=true_sequential,
        state=None if resume_folder is None else BlockState(Path(resume_folder), resume),
        progress=progress,
    )


def quantize_by_plan(
    model: torch.nn.Module,
    linears: Linears,
    plan: Plan,
    windows: torch.Tensor | None = None,
    *,
    batch_size: int = 1,
    true_sequential: bool = True,
    state: BlockState | None = None,
    progress: bool | None = None,
) -> torch.nn.Module:
    """Quantize a model with the matrices and the plan that :func:`plan_for` returned.

    Args:
        model: the model, changed in place.
        linears: quantizable matrices, from :func:`plan_for`.
        plan: plan for these matrices, from :func:`plan_for`.
        windows: token ids of the calibration text, int64 (windows, tokens); only for methods that need it.
        batch_size, true_sequential, progress: as in :func:`quantize`.
        state: folder to save finished blocks in, and to resume from; ``None`` saves nothing.

    Returns:
        The same model.

    Raises:
        InvalidArgumentError, QuantratureError: as :func:`quantize` does; the model is unchanged.
    """
    work = [(linears.find(name), entry) for name, entry in plan if not entry.keeps]
    check_loaded("quantize", [linear for linear, _ in work])
    for linear, _ in work:
        check_weight(linear.name, linear.weight)
    comparison = Comparison()
    specs = {}
    if (needy := _needing_text(plan)) is not None:
        if windows is None:
            raise InvalidArgumentError(f"[quantize] method {needy} needs calibration text: give calibration")
        entries = {linear.name: entry for linear, entry in work if linear.in_block}
        found = _calibrated(model, linears, entries, windows, batch_size, true_sequential, state, progress)
        fold(model, linears, found.folds)
        for linear, entry in work:
            matrix = found.matrices[linear.name] if linear.in_block else _by_weights(linear, entry, comparison)
            specs[linear.name] = put(model, linear, matrix)
        declare(model, specs, found.folds)
        return model
    with progress_bar("quantizing", sum(linear.numel for linear, _ in work), progress) as bar:
        for linear, entry in work:
            specs[linear.name] = put(model, linear, _by_weights(linear, entry, comparison))
            bar.advance(linear.numel, linear.name)
    comparison.report()
    declare(model, specs)
    return model


def _needing_text(plan: Plan) -> str | None:
    """Return the first method in a plan that needs calibration text; ``None`` if no method does."""
    return next((entry.method for _, entry in plan if not entry.keeps and METHODS[entry.method].needs), None)


@dataclass(frozen=True)
class Request:
    """How to quantize a model: one setting for all matrices, or a plan.

    Attributes:
        bits, group_size, method, sym, zero, scale_dtype, meta_bits: as in :func:`quantrature.quantize`, with the same
            defaults.
        outlier_fraction, embedding_bits, plan, ignore, options: the same.
    """

    bits: int | None = None
    group_size: int = 64
    method: str = "rtn"
    sym: bool = False
    zero: str = "float"
    scale_dtype: str = "auto"
    meta_bits: int | None = None
    outlier_fraction: float = 0.0
    embedding_bits: int | None = None
    plan: Plan | None = None
    ignore: str | Iterable[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, caller: str) -> None:
        """Raise an InvalidArgumentError for arguments that cannot be combined, or an unknown method."""
        if (self.bits is None) == (self.plan is None):
            raise InvalidArgumentError(f"[{caller}] give either bits or plan, not both")
        if self.plan is None:
            check_method(self.method)
            return
        for name, default in ((f.name, f.default) for f in fields(self) if f.name in OF_ENTRIES):
            if (given := getattr(self, name)) != default:
                raise InvalidArgumentError(
                    f"[{caller}] {name} cannot be combined with a plan: set it in the plan's entries: got "
                    f"{name}={given!r}"
                )
        if self.ignore:
            raise InvalidArgumentError(
                f"[{caller}] ignore cannot be combined with a plan: remove the entries from the plan instead"
            )
        if self.options:
            name = next(iter(self.options))
            raise InvalidArgumentError(
                f"[{caller}] {name} cannot be combined with a plan: set it in the options of its entries"
            )

    def entry(self, caller: str) -> PlanEntry:
        """Return the plan entry for the matrices in the model's blocks, for a request without a plan."""
        assert self.bits is not None
        of_method = METHODS[self.method].group_size
        try:
            return PlanEntry(
                self.bits,
                self.group_size if of_method is None else of_method,
                self.sym,
                self.method,
                self.meta_bits,
                self.outlier_fraction,
                options=self.options,
                zero=self.zero,
                scale_dtype=self.scale_dtype,
            )
        except InvalidArgumentError as e:
            raise InvalidArgumentError(f"[{caller}] {e}") from None


def plan_for(
    model: torch.nn.Module, request: Request, *, experts: bool = True, caller: str = "quantize"
) -> tuple[Linears, Plan]:
    """Check a request, find the matrices of a model, and return the plan for them.

    The values of the weights are read only if a method distributes outliers over the matrices; otherwise the model may
    be on the meta device. On the meta device, each matrix gets the same fraction of outliers.

    Args:
        model: causal language model from transformers, not quantized.
        request: how to quantize it.
        experts: whether to include fused experts, and embeddings if the plan or ``embedding_bits`` asks for them.
        caller: name of the public function that was called, for messages.

    Returns:
        The quantizable matrices, and the plan. It is the plan of the request, or a new plan with an entry for each
        matrix to quantize.

    Raises:
        InvalidArgumentError: for an invalid argument or plan entry; the message names it.
    """
    if quantized_layers(model):
        raise InvalidArgumentError(f"[{caller}] model must not be quantized already")
    request.check(caller)
    plan, embedding_bits = request.plan, request.embedding_bits
    if embedding_bits is not None and (plan is not None or not experts):
        raise InvalidArgumentError(f"[{caller}] embedding_bits cannot be combined with a plan or ReQuant: remove it")
    embeddings = experts and (plan is not None or embedding_bits is not None)
    linears = _that_can_run(find_linears(model, request.ignore, experts=experts, embeddings=embeddings))
    if plan is not None:
        _check_plan(plan, linears, caller)
        return linears, plan
    entry = request.entry(caller)
    inside = [linear for linear in linears if linear.in_block]
    made = Plan.uniform((linear.name for linear in inside), entry)
    spread = METHODS[request.method].spread
    if spread is not None and request.outlier_fraction and not any(linear.parameter.is_meta for linear in inside):
        fractions = spread({linear.name: linear.weight for linear in inside}, request.outlier_fraction)
        for name, fraction in fractions.items():
            made = made.replace(name, outlier_fraction=fraction)
    if embedding_bits is not None:
        made = _with_embeddings(made, linears, entry, embedding_bits, caller)
    return linears, made


def _check_plan(plan: Plan, linears: Linears, caller: str) -> None:
    """Raise for an entry whose matrix is unknown, cannot be quantized, or cannot be quantized as the entry says."""
    reasons = {skipped.name: skipped.reason for skipped in linears.skipped}
    quantized = [(name, entry) for name, entry in plan if not entry.keeps]
    for name, _ in quantized:
        if name in reasons:
            raise InvalidArgumentError(f"[{caller}] plan entry {name!r} cannot be quantized: {reasons[name]}")
    plan.check_modules(linear.name for linear in linears)
    for name, entry in quantized:
        if not linears.find(name).in_block and (entry.outlier_fraction or METHODS[entry.method].needs):
            raise InvalidArgumentError(
                f"[{caller}] {name}: an embedding cannot have outliers or a method that needs calibration"
            )


def _with_embeddings(plan: Plan, linears: Linears, of_blocks: PlanEntry, bits: int, caller: str) -> Plan:
    outside = [linear.name for linear in linears if not linear.in_block]
    if not outside:
        why = [f"{s.name} is {s.reason}" for s in linears.skipped if "embedding" in s.reason or "tied" in s.reason]
        raise InvalidArgumentError(
            f"[{caller}] embedding_bits: the model has no embedding that can be quantized: {'; '.join(why)}"
        )
    # The grids that GGUF files can hold at 8 bits.
    beside: dict[str, Any] = {"sym": True, "scale_dtype": "float16"} if of_blocks.method == "gguf" else {}
    try:
        entry = replace(
            of_blocks,
            bits=bits,
            group_size=-1 if bits == 8 else of_blocks.group_size,
            method="rtn",
            outlier_fraction=0.0,
            options={},
            **beside,
        )
    except InvalidArgumentError as e:
        raise InvalidArgumentError(f"[{caller}] embedding_bits: {e}") from None
    return replace(plan, entries={**plan.entries, **dict.fromkeys(outside, entry)})


def _that_can_run(linears: Linears) -> Linears:
    """Leave out experts whose module cannot run quantized experts. Warn about weights that unexpectedly stay dense."""
    reason = "fused experts of a module with a forward of its own"
    alone = [linear for linear in linears if linear.expert is not None and not can_split(linear.module)]
    left = [Skipped(linear.name, (linear.out_features, linear.in_features), reason) for linear in alone]
    kept = tuple(linear for linear in linears if linear not in alone) if alone else linears.matrices
    skipped = (*linears.skipped, *left)
    expected = ("embedding", "output embedding", "outside the blocks", "router")
    strange: dict[tuple[str, str], int] = {}
    for s in skipped:
        if s.reason not in expected and not s.reason.startswith(("tied to", "ignored by")):
            kind = re.sub(r"\b\d+\b", "*", s.name), s.reason
            strange[kind] = strange.get(kind, 0) + 1
    if strange:
        some = "; ".join(f"{count} {name} ({reason})" for (name, reason), count in list(strange.items())[:8])
        more = "; ..." if len(strange) > 8 else ""
        left_out = sum(strange.values())
        _log.warning("%d matrices can be quantized; %d weights stay unquantized: %s%s", len(kept), left_out, some, more)
    return Linears(kept, skipped, linears.stacks)


def _check_options(method: str, options: Iterable[str]) -> None:
    """Raise for a name that is neither an argument of :func:`quantize` nor an option of the method."""
    check_method(method)
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
    methods = [METHODS[entry.method] for _, entry in plan if not entry.keeps]
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
