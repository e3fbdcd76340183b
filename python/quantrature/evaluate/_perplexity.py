"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .. import progress as _progress
from .._C import InvalidArgumentError
from ..models import running as _forward
from ..models.finiteness import demand_finite_windows
from ..models.running import Span
from ..text import bos_of, token_stream, token_windows, window_length, window_prefix


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of ``nll``.
        nll: mean negative log likelihood (loss), in nats per token.
        tokens: number of tokens predicted.
        windows: number of windows.
        standard_error: standard error of ``nll``, from the spread between windows; NaN for a single window.
        bos: where the tokens have BOS: ``window``, ``text`` or ``none`` (:func:`quantrature.text.bos_of`).
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    standard_error: float
    bos: str = "none"


def perplexity(
    model: Any,
    tokens: Any,
    seqlen: int | None = None,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    bos: str = "auto",
    text_column: str | None = None,
    progress: bool | None = None,
) -> PerplexityResult:
    """Measure the perplexity of a causal language model on a text.

    The text is cut into windows that do not overlap. Each token of a window, except the first, is predicted from the
    tokens before it. With ``stride``, windows overlap and start every ``stride`` tokens. Each token of the text, except
    the first, is then scored once, in the first window that contains it. This is the protocol of the Hugging Face guide
    on perplexity; arXiv 2503.06518 uses it with windows of 1024, a stride of 512 and ``bos="text"``. One detail
    differs: there, the mean loss of the first window also counts for its first token, which is not predicted. Here it
    does not, a difference of about one token in the whole text.

    Logits are converted to float32 and summed in float64.

    Args:
        model: from transformers, or any module that returns ``.logits`` for ``input_ids``.
        tokens: windows (int64, (windows, seqlen)), or any source that :func:`quantrature.text.token_windows` takes.
        seqlen: tokens per window; default as in ``token_windows``.
        tokenizer: required if ``tokens`` is text.
        max_tokens: use only this many tokens, from the start of the text; by default all.
        batch_size: windows per forward pass, at least 1.
        stride: tokens from the start of a window to the start of the next, 1 to ``seqlen - 1``; ``None`` for windows
            without overlap.
        bos: where to add the beginning-of-sequence token, as in ``token_windows``. With ``stride`` and ``"window"``,
            each overlapping window begins with BOS, and the first token of the text is predicted from it.
        text_column: field of the rows that holds the text, as in ``token_windows``.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Raises:
        InvalidArgumentError: as for ``token_windows``; for a model that is not causal, a window of one token, a
            ``batch_size`` below 1, or a ``stride`` out of range.
        QuantratureError: if the loss is not finite; the message names the window.
    """
    if stride is None:
        windows = token_windows(
            tokens, tokenizer, seqlen=seqlen, max_tokens=max_tokens, model=model, bos=bos, text_column=text_column
        )
        ids, length = windows.flatten(), windows.shape[1]
        spans = [Span(start, start + length, start + 1) for start in range(0, len(ids), length)]
        prefix, begun = torch.empty(0, dtype=torch.int64), bos_of(windows, tokenizer, model)
    else:
        length = window_length(seqlen, model)
        ids = token_stream(tokens, tokenizer, max_tokens=max_tokens, bos=bos, text_column=text_column)
        prefix = torch.tensor(window_prefix(tokenizer, bos), dtype=torch.int64)
        if len(prefix) and ids[: len(prefix)].tolist() == prefix.tolist():
            ids = ids[len(prefix) :]
        spans = _overlapping(ids, length - len(prefix), stride)
        if len(prefix):
            spans[0] = spans[0]._replace(scored=0)
        begun = "window" if len(prefix) else bos_of(ids, tokenizer, model)
    if length < 2:
        raise InvalidArgumentError(
            f"[perplexity] seqlen must be at least 2, to predict a token from another: got seqlen={length}"
        )
    _forward.check("perplexity", model, ids, batch_size)
    sums: list[float] = []
    counts: list[int] = []
    with _forward.evaluating(model), _progress.progress("perplexity", len(spans), progress) as bar:
        for batch in _forward.batches(spans, batch_size):
            x = torch.stack([torch.cat([prefix, ids[span.start : span.stop]]) for span in batch])
            losses = token_losses(_forward.logits(model, x), x)[:, len(prefix) + batch[0].shape[1] - 1 :]
            demand_finite_windows("perplexity", "the loss", losses, batch, len(sums))
            sums += losses.double().sum(dim=1).tolist()
            counts += [losses.shape[1]] * len(batch)
            bar.advance(len(batch))
    return result(sums, counts, begun)


def _overlapping(ids: torch.Tensor, length: int, stride: int) -> list[Span]:
    """Return windows that start every ``stride`` tokens; each scores the tokens that no earlier window has."""
    if not isinstance(stride, int) or not 1 <= stride < length:
        raise InvalidArgumentError(
            f"[perplexity] stride must be 1 to {length - 1}, for seqlen={length}: got stride={stride}"
        )
    if ids.ndim != 1 or len(ids) < length:
        raise InvalidArgumentError(
            f"[perplexity] stride needs one row of at least seqlen={length} tokens: got shape={tuple(ids.shape)}"
        )
    spans = [Span(0, length, 1)]
    while spans[-1].stop < len(ids):
        last = spans[-1]
        spans.append(Span(last.start + stride, min(last.stop + stride, len(ids)), last.stop))
    return spans


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token but the first, in nats: float32 (windows, tokens - 1), on the CPU."""
    windows, length, vocabulary = logits.shape
    losses = torch.empty(windows, length - 1)
    targets = ids.to(logits.device)
    for window, some in _forward.chunks(windows, length - 1, vocabulary):
        later = slice(some.start + 1, some.stop + 1)
        losses[window, some] = functional.cross_entropy(
            logits[window, some].float(), targets[window, later], reduction="none"
        )
    return losses


def result(sums: Sequence[float], counts: Sequence[int], bos: str) -> PerplexityResult:
    """Combine the summed loss and the number of scored tokens of each window into a result."""
    nll, error = _forward.mean_and_error(sums, counts)
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=sum(counts),
        windows=len(counts),
        standard_error=error,
        bos=bos,
    )
