"""Text for calibration and evaluation, as windows of token ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._arrays import dtype_name, is_torch
from ._C import InvalidArgumentError, QuantratureError

_log = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048
BOS = ("auto", "none", "text", "window")
CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "max_target_positions",
)
"""What configurations call the longest sequence that a model was built for."""


def token_windows(
    source: Any,
    tokenizer: Any = None,
    *,
    seqlen: int | None = None,
    nsamples: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    model: Any = None,
    bos: str = "auto",
    longest: int = DEFAULT_SEQLEN,
) -> torch.Tensor:
    """Cut text into windows of ``seqlen`` tokens, end to end and without overlap.

    For evaluation, take the windows as they come; for calibration, ask for ``nsamples`` of them. What is left after
    the last whole window is dropped.

    Args:
        source: a file: ``.jsonl`` with an object on each line, whose field is ``text``, or ``messages`` for the
            tokenizer's chat template; any other file is read as one text. Or a list of texts, or of rows like those
            of a ``.jsonl`` file. Or token ids: a list, array or tensor of integers, one-dimensional, or
            two-dimensional where they are windows already. Or a data set with the same fields:
            ``NAME[:CONFIGURATION[:SPLIT]]`` on the Hugging Face Hub or in a folder; the split is ``train`` where
            samples are drawn, otherwise ``test``. Texts are joined by a blank line, conversations by nothing, and
            then tokenized in one go.
        tokenizer: needed for everything but token ids.
        seqlen: tokens in a window; the smaller of ``longest`` and what ``model`` was built for unless given.
        nsamples: draw this many windows, without replacement; all of them where there are fewer, with a note in the
            log. The first k of n samples are the k samples of the same seed.
        max_tokens: use no more of the text than its first tokens.
        seed: for ``nsamples``; the same windows on every platform.
        model: a model or its configuration, for the default of ``seqlen`` and to check the token ids.
        longest: for the default of ``seqlen``.
        bos: where the beginning-of-sequence token (BOS) goes. ``"window"``: it is the first token of each window.
            ``"text"``: it comes once, before the text. ``"none"``: none is added. ``"auto"``, the default, is
            ``"window"`` if the tokenizer adds BOS by itself (:func:`own_bos`), otherwise ``"none"``; windows that are
            given as token ids stay as they are. A text or window that begins with BOS already gets no second one.

    Returns:
        int64 tensor (windows, seqlen).

    Raises:
        InvalidArgumentError: naming what is wrong with an argument or a line of a file; for a text shorter than one
            window, with the number of tokens it has.
        QuantratureError: when a data set cannot be loaded.
    """
    _check_numbers(seed=(seed, 0), nsamples=(nsamples, 1))
    length = window_length(seqlen, model, longest)
    ids = token_stream(source, tokenizer, max_tokens=max_tokens, bos=bos, drawn=nsamples is not None)
    windows = _as_given(ids, seqlen, model) if ids.ndim == 2 else _cut(ids, length, window_prefix(tokenizer, bos))
    check_vocabulary(windows, model)
    if nsamples is None:
        return windows
    if nsamples > len(windows):
        _log.warning("the text has %d windows of %d tokens; all are used", len(windows), windows.shape[1])
    return windows[_draw(len(windows), nsamples, seed)]


def token_stream(
    source: Any, tokenizer: Any = None, *, max_tokens: int | None = None, bos: str = "auto", drawn: bool = False
) -> torch.Tensor:
    """Return the token ids of a source before they are cut; arguments as of :func:`token_windows`.

    Returns:
        int64 tensor on the CPU: one row, with ``bos="text"`` begun by BOS; or the windows that the source has
        already, as many as ``max_tokens`` allows. BOS of each window is added where the row is cut.
    """
    _check_numbers(max_tokens=(max_tokens, 1))
    if bos not in BOS:
        raise InvalidArgumentError(f"[token_windows] bos must be one of {', '.join(BOS)}: got bos={bos}")
    ids = _ids_given(source)
    if ids is None:
        if tokenizer is None:
            raise InvalidArgumentError("[token_windows] text needs a tokenizer: got tokenizer=None")
        text = _text(source, tokenizer, drawn)
        # verbose=False: that the text is longer than the model's context is no surprise here.
        encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if ids.ndim == 1:
        ids = ids[:max_tokens]
        return _begun(ids, _asked_for(tokenizer, bos)) if bos == "text" else ids
    if bos not in ("auto", "none"):
        raise InvalidArgumentError(f"[token_windows] bos goes with text or one row of token ids: got bos={bos}")
    return ids if max_tokens is None else ids[: max_tokens // max(1, ids.shape[1])]


def own_bos(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text by its own rules: BOS, for some several, often none.

    A short text is encoded with and without special tokens, so that it does not matter where the rule is written
    (post-processor, ``add_bos_token``, code of the tokenizer). Tokens that it puts behind a text, such as EOS, do not
    count.
    """
    for text in ("a", "1", "the"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return [int(token) for token in whole[:start]]
    return []


def window_prefix(tokenizer: Any, bos: str) -> list[int]:
    """Return the tokens that each window begins with under a setting of ``bos``; without a tokenizer there are none."""
    if bos == "window":
        return _asked_for(tokenizer, bos)
    return own_bos(tokenizer) if bos == "auto" and tokenizer is not None else []


def bos_of(tokens: torch.Tensor, tokenizer: Any = None, model: Any = None) -> str:
    """Tell from windows of token ids where they have BOS: ``window``, ``text`` or ``none`` (:func:`token_windows`).

    Args:
        tokens: windows, or one row of token ids.
        tokenizer: says which token is BOS.
        model: so does the configuration of a model.

    Returns:
        ``window`` if every window begins with BOS, ``text`` if only some do or one row does, otherwise ``none``.
    """
    known = {getattr(text_config(model), "bos_token_id", None)}
    if tokenizer is not None:
        known |= {getattr(tokenizer, "bos_token_id", None), *own_bos(tokenizer)[:1]}
    first = tokens[:1] if tokens.ndim == 1 else tokens[:, 0]
    begins = torch.isin(first, torch.tensor([token for token in known if isinstance(token, int)], dtype=torch.int64))
    if tokens.ndim == 2 and bool(begins.all()):
        return "window"
    return "text" if bool(begins.any()) else "none"


def window_length(seqlen: int | None, model: Any, longest: int = DEFAULT_SEQLEN) -> int:
    """How many tokens a window has: ``seqlen``, or the default for a model (``None`` for any)."""
    _check_numbers(seqlen=(seqlen, 1))
    limit = None if model is None else context_length(model)
    if seqlen is not None and limit is not None and seqlen > limit:
        raise InvalidArgumentError(
            f"[token_windows] seqlen must be at most what the model was built for: got seqlen={seqlen}, model={limit}"
        )
    return min(longest, limit or longest) if seqlen is None else seqlen


def context_length(model: Any) -> int | None:
    """The longest sequence that a model, or a configuration's model, was built for; ``None`` if it has no limit."""
    config = text_config(model)
    for name in CONTEXT_LENGTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def text_config(model: Any) -> Any:
    """The configuration of a model, or of the language model in one that also reads something else."""
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_vocabulary(ids: torch.Tensor, model: Any) -> None:
    """Refuse token ids that the model, if one is given, has no embedding for."""
    low, high = int(ids.min()), int(ids.max())
    size = None if model is None else getattr(text_config(model), "vocab_size", None)
    if low < 0 or (size is not None and high >= size):
        raise InvalidArgumentError(
            f"[token_windows] token ids must be in the model's vocabulary: got {low if low < 0 else high}, "
            f"vocab_size={size}"
        )


def _check_numbers(**numbers: tuple[int | None, int]) -> None:
    """Each with the least that it may be."""
    for name, (value, least) in numbers.items():
        if value is not None and (not isinstance(value, int) or value < least):
            raise InvalidArgumentError(
                f"[token_windows] {name} must be an integer and at least {least}: got {name}={value}"
            )


def _ids_given(source: Any) -> torch.Tensor | None:
    """Token ids in whatever form; None if the source is text."""
    if isinstance(source, str | os.PathLike):
        return None
    if isinstance(source, Sequence) and (len(source) == 0 or isinstance(source[0], str | Mapping)):
        return None
    if not is_torch(source):
        try:
            array = np.asarray(source)
        except ValueError:
            raise InvalidArgumentError("[token_windows] windows of token ids must have equal lengths") from None
        if array.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"[token_windows] source must be a file, a data set, texts or token ids: got {type(source).__name__}"
            )
        source = torch.from_numpy(array.astype(np.int64))
    ids: torch.Tensor = source
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidArgumentError(f"[token_windows] token ids must be integers: got dtype={dtype_name(ids)}")
    if ids.ndim not in (1, 2):
        raise InvalidArgumentError(f"[token_windows] token ids must have 1 or 2 dimensions: got {ids.ndim}")
    return ids.to("cpu", torch.int64)


