"""What ``quantrature demo`` runs: analyze, allocate, quantize, save, load and evaluate the demo model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import checkpoint, evaluate
from .._C import QuantratureError
from ..allocation import allocate
from ..analysis import analyze
from ..models import find_linears, load_model, load_tokenizer
from ..models.loading import quiet
from ..plan import Plan, PlanEntry
from ..quantization import quantize
from ..text import token_windows
from . import text

MODEL = Path(__file__).parent / "model"
BITS = (4, 3, 2)
GROUP_SIZE = 64
METHOD = "rtn"
SEQLEN = 256
CALIBRATION_WINDOWS = 32
NODES = 3
EVALUATION_TOKENS = 16_384


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: name of the plan.
        bits_per_weight: of the quantized matrices, with scales, zero points and outliers.
        bytes: size of the quantized matrices.
        perplexity: perplexity on the held-out text.
        divergence: mean KL divergence from the original model on the held-out text, in nats per token.
        predicted_loss_change: prediction from the calibration text before quantizing, in nats per token.
        measured_loss_change: measured on the held-out text, in nats per token.
    """

    name: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    divergence: float
    predicted_loss_change: float
    measured_loss_change: float


def tour(output: Path | None = None, progress: bool | None = None) -> Iterator[Row]:
    """Quantize the packaged model in six ways, and yield a row after each.

    Args:
        output: folder for the quantized models; by default a temporary folder.
        progress: whether to show progress bars; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Raises:
        QuantratureError: if the package was installed without its model.
    """
    if not (MODEL / "config.json").is_file():
        raise QuantratureError(
            f"[demo] {MODEL} is missing: the package was installed without its model; reinstall quantrature"
        )
    tokenizer = load_tokenizer(MODEL)
    calibration = token_windows(
        [text.calibration_text()], tokenizer, seqlen=SEQLEN, nsamples=CALIBRATION_WINDOWS, seed=0
    )
    evaluation = token_windows([text.evaluation_text()], tokenizer, seqlen=SEQLEN, max_tokens=EVALUATION_TOKENS)
    original = load_model(MODEL, "float32")
    reference = evaluate.perplexity(original, evaluation, progress=progress)
    weights = [linear.weight for linear in find_linears(original)]
    yield Row("original", 16.0, 2 * sum(w.numel() for w in weights), reference.perplexity, 0.0, 0.0, 0.0)

    sensitivity = analyze(
        original,
        calibration,
        metrics=("pqi",),
        bits=BITS,
        group_size=GROUP_SIZE,
        method=METHOD,
        batch_size=8,
        nodes=NODES,
        progress=progress,
    )
    with _folder(output) as folder:
        for bits, proof in zip(BITS, sensitivity.proofs, strict=True):
            entry = PlanEntry(bits, GROUP_SIZE, method=METHOD)
            uniform = Plan.uniform((matrix.name for matrix in sensitivity.matrices), entry)
            row = _measured(f"uniform, {bits} bits", uniform, folder / f"uniform-{bits}", evaluation, original)
            yield replace(row, predicted_loss_change=proof.predicted_loss_change)
            plan = allocate(sensitivity, strategy="pqi", avg_bits=row.bits_per_weight)
            yield _measured(f"PQI plan, {bits} bits", plan, folder / f"pqi-{bits}", evaluation, original)


def _measured(name: str, plan: Plan, folder: Path, evaluation: torch.Tensor, original: PreTrainedModel) -> Row:
    """Quantize a new copy of the model by a plan, save it, load the saved folder, and evaluate the loaded model."""
    model = quantize(load_model(MODEL), plan=plan, progress=False)
    checkpoint.save(model, folder, tokenizer=load_tokenizer(MODEL), plan=plan, source=str(MODEL), overwrite=True)
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    contents = checkpoint.inspect(folder)
    found = evaluate.divergence(loaded, original, evaluation, progress=False)
    return Row(
        name,
        contents.bits_per_weight,
        contents.bytes,
        found.model.perplexity,
        found.mean,
        plan.predicted_loss_change or 0.0,
        found.loss_change,
    )


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="quantrature-demo-") as folder:
        yield Path(folder)
