"""KL divergence of a model's predictions from those of a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import progress as _progress
from .._C import InvalidArgumentError
from ..models import running as _forward
from ..models.finiteness import demand_finite_windows
from ..models.running import Span
from ..text import bos_of, text_config, token_windows
from ._perplexity import PerplexityResult, result

COMPARED = ("the divergence", "the loss", "the reference's loss")


@dataclass(frozen=True)
class DivergenceResult:
    """KL divergence of a model from a reference model, over the tokens of a text.

    Attributes:
        mean: mean over tokens of the Kullback-Leibler divergence KL(reference || model), in nats.
        median: median over tokens, in nats.
        p99: 99th percentile over tokens, in nats.
        maximum: largest divergence of a token, in nats.
        standard_error: standard error of ``mean``, from the spread between windows; NaN for a single window.
        same_top1: fraction of the tokens, 0 to 1, for which both models rate the same next token highest.
        loss_change: mean loss of the model minus that of the reference, in nats per token.
        loss_change_standard_error: standard error of ``loss_change``. It is smaller than that of either loss, because
            both models are measured on the same windows.
        tokens: number of tokens compared.
        windows: number of windows.
        model: perplexity of the model.
        reference: perplexity of the reference.
    """

    mean: float
    median: float
    p99: float
    maximum: float
    standard_error: float
    same_top1: float
    loss_change: float
    loss_change_standard_error: float
    tokens: int
    windows: int
    model: PerplexityResult
    reference: PerplexityResult


def divergence(
    model: Any,
    reference: Any,
    tokens: Any,
    seqlen: int | None = None,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    bos: str = "auto",
    text_column: str | None = None,
    progress: bool | None = None,
) -> DivergenceResult:
    """Measure the Kullback-Leibler divergence of a model from a reference model, and the perplexity of both.

    Both models run on the same windows, which do not overlap. In each window, the predictions after all tokens but the
    last are compared. Logits are kept for one batch only, converted to float32 and summed in float64. A divergence
    that is negative because of rounding counts as zero.

    Args:
        model: the model to evaluate: from transformers, or any module that returns ``.logits`` for ``input_ids``.
        reference: the model to compare with, usually the original one. It may be on another device.
        tokens: windows (int64, (windows, seqlen)), or any source that :func:`quantrature.text.token_windows` takes.
        seqlen: tokens per window; default as in ``token_windows``.
        tokenizer: required if ``tokens`` is text.
        max_tokens: use only this many tokens, from the start of the text; by default all.
        batch_size: windows per forward pass, at least 1.
        bos: where to add the beginning-of-sequence token, as in ``token_windows``.
        text_column: field of the rows that holds the text, as in ``token_windows``.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Raises:
        InvalidArgumentError: as for :func:`perplexity`, and for models with vocabularies of different sizes.
        QuantratureError: if a divergence is not finite; the message names the window.
    """
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, max_tokens=max_tokens, model=model, bos=bos, text_column=text_column
    )
    count, length = windows.shape
    if length < 2:
        raise InvalidArgumentError(
            f"[divergence] seqlen must be at least 2, to predict a token from another: got seqlen={length}"
        )
    for either in (model, reference):
        _forward.check("divergence", either, windows, batch_size)
    _same_vocabulary(*(getattr(text_config(either), "vocab_size", None) for either in (model, reference)))
    sums: tuple[list[float], ...] = ([], [], [])
    divergences: list[torch.Tensor] = []
    same = 0
    spans = [Span(start, start + length, start + 1) for start in range(0, count * length, length)]
    with _forward.evaluating(model, reference), _progress.progress("divergence", count, progress) as bar:
        for batch in _forward.batches(spans, batch_size):
            done = len(sums[0])
            x = windows[done : done + len(batch)]
            compared, agree = _compare(_forward.logits(model, x), _forward.logits(reference, x), x)
            for total, values, what in zip(sums, compared, COMPARED, strict=True):
                demand_finite_windows("divergence", what, values, batch, done)
                total += values.double().sum(dim=1).tolist()
            divergences.append(compared[0].flatten())
            same += agree
            bar.advance(len(batch))
    counts = [length - 1] * count
    begun = bos_of(windows, tokenizer, model)
    mean, error = _forward.mean_and_error(sums[0], counts)
    change, change_error = _forward.mean_and_error([m - r for m, r in zip(sums[1], sums[2], strict=True)], counts)
    every = torch.cat(divergences).double().numpy()
    median, p99 = np.quantile(every, [0.5, 0.99]).tolist()
    return DivergenceResult(
        mean=mean,
        median=median,
        p99=p99,
        maximum=float(every.max()),
        standard_error=error,
        same_top1=same / len(every),
        loss_change=change,
        loss_change_standard_error=change_error,
        tokens=len(every),
        windows=count,
        model=result(sums[1], counts, begun),
        reference=result(sums[2], counts, begun),
    )


def _compare(ours: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return COMPARED for every token but the first, (3, windows, tokens - 1), and the number of equal top-1 tokens."""
    windows, length, vocabulary = ours.shape
    _same_vocabulary(vocabulary, theirs.shape[2])
    compared = torch.empty(3, windows, length - 1)
    same = 0
    targets = ids.to(ours.device)
    for window, some in _forward.chunks(windows, length - 1, vocabulary):
        later = targets[window, some.start + 1 : some.stop + 1, None]
        p = theirs[window, some].to(ours.device).float().log_softmax(dim=-1)
        q = ours[window, some].float().log_softmax(dim=-1)
        compared[1, window, some] = -q.gather(-1, later).squeeze(-1)
        compared[2, window, some] = -p.gather(-1, later).squeeze(-1)
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        # What the reference rules out (-inf) adds nothing, even where the model rules it out too.
        surprise = (p - q).masked_fill_(p == -torch.inf, 0)
        compared[0, window, some] = surprise.mul_(p.exp_()).sum(dim=-1).clamp_(min=0)
    return compared, same


def _same_vocabulary(ours: int | None, theirs: int | None) -> None:
    if ours is not None and theirs is not None and ours != theirs:
        raise InvalidArgumentError(
            f"[divergence] both models must have the same vocabulary size: got model={ours}, reference={theirs}"
        )