def _as_given(windows: torch.Tensor, seqlen: int | None, model: Any) -> torch.Tensor:
    """Windows that the source had already."""
    count, length = windows.shape
    if seqlen not in (None, length):
        raise InvalidArgumentError(f"[token_windows] the windows have {length} tokens each: got seqlen={seqlen}")
    if count == 0 or length == 0:
        raise InvalidArgumentError(f"[token_windows] there must be at least one window: got {count} of {length} tokens")
    window_length(length, model)
    return windows


def _cut(ids: torch.Tensor, seqlen: int, prefix: list[int]) -> torch.Tensor:
    """Whole windows from the start of the text, each begun by the tokens of prefix."""
    windows = []
    at = 0
    while True:
        begun = _begun(ids[at : at + seqlen], prefix)[:seqlen]
        if len(begun) < seqlen or seqlen <= len(prefix):
            break
        windows.append(begun)
        at += seqlen - (0 if _begins(ids[at:], prefix) else len(prefix))
    if not windows:
        raise InvalidArgumentError(
            f"[token_windows] the text is shorter than one window: it has {len(ids)} tokens, "
            f"{max(1, seqlen - len(prefix))} are needed for seqlen={seqlen}; give a longer text or a smaller seqlen "
            "(--seqlen)"
        )
    return torch.stack(windows)


