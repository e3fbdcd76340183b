"""Perplexity: how well a model foretells a text."""

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
from ..models.running import Span
from ..text import bos_of, token_stream, token_windows, window_length, window_prefix


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model foretold a text.

    Attributes:
        perplexity: exp of ``nll``.
        nll: mean negative log likelihood of a token, in nats.
        tokens: tokens that were foretold.
        windows: windows that they stood in.
        standard_error: of ``nll``, from the spread between windows; NaN for a single one.
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
    """Perplexity of a causal language model.

    The text is cut into windows end to end, and each token but the first of its window is foretold from those before
    it in the window. With ``stride``, windows begin that many tokens after one another and overlap, and every token
    but the very first of the text is foretold once, in the first window that has it: the protocol of the Hugging Face
    guide on perplexity, used with 1024 and 512 and ``bos="text"`` in arXiv 2503.06518. There, the mean loss of the
    first window also stands for its first token, which nothing foretells; here it does not (a difference of the order
    of one token in the whole text).

    Logits are widened to float32, sums are float64.

    Args:
        model: from transformers, or any module that gives ``.logits`` for ``input_ids``.
        tokens: windows, or whatever :func:`quantrature.text.token_windows` takes.
        seqlen: tokens in a window; see there for the default.
        tokenizer: for text.
        max_tokens: use no more of the text than its first tokens.
        batch_size: windows in one forward pass.
        stride: tokens from the start of a window to the start of the next; ``None`` for no overlap.
        bos: where the beginning-of-sequence token goes, see there; with ``stride`` and ``"window"``, each of the
            overlapping windows begins with it, and the first token of the text is foretold from it.
        text_column: field of the rows that has the text, see there.
        progress: show a bar; ``None`` if stderr is a terminal.

    Raises:
        InvalidArgumentError: as token_windows; for a model that is not causal, a window of one token, a batch_size
            below 1, a stride below 1 or not below seqlen.
        QuantratureError: naming the window, where the loss is not finite.
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
        raise InvalidArgumentError(f"[perplexity] a window needs a token to foretell another from: got seqlen={length}")
    _forward.check("perplexity", model, ids, batch_size)
    sums: list[float] = []
    counts: list[int] = []
    with _forward.evaluating(model), _progress.progress("perplexity", len(spans), progress) as bar:
        for batch in _forward.batches(spans, batch_size):
            x = torch.stack([torch.cat([prefix, ids[span.start : span.stop]]) for span in batch])
            losses = token_losses(_forward.logits(model, x), x)[:, len(prefix) + batch[0].shape[1] - 1 :]
            _forward.demand_finite("perplexity", "the loss", losses, batch, len(sums))
            sums += losses.double().sum(dim=1).tolist()
            counts += [losses.shape[1]] * len(batch)
            bar.advance(len(batch))
    return result(sums, counts, begun)


def _overlapping(ids: torch.Tensor, length: int, stride: int) -> list[Span]:
    """Windows that begin stride tokens apart, of which each scores what no earlier one has."""
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
    """Loss of every token but the first, in nats: float32 (windows, tokens - 1), on the CPU."""
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
    """From the loss that each window sums to, the tokens that it counts, and where the tokens have BOS."""
    nll, error = _forward.mean_and_error(sums, counts)
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=sum(counts),
        windows=len(counts),
        standard_error=error,
        bos=bos,
    )
