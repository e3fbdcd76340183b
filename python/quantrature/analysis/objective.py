"""Objectives of an analysis: the loss on the text, or the KL divergence from the original model's predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .._C import InvalidArgumentError
from ..models.finiteness import check_loss
from ..models.gradients import Share, next_token_nll
from ..models.ranks import add_over_ranks
from ..models.running import logits
from ..text import text_config

OBJECTIVES = {
    "nll": "mean negative log-likelihood of the calibration text: the loss of the papers",
    "kl": "mean Kullback-Leibler divergence of the quantized model's predictions from those of the original",
}
"""Values of the argument ``objective``, each with a one-line description."""


class Objective(Protocol):
    """Function that returns the sum of the objective over the tokens of a batch; F is the mean over all tokens."""

    def __call__(self, model: torch.nn.Module, tokens: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Return the sum over a batch, float32, in nats.

        Args:
            model: the model.
            tokens: token ids of the batch, (windows, tokens).
            samples: indices of these windows among all calibration samples.
        """


class Loss:
    """Negative log-likelihood of the tokens."""

    def __call__(self, model: torch.nn.Module, tokens: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Return the sum over all tokens except the first of each window."""
        return next_token_nll(model, tokens)


class Divergence:
    """KL(original || quantized) of the predictions after all tokens except the last of each window.

    The inputs of the output embedding in the original model are kept on the CPU. They need less memory than logits, and
    the original logits can be computed from them, because an analysis does not change the output embedding. If the
    model computes its logits from the output embedding in an unknown way, the logits are kept.

    Args:
        model: model with its original weights.
        windows: token ids of the calibration text, (samples, seqlen). With ``torch.distributed``, each process keeps
            the predictions of its own samples.
        batch_size: windows per forward pass.
    """

    def __init__(self, model: torch.nn.Module, windows: torch.Tensor, batch_size: int) -> None:
        typed: Any = model
        self._head = typed.get_output_embeddings()
        self._kept: dict[int, torch.Tensor] = {}
        self._after: Callable[[torch.Tensor], torch.Tensor] | None = None
        known = _known_endings(model) if self._head is not None else []
        read: list[torch.Tensor] = []
        watch = None if self._head is None else self._head.register_forward_pre_hook(lambda _, x: read.append(x[0]))
        try:
            with torch.no_grad():
                for tokens, samples in Share(windows).batches(batch_size):
                    read.clear()
                    predicted = logits(model, tokens)
                    if not self._kept:
                        self._after = _ending(self._head, read, predicted, known)
                    kept = predicted if self._after is None else read[0]
                    self._kept |= {s: row.cpu() for s, row in zip(samples, kept, strict=True)}
        finally:
            if watch is not None:
                watch.remove()

    def __call__(self, model: torch.nn.Module, tokens: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Return the sum over all tokens except the last of each window."""
        with torch.no_grad():
            reference = torch.stack([self._kept[sample] for sample in samples])[:, :-1]
            if self._after is not None:
                reference = self._after(self._head(reference.to(self._head.weight.device)))
        predicted = logits(model, tokens)[:, :-1].float().log_softmax(-1)
        expected = reference.to(predicted.device).float().log_softmax(-1)
        return torch.nn.functional.kl_div(predicted, expected, reduction="sum", log_target=True)


def _known_endings(model: torch.nn.Module) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return functions that compute logits from the result of the output embedding, as models of transformers do."""
    config = text_config(getattr(model, "config", None))
    endings: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: x]
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        endings.append(functools.partial(_capped, cap))
    for name in ("logit_scale", "logits_scaling"):
        scale = getattr(config, name, None)
        if scale:
            endings += [functools.partial(torch.mul, other=scale), functools.partial(torch.div, other=scale)]
    return endings


def _capped(cap: float, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


def _ending(
    head: Any,
    read: Sequence[torch.Tensor],
    predicted: torch.Tensor,
    known: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function that gives the logits of the first batch, bit for bit; ``None`` if none does."""
    if len(read) != 1 or read[0].shape[:2] != predicted.shape[:2]:
        return None
    output = head(read[0])
    return next((ending for ending in known if torch.equal(ending(output), predicted)), None)


def mean_over(
    objective: Objective, model: torch.nn.Module, windows: torch.Tensor, batch_size: int, t: float = 0.0
) -> float:
    """Return F, the mean of an objective over the tokens of all calibration windows, in nats per token.

    Args:
        objective: the objective.
        model: the model, with the weights at node ``t`` of the path.
        windows: token ids, (samples, seqlen); divided among the processes of ``torch.distributed``.
        batch_size: windows per forward pass.
        t: the node, for messages.

    Raises:
        QuantratureError: if the loss is not finite; the message names module, node and sample.
    """
    total = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for tokens, samples in Share(windows).batches(batch_size):
            value = float(objective(model, tokens, samples))
            check_loss(value, model, tokens, t, samples)
            total += value
    add_over_ranks([total])
    return float(total) / windows[:, 1:].numel()


def at_start(name: str, model: torch.nn.Module, windows: torch.Tensor, batch_size: int) -> tuple[Objective, float]:
    """Return the objective of a name, for a model with its original weights, and F at these weights."""
    if name == "kl":
        return Divergence(model, windows, batch_size), 0.0
    return Loss(), mean_over(Loss(), model, windows, batch_size)


def check_objective(name: str, caller: str) -> None:
    """Check the name of an objective.

    Raises:
        InvalidArgumentError: for an unknown name; the message begins with ``caller``.
    """
    if name not in OBJECTIVES:
        raise InvalidArgumentError(f"[{caller}] objective must be one of {', '.join(OBJECTIVES)}: got {name!r}")