def _begins(ids: torch.Tensor, prefix: list[int]) -> bool:
    return ids[: len(prefix)].tolist() == prefix


def _begun(ids: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    """The tokens, begun by those of prefix if they are not already."""
    return ids if _begins(ids, prefix) else torch.cat([torch.tensor(prefix, dtype=torch.int64), ids])


def _asked_for(tokenizer: Any, bos: str) -> list[int]:
    """What the tokenizer puts before a text by itself, or else its BOS."""
    found = [] if tokenizer is None else own_bos(tokenizer)
    token = getattr(tokenizer, "bos_token_id", None)
    if not found and token is None:
        raise InvalidArgumentError(f"[token_windows] bos={bos} needs a tokenizer with such a token")
    return found or [int(token)]  # type: ignore[arg-type]


def _draw(count: int, nsamples: int, seed: int) -> torch.Tensor:
    """Which windows a seed draws: those with the smallest random numbers, of a stream that never changes."""
    keys = np.random.PCG64(seed).random_raw(count)
    return torch.from_numpy(np.argsort(keys, kind="stable")[:nsamples])


def _text(source: Any, tokenizer: Any, drawn: bool) -> str:
    """The whole text of a source that is not token ids."""
    if not isinstance(source, str | os.PathLike):
        return _join(((f"item {i}", row) for i, row in enumerate(source)), "the list", tokenizer)
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path, tokenizer)
    if not path.is_dir() and (isinstance(source, Path) or path.suffix in (".txt", ".jsonl")):
        raise InvalidArgumentError(f"[token_windows] there is no such file: {source}")
    return _join(_rows_of_dataset(str(source), drawn), str(source), tokenizer)


def _read(path: Path, tokenizer: Any) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"[token_windows] {path} is not UTF-8 text: byte {error.start}") from None
    if path.suffix != ".jsonl":
        return text
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise InvalidArgumentError(f"[token_windows] {path}, line {number} is not JSON: {error}") from None
    return _join(rows, str(path), tokenizer)


def _join(rows: Iterable[tuple[str, Any]], where: str, tokenizer: Any) -> str:
    """Texts joined by blank lines, or conversations in the tokenizer's format, one after the other."""
    texts: list[str] = []
    conversations = 0
    for place, row in rows:
        row = {"text": row} if isinstance(row, str) else row
        if isinstance(row, Mapping) and isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row, Mapping) and "messages" in row:
            texts.append(_conversation(row["messages"], f"{where}, {place}", tokenizer))
            conversations += 1
        else:
            had = f"the fields {', '.join(row)}" if isinstance(row, Mapping) else type(row).__name__
            raise InvalidArgumentError(f"[token_windows] {where}, {place} needs a string text or messages: got {had}")
        if conversations not in (0, len(texts)):
            raise InvalidArgumentError(f"[token_windows] {where}, {place}: texts and conversations must not be mixed")
    return ("" if conversations else "\n\n").join(texts)


def _conversation(messages: Any, where: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidArgumentError(f"[token_windows] {where} has messages, but the tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of its own
        raise InvalidArgumentError(f"[token_windows] {where} does not fit the chat template: {error}") from error


def _rows_of_dataset(source: str, drawn: bool) -> Iterable[tuple[str, Any]]:
    """The rows of a data set, each with its place."""
    try:
        import datasets
    except ImportError:
        raise InvalidArgumentError(
            f"[token_windows] {source} is no file, and for a data set the package 'datasets' is missing"
        ) from None
    name, configuration, split = ([*source.split(":"), None, None])[:3]
    split = split or ("train" if drawn else "test")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # whatever the package, its file formats or the network may raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise QuantratureError(f"[token_windows] cannot load {source} as a data set, split {split}: {text}") from error
    return ((f"row {i}", row) for i, row in enumerate(rows))
