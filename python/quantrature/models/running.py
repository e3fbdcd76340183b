"""Run a model on windows of token ids, batch by batch, and return its logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .._C import InvalidArgumentError
from ..text import check_vocabulary, text_config
from .loading import quiet

CHUNK = 1 << 24
"""Number of logits to convert to float32 at a time."""


class Span(NamedTuple):
    """A window [start, stop) of a token stream; tokens from index ``scored`` on are scored."""

    start: int
    stop: int
    scored: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tokens in the window, and how many of them are not scored."""
        return self.stop - self.start, self.scored - self.start


def batches(spans: Sequence[Span], batch_size: int) -> Iterator[list[Span]]:
    """Yield batches of neighbouring spans of the same shape."""
    batch: list[Span] = []
    for span in spans:
        if batch and (len(batch) == batch_size or span.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def check(op: str, model: Any, ids: torch.Tensor, batch_size: int) -> None:
    """Check model, token ids and batch size before an evaluation starts."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidArgumentError(f"[{op}] batch_size must be a positive integer: got batch_size={batch_size}")
    # Causal language models can generate text. So can encoder-decoders, which are not supported here.
    if hasattr(model, "can_generate") and (not model.can_generate() or model.config.is_encoder_decoder):
        raise InvalidArgumentError(f"[{op}] model must be a causal language model: got {type(model).__name__}")
    check_vocabulary(ids, model)


@contextmanager
def not_training(*models: torch.nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, disable dropout and advice of transformers; restore the modules' modes afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with quiet():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Like :func:`not_training`, and without gradients."""
    with torch.no_grad(), not_training(*models):
        yield


def outputs(model: Any, ids: torch.Tensor) -> Any:
    """Run the model on windows of token ids.

    In an encoder-decoder, the encoder gets the window. The decoder gets the same window, shifted by one after the
    decoder start token, as in training on labels.
    """
    device = getattr(model, "device", None) or next(model.parameters()).device
    if device.type != "meta":  # if weights are offloaded to disk, Accelerate moves the ids
        ids = ids.to(device)
    takes = inspect.signature(model.forward).parameters
    wanted = [n for n, p in takes.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    hands_on = any(p.kind == p.VAR_KEYWORD for p in takes.values())
    known = "input_ids" in takes or (hands_on and getattr(model, "main_input_name", "input_ids") == "input_ids")
    if isinstance(model, PreTrainedModel) and (set(wanted) - {"input_ids"} or not known):
        what = next((name for name in wanted if name != "input_ids"), model.main_input_name)
        raise InvalidArgumentError(f"[text] model must run on text alone: {type(model).__name__} also needs {what}")
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if _has_decoder(model):
        first = torch.full_like(ids[:, :1], _decoder_start(model))
        extra["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
    return model(input_ids=ids, **extra)


def _has_decoder(model: Any) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and (
        "decoder_input_ids" in inspect.signature(model.forward).parameters
    )


def _decoder_start(model: Any) -> int:
    """Return the decoder start token of an encoder-decoder."""
    for config in (model.config, text_config(model)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    raise InvalidArgumentError(
        f"[text] the configuration of {type(model).__name__} must have a decoder_start_token_id: it has none"
    )


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after each token, (windows, tokens, vocabulary), in the model's own dtype.

    For an encoder-decoder, the logits after the last token of a window have no meaning.

    Raises:
        InvalidArgumentError: for a model without an output embedding, or that does not run on text alone.
    """
    out = outputs(model, ids)
    if not hasattr(out, "logits"):
        raise InvalidArgumentError(
            f"[text] a loss needs a model with an output embedding: got {type(model).__name__}, which has none"
        )
    predicted: torch.Tensor = out.logits
    return predicted.roll(-1, dims=1) if _has_decoder(model) else predicted


def chunks(windows: int, tokens: int, vocabulary: int) -> Iterator[tuple[int, slice]]:
    """Yield a window and a slice of its tokens, so that at most CHUNK logits are converted at a time."""
    step = max(1, CHUNK // vocabulary)
    for window in range(windows):
        for start in range(0, tokens, step):
            yield window, slice(start, min(start + step, tokens))


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the mean over all tokens and its standard error, with the windows as independent samples.

    The mean is a ratio of two sums, because windows may have different numbers of tokens. Its standard error is
    computed by linearization (the delta method): sqrt(n / (n - 1) * sum of (s - mean * c)^2) / sum of c.

    Args:
        sums: sum over the tokens of each window, s.
        counts: number of tokens of each window, c.

    Returns:
        The mean and its standard error; the error is NaN for a single window.
    """
    n, total = len(sums), sum(counts)
    mean = math.fsum(sums) / total
    if n < 2:
        return mean, math.nan
    spread = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * n / (n - 1)) / total
