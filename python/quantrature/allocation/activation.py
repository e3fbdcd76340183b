"""The activation sensitivity that SensiBoost uses (arXiv 2503.06518, equation 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .._C import InvalidArgumentError
from ..methods import check_method, quantize_matrix
from ..models import LinearWeight, find_linears
from ..models.running import logits, not_training
from ..plan import PlanEntry
from ..plan.fusion import fusion_groups
from ..progress import progress as progress_bar
from ..text import token_windows


@dataclass
class _Part:
    """Matrices that are quantized together, and the module whose outputs are compared."""

    module: torch.nn.Module
    matrices: list[LinearWeight]
    images: list[torch.Tensor] = field(default_factory=list)
    squares: float = 0.0
    elements: int = 0


def activation_sensitivity(
    model: torch.nn.Module,
    tokens: Any,
    *,
    bits: int = 4,
    group_size: int = 64,
    method: str = "hqq",
    tokenizer: Any = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    text_column: str | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> dict[str, float]:
    """Measure the mean squared change of outputs when only the matrices of one part of a block are quantized.

    Parts are as in the authors' code: q, k and v together, by the output of the attention; gate and up together, by the
    output of the MLP; o and down each by their own output. Inputs are those of the original model. The output
    projection gets the score of q, k and v, unless it has the shape of v; with grouped-query attention it has not.
    Other matrices are measured by their own output.

    Args:
        model: causal language model from transformers; it is unchanged afterwards. The dequantized weights are held in
            memory besides it, in its dtype.
        tokens, tokenizer, nsamples, seqlen, seed, bos, text_column: calibration text, as in
            :func:`quantrature.text.token_windows`.
        bits, group_size, method: how to quantize for the measurement; the defaults are the authors'.
        batch_size: windows per forward pass, at least 1.
        progress: whether to show a progress bar; by default on a terminal. Elsewhere, long work prints a line every 30
            seconds.

    Returns:
        Matrix name to mean squared error. Matrices of one part have the same value.

    Raises:
        InvalidArgumentError: for an invalid argument, or a matrix that no text reaches; the message names it.
    """
    check_method(method)
    linears = find_linears(model, experts=False)
    windows = token_windows(
        tokens, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, bos=bos, text_column=text_column, model=model
    )
    if batch_size < 1:
        raise InvalidArgumentError(f"[activation_sensitivity] batch_size must be at least 1: got {batch_size}")
    entry = PlanEntry(bits, group_size, method=method)
    parts, followers = _parts(model, list(linears))
    with not_training(model), progress_bar("activation sensitivity", len(parts) + len(windows), progress) as bar:
        for part in parts:
            for linear in part.matrices:
                stored = quantize_matrix(linear.name, linear.weight.cpu().contiguous(), entry)
                image = stored.dequantize("float32").to(linear.parameter)
                part.images.append(image.mT.contiguous() if linear.transposed else image)
            bar.advance()
        with torch.no_grad(), _watching(parts):
            for first in range(0, len(windows), batch_size):
                batch = windows[first : first + batch_size]
                logits(model, batch)
                bar.advance(len(batch))
    scores = {}
    for part in parts:
        for linear in part.matrices:
            if not part.elements:
                raise InvalidArgumentError(f"[activation_sensitivity] no calibration text reaches {linear.name}")
            scores[linear.name] = part.squares / part.elements
    return scores | {name: scores[leader] for name, leader in followers.items()}


def _parts(model: torch.nn.Module, linears: Sequence[LinearWeight]) -> tuple[list[_Part], dict[str, str]]:
    """Return the parts of all blocks, and for matrices without a part the matrix whose score they get."""
    by_name = {linear.name: linear for linear in linears}
    parts, followers = [], {}
    for members in fusion_groups(list(by_name)):
        group = [linears[i] for i in members]
        parent = group[0].name.rpartition(".")[0]
        if len(group) > 1:
            parts.append(_Part(model.get_submodule(parent), group))
            continue
        (linear,) = group
        value = by_name.get(f"{parent}.v_proj")
        shape = (linear.out_features, linear.in_features)
        if linear.name == f"{parent}.o_proj" and value and shape != (value.out_features, value.in_features):
            followers[linear.name] = value.name
        else:
            parts.append(_Part(linear.module, group))
    return parts, followers


@contextmanager
def _watching(parts: Sequence[_Part]) -> Iterator[None]:
    """Inside the ``with`` block, repeat each forward pass of a part's module with quantized weights, and compare."""
    repeating = False

    def compare(part: _Part) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
            nonlocal repeating
            if repeating:
                return
            originals = [linear.parameter.detach().clone() for linear in part.matrices]
            repeating = True
            try:
                for linear, image in zip(part.matrices, part.images, strict=True):
                    linear.parameter.data.copy_(image)
                again = module(*inputs, **named)
            finally:
                repeating = False
                for linear, original in zip(part.matrices, originals, strict=True):
                    linear.parameter.data.copy_(original)
            before, after = (x[0] if isinstance(x, tuple) else x for x in (output, again))
            part.squares += float((before - after).float().square().sum(dtype=torch.float64))
            part.elements += before.numel()

        return hook

    handles = [part.module.register_forward_hook(compare(part), with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
