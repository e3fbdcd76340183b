"""Divergence: how far a model's predictions are from those of a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import progress as _progress
from .._C import InvalidArgumentError
from ..models import running as _forward
from ..models.running import Span
from ..text import bos_of, text_config, token_windows
from ._perplexity import PerplexityResult, result

COMPARED = ("the divergence", "the loss", "the reference's loss")


@dataclass(frozen=True)
class DivergenceResult:
    """How far a model is from a reference, token by token.

    Attributes:
        mean: mean over tokens of the Kullback-Leibler divergence KL(reference || model), in nats.
        median: half of the tokens have less.
        p99: 99 of a hundred tokens have less.
        maximum: the most of any token.
        standard_error: of ``mean``, from the spread between windows; NaN for a single one.
        same_top1: share of the tokens, 0 to 1, that both foretell with the same best guess.
        loss_change: mean loss of the model less that of the reference, in nats a token.
        loss_change_standard_error: of ``loss_change``; small beside the two losses' own, since windows are paired.
        tokens: tokens that were compared.
        windows: windows that they stood in.
        model: perplexity of the model on the way.
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
    """Kullback-Leibler divergence of a model's predictions from a reference's, with the perplexity of both.

    Both see the same windows, end to end; the predictions after every token but the last of a window are compared.
    Logits are held for one batch, widened to float32 a few tokens at a time, and summed in float64. A divergence that
    rounding made negative counts as zero.

    Args:
        model: the model in question, from transformers or any module that gives ``.logits`` for ``input_ids``.
        reference: the model it is held against, usually the one that was quantized; may be on another device.
        tokens: windows, or whatever :func:`quantrature.text.token_windows` takes.
        seqlen: tokens in a window; see there for the default.
        tokenizer: for text.
        max_tokens: use no more of the text than its first tokens.
        batch_size: windows in one forward pass.
        bos: where the beginning-of-sequence token goes, see there.
        text_column: field of the rows that has the text, see there.
        progress: show a bar; ``None`` if stderr is a terminal.

    Raises:
        InvalidArgumentError: as :func:`perplexity`, and for models with vocabularies of different size.
        QuantratureError: naming the window, where a divergence is not finite.
    """
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, max_tokens=max_tokens, model=model, bos=bos, text_column=text_column
    )
    count, length = windows.shape
    if length < 2:
        raise InvalidArgumentError(f"[divergence] a window needs a token to foretell another from: got seqlen={length}")
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
                _forward.demand_finite("divergence", what, values, batch, done)
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
    """COMPARED for every token but the first (3, windows, tokens - 1), and how many best guesses are the same."""
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
            f"[divergence] both models must have the same vocabulary: got model={ours}, reference={theirs}"
        )
