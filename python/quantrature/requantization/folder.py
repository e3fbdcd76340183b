"""The function ``requant_folder``: restore the most important weights of a quantized folder, within a size budget."""

from __future__ import annotations

import bisect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from .._C import InvalidArgumentError, QuantratureError
from ..analysis.path import homes_of
from ..analysis.proving import Effort, Prover
from ..checkpoint import save
from ..checkpoint.verify import compare
from ..files.new_folder import check_new_folder
from ..models import (
    Linears,
    LinearWeight,
    check_loaded,
    find_linears,
    fingerprint,
    load_model,
    load_tokenizer,
    processor_files,
)
from ..models.folding import fold, folds_of
from ..models.gradients import gradient_checkpointing
from ..models.ranks import rank_of
from ..models.running import not_training
from ..nn import QuantLayer, QuantLinear, put_everywhere, quantized_layers
from ..ops._outliers import offset_dtype
from ..packed import MatrixSpec, QuantizedMatrix
from ..progress import progress as progress_bar
from ..quantization import declare
from ..text import CalibrationText
from .exact import check_steps
from .journal import Journal
from .matrices import QUANTIZED, Matrices
from .record import Requantization

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
    objective: str = "nll",
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
    """Improve a quantized folder of any method: restore the original values of the weights with the largest PQI.

    This is step 4 of :func:`quantrature.requant`. It does not change codes, scales, zero points and weights that are
    unquantized already. It does not change embeddings and fused experts either; the budget is for the other matrices.
    Give exactly one of ``significant_fraction``, ``avg_bits`` and ``target_bytes``.

    Args:
        folder: folder with a model that quantrature quantized.
        source: the original model: folder, or id on the Hugging Face Hub.
        tokens: calibration text; any source that :func:`quantrature.text.token_windows` takes.
        significant_fraction: fraction of the quantized weights to restore, above 0, at most 1.
        avg_bits: budget in bits per weight of the quantized matrices. It includes their scales, zero points and
            unquantized weights.
        target_bytes: budget in bytes for all quantized matrices.
        steps, objective, tokenizer, nsamples, seqlen, seed, bos, text_column, batch_size: as in
            :func:`quantrature.requant`; the default tokenizer is that of the source.
        rule, nodes, tol, max_nodes, abs_mode, checkpointing, map_folder, prove: as in :func:`quantrature.requant`.
        resume_folder, resume, progress: as in :func:`quantrature.requant`.
        output: folder to write, atomically; ``None`` replaces ``folder``, and needs ``overwrite``.
        overwrite: whether to replace a folder that is not empty.
        dtype: dtype in which the models run.
        device_map, max_memory: how to load the source, as in :func:`quantrature.models.load_model`.
        max_shard_size: largest size of one safetensors file, such as ``"5GB"``.
        trust_remote_code: whether to run Python code from the model's folder.

    Returns:
        The record, which is also saved in the folder as requant.json. A plan.json in the folder is not copied, because
        it does not describe the result.

    Raises:
        InvalidArgumentError: for an invalid argument (the message names it), and for a budget without room for one more
            weight.
        QuantratureError: for a matrix that was not made from the source; the message names it.
    """
    target = _target(folder, output, overwrite)
    amount = Amount(significant_fraction, avg_bits, target_bytes, steps)
    effort = Effort(rule, nodes, tol, max_nodes, abs_mode, None if map_folder is None else Path(map_folder), objective)
    effort.check("requant_folder")
    pair = _Pair.load(folder, source, dtype, device_map, max_memory, trust_remote_code)
    linears, stored = [linear for _, linear, _ in pair.matched], pair.stored
    tokenizer = load_tokenizer(source, trust_remote_code) if tokenizer is None else tokenizer
    text = CalibrationText(tokens, tokenizer, nsamples, seqlen, seed, bos, text_column)
    windows = text.windows(pair.original)
    count = amount.weights(stored)
    settings = {
        **asdict(amount),
        **effort.settings,
        "batch_size": batch_size,
        **text.settings(windows, pair.original),
        "dtype": dtype,
    }
    prints = fingerprint.of_matrices(linears), fingerprint.of_tokens(windows)
    about = {**settings, "prove": prove, "model": prints[0], "calibration": prints[1], "quantized": pair.digests}
    journal = Journal(resume_folder, about, resume, "requant_folder")
    prover = Prover(pair.original, windows, batch_size, effort)
    with (
        not_training(pair.original),
        progress_bar("requantizing", (steps + prove) * nodes * len(prover.share), progress) as bar,
        gradient_checkpointing(pair.original, pair.found, checkpointing),
        pair.matrices(prover, journal, bar.advance) as matrices,
    ):
        restored = matrices.detach_stepwise(QUANTIZED, count, steps, prove=prove)
    record = matrices.record([_kept(stored[linear.name]) for linear in linears], restored, settings, prints)
    pair.put(matrices.stored)
    if not rank_of()[0]:  # all processes have the same result; the first one writes it
        save(
            pair.quantized,
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


def _target(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None, overwrite: bool) -> Path:
    """Return the folder to write, after a check that it may be written."""
    if output is None and not overwrite:
        raise InvalidArgumentError(f"[requant_folder] output must be given, or overwrite set to replace {folder}")
    target = Path(folder if output is None else output)
    check_new_folder(target, overwrite)
    return target


@dataclass(frozen=True)
class Amount:
    """How many weights to restore, given by exactly one of three arguments.

    Attributes:
        significant_fraction: fraction of the quantized weights, above 0, at most 1.
        avg_bits: budget in bits per weight of the quantized matrices.
        target_bytes: budget in bytes for all quantized matrices.
        steps: number of rounds; each restores an equal share.

    Raises:
        InvalidArgumentError: if none or several of the three are given, or a number is out of range.
    """

    significant_fraction: float | None
    avg_bits: float | None
    target_bytes: int | None
    steps: int

    def __post_init__(self) -> None:
        """Check the arguments."""
        if sum(given is not None for given in astuple(self)[:3]) != 1:
            raise InvalidArgumentError(
                "[requant_folder] give exactly one of significant_fraction, avg_bits and target_bytes"
            )
        if self.significant_fraction is not None and not 0 < self.significant_fraction <= 1:
            raise InvalidArgumentError(
                "[requant_folder] significant_fraction must be a fraction above 0, at most 1: got "
                f"{self.significant_fraction}"
            )
        check_steps(self.steps, "requant_folder")

    def weights(self, stored: Mapping[str, QuantizedMatrix]) -> int:
        """Return the number of weights to restore.

        Args:
            stored: matrix name to quantized matrix.

        Raises:
            InvalidArgumentError: if the number is below 1, or above the number of quantized weights.
        """
        total = sum(math.prod(matrix.dense.shape) for matrix in stored.values())
        if self.significant_fraction is not None:
            count = round(self.significant_fraction * total)
        else:
            budget = int(self.avg_bits * total / 8) if self.avg_bits is not None else self.target_bytes
            assert budget is not None
            count = affordable(stored, budget)
        free = total - sum(map(_kept, stored.values()))
        if not 0 < count <= free:
            raise InvalidArgumentError(
                f"[requant_folder] the budget must have room for 1 to {free} more weights: got {count}"
            )
        return count


def _kept(matrix: QuantizedMatrix) -> int:
    """Return the number of unquantized weights of a matrix."""
    return 0 if matrix.outliers is None else matrix.outliers.nnz


@dataclass(frozen=True)
class _Pair:
    """A quantized model and the original model that it was made from.

    Attributes:
        quantized: the quantized model.
        original: the original model. Scales that are folded into the quantized model are folded into it, too.
        found: matrices of the original model.
        matched: the matrices that ReQuant may improve, each as the name of the layer in the quantized model, the
            matrix in the original model, and the layer.
    """

    quantized: torch.nn.Module
    original: torch.nn.Module
    found: Linears
    matched: Sequence[tuple[str, LinearWeight, QuantLayer]]

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        source: str | os.PathLike[str],
        dtype: str,
        device_map: Any,
        max_memory: Mapping[int | str, int | str] | None,
        trust_remote_code: bool,
    ) -> _Pair:
        """Load both models, and match their matrices.

        Raises:
            InvalidArgumentError: if the folder has no matrix that ReQuant can improve.
            QuantratureError: for a matrix that was not made from the source; the message names it.
        """
        quantized = load_model(folder, trust_remote_code=trust_remote_code)
        present = quantized_layers(quantized)
        if not present:
            raise InvalidArgumentError(f"[requant_folder] {folder} holds no matrix quantized by quantrature")
        original = load_model(source, dtype, device_map, trust_remote_code, max_memory)
        found = find_linears(original, embeddings=True, watch=False)
        inside = [(name, found.find(name), layer) for name, layer in present.items() if found.find(name).in_block]
        matched = [(name, linear, layer) for name, linear, layer in inside if linear.expert is None]
        if not matched:
            raise InvalidArgumentError(
                f"[requant_folder] {folder} must have a quantized matrix that is not a fused expert: ReQuant does not "
                "change fused experts"
            )
        if len(matched) < len(inside):
            _log.warning(
                "%d matrices of fused experts stay as they are. The budget is for the other %d matrices; their loss "
                "change is measured with dense experts",
                len(inside) - len(matched),
                len(matched),
            )
        check_loaded("requant_folder", [linear for _, linear, _ in matched])
        fold(original, found, folds_of(quantized))
        for name, linear, layer in matched:
            same = tuple(linear.weight.shape) == layer.spec.shape
            if not same or not compare(layer, linear.weight.cpu()).fits:
                raise QuantratureError(f"[requant_folder] {name} of {folder} was not made from {source}")
        return cls(quantized, original, found, matched)

    @property
    def stored(self) -> dict[str, QuantizedMatrix]:
        """The quantized matrices, by name of the matrix in the original model."""
        return {linear.name: layer.matrix for _, linear, layer in self.matched}

    @property
    def digests(self) -> dict[str, str | None]:
        """Digests of the quantized matrices, by name of the layer in the quantized model."""
        return {name: layer.spec.digest for name, _, layer in self.matched}

    def matrices(self, prover: Prover, journal: Journal, advance: Callable[[int], Any]) -> Matrices:
        """Return an object that holds the quantized and the original matrices, and restores weights."""
        linears, stored = [linear for _, linear, _ in self.matched], self.stored
        homes = homes_of(linears, prover.effort.map_folder)

        def original(linear: LinearWeight) -> torch.Tensor:
            dtype = getattr(torch, stored[linear.name].dense.dtype)
            return linear.weight.to(homes[linear.name]).contiguous().to(dtype)

        return Matrices(prover, homes, linears, stored, original, journal, advance)

    def put(self, result: Mapping[str, QuantizedMatrix]) -> None:
        """Replace the matrices of the quantized model by the improved ones."""
        folds = folds_of(self.quantized)
        specs = {name: layer.spec for name, layer in quantized_layers(self.quantized).items()}
        for name, linear, layer in self.matched:
            assert isinstance(layer, QuantLinear)
            specs[name] = MatrixSpec.of(result[linear.name])
            improved = QuantLinear(specs[name], layer.bias, layer.transposed, "meta", layer.dtype)
            improved.store(result[linear.name], layer.device)
            put_everywhere(self.quantized, linear, improved)
        declare(self.quantized, specs, folds)


def affordable(stored: Mapping[str, QuantizedMatrix], budget: int) -> int:
    """Return how many more weights can stay unquantized within a budget in bytes; -1 if it is exceeded already.

    The result always fits into the budget. It may be a little too small, because it is not known yet which matrices the
    weights belong to. Each weight is counted with the bytes that it needs in the most expensive matrix. Each matrix is
    counted with row offsets, in a dtype that is wide enough if all the weights belong to this matrix.

    Args:
        stored: matrix name to quantized matrix.
        budget: bytes for all quantized matrices.
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
