"""Text for calibration and evaluation, as windows of token ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._C import InvalidArgumentError, QuantratureError
from .ops._arrays import dtype_name, is_torch

_log = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048
BOS = ("auto", "none", "text", "window")
TEXT_FIELDS = ("text", "content")
"""Fields of a row that may hold a text. The first one that the row has is used."""
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
"""Fields of a row that may hold a conversation: messages with ``role`` and ``content``, or ``from`` and ``value``."""
INSTRUCTION_FIELDS = ("instruction", "input", "context", "output", "response")
"""Fields of a row that are joined by blank lines if the row has an ``instruction``."""
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names in ``from`` to the role of the chat template. Other names are used unchanged."""
CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "max_target_positions",
)
"""Names of the configuration field that holds a model's context length."""


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate on, and how windows are cut from it.

    Attributes:
        source: whatever :func:`token_windows` takes.
        tokenizer, nsamples, seqlen, seed, bos, text_column: as there.
    """

    source: Any
    tokenizer: Any = None
    nsamples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    bos: str = "auto"
    text_column: str | None = None

    def windows(self, model: Any, longest: int = DEFAULT_SEQLEN) -> torch.Tensor:
        """The windows for a model, int64 (windows, tokens).

        Raises:
            InvalidArgumentError: what :func:`token_windows` refuses.
        """
        return token_windows(
            self.source,
            self.tokenizer,
            seqlen=self.seqlen,
            nsamples=self.nsamples,
            seed=self.seed,
            model=model,
            bos=self.bos,
            text_column=self.text_column,
            longest=longest,
        )

    def settings(self, windows: torch.Tensor, model: Any) -> dict[str, Any]:
        """What a record says of its windows: how many, how long, which seed, and where BOS is."""
        return {
            "nsamples": len(windows),
            "seqlen": windows.shape[1],
            "seed": self.seed,
            "bos": bos_of(windows, self.tokenizer, model),
        }


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
    text_column: str | None = None,
    longest: int = DEFAULT_SEQLEN,
) -> torch.Tensor:
    """Cut text into windows of ``seqlen`` tokens that follow each other without overlap.

    For evaluation, use all windows; for calibration, draw ``nsamples`` of them. Tokens after the last whole window
    are dropped.

    Args:
        source: text, in one of these forms:

            - a file: ``.jsonl`` with one row per line, ``.json`` with a list of rows; any other file is one text;
            - a list of rows. A row is a text, or an object with a text in :data:`TEXT_FIELDS`, with a conversation in
              :data:`CONVERSATION_FIELDS` for the tokenizer's chat template, with an ``instruction``, or with
              ``input_ids``;
            - a dataset of such rows: ``NAME[:CONFIGURATION[:SPLIT]]`` on the Hugging Face Hub or in a folder. The
              default split is ``train`` if ``nsamples`` is given, otherwise ``test``;
            - token ids: a list, array or tensor of integers. If it has two dimensions, its rows are the windows;
            - the output of a tokenizer: its ``input_ids`` are used, without padding.

            Texts are joined by a blank line, conversations without a separator; the result is tokenized at once. Rows
            of token ids of equal length are windows. Rows of different lengths are joined without a separator.
        tokenizer: required unless ``source`` is token ids.
        seqlen: tokens per window; by default the smaller of ``longest`` and the context length of ``model``.
        nsamples: draw this many windows at random, without replacement. If there are fewer, all are used, with a
            warning in the log. For one seed, k samples are the first k of any larger number. By default all windows
            are returned in order.
        max_tokens: use only this many tokens, from the start of the text; by default all.
        seed: random seed for ``nsamples``; draws the same windows on every platform.
        model: a model or its configuration, for the default of ``seqlen`` and to check the token ids.
        longest: upper limit for the default of ``seqlen``.
        text_column: name of the field with the text or the conversation; by default the fields above are tried.
        bos: where to add the beginning-of-sequence token (BOS). ``"window"``: at the start of each window.
            ``"text"``: once, before the text. ``"none"``: nowhere. ``"auto"``, the default: ``"window"`` if the
            tokenizer adds BOS by default (:func:`own_bos`), otherwise ``"none"``; windows that are given as token ids
            stay unchanged. BOS is not added to a text or window that begins with it already.

    Returns:
        int64 tensor (windows, seqlen).

    Raises:
        InvalidArgumentError: for an invalid argument or line of a file, which the message names; for a text shorter
            than one window, with its number of tokens.
        QuantratureError: if a dataset cannot be loaded.
    """
    _check_numbers(seed=(seed, 0), nsamples=(nsamples, 1))
    length = window_length(seqlen, model, longest)
    ids = token_stream(
        source, tokenizer, max_tokens=max_tokens, bos=bos, text_column=text_column, drawn=nsamples is not None
    )
    windows = _as_given(ids, seqlen, model) if ids.ndim == 2 else _cut(ids, length, window_prefix(tokenizer, bos))
    check_vocabulary(windows, model)
    if nsamples is None:
        return windows
    if nsamples > len(windows):
        _log.warning("the text has only %d windows of %d tokens; all are used", len(windows), windows.shape[1])
    return windows[_draw(len(windows), nsamples, seed)]


def token_stream(
    source: Any,
    tokenizer: Any = None,
    *,
    max_tokens: int | None = None,
    bos: str = "auto",
    text_column: str | None = None,
    drawn: bool = False,
) -> torch.Tensor:
    """Return the token ids of a source, not yet cut into windows. See :func:`token_windows` for the arguments.

    Args:
        drawn: whether windows will be drawn at random. The default split of a dataset is then ``train``, otherwise
            ``test``.

    Returns:
        int64 tensor on the CPU. One dimension: all tokens, with BOS first if ``bos="text"``. Two dimensions: the
        windows that the source already has, as many as ``max_tokens`` allows. The BOS of each window is not
        included: it is added when the tokens are cut.
    """
    _check_numbers(max_tokens=(max_tokens, 1))
    if bos not in BOS:
        raise InvalidArgumentError(f"[token_windows] bos must be one of {', '.join(BOS)}: got bos={bos}")
    if isinstance(source, Iterable) and not isinstance(source, str | os.PathLike | Sequence | Mapping | np.ndarray):
        source = source if is_torch(source) else list(source)
    ids = _ids_given(source)
    text = None if ids is not None else _text(source, tokenizer, drawn, text_column)
    if isinstance(text, torch.Tensor):
        ids = text
    if ids is None:
        if tokenizer is None:
            raise InvalidArgumentError(
                "[token_windows] tokenizer must be given if the source is text: got tokenizer=None"
            )
        # verbose=False: that the text is longer than the model's context is no surprise here.
        encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if ids.ndim == 1:
        ids = ids[:max_tokens]
        return _begun(ids, _asked_for(tokenizer, bos)) if bos == "text" else ids
    if bos not in ("auto", "none"):
        raise InvalidArgumentError(f"[token_windows] bos must be auto or none if the source is windows: got bos={bos}")
    return ids if max_tokens is None else ids[: max_tokens // max(1, ids.shape[1])]


def own_bos(tokenizer: Any) -> list[int]:
    """Return the token ids that a tokenizer adds before a text by default: often none, mostly BOS, rarely several.

    To find them, a short text is encoded with and without special tokens. This works wherever the tokenizer defines
    them (post-processor, ``add_bos_token``, its own code). Tokens added after a text, such as EOS, are not returned.
    """
    for text in ("a", "1", "the"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return [int(token) for token in whole[:start]]
    return []


def window_prefix(tokenizer: Any, bos: str) -> list[int]:
    """Return the token ids that each window begins with for a setting of ``bos``; none without a tokenizer."""
    if bos == "window":
        return _asked_for(tokenizer, bos)
    return own_bos(tokenizer) if bos == "auto" and tokenizer is not None else []


def bos_of(tokens: torch.Tensor, tokenizer: Any = None, model: Any = None) -> str:
    """Find where windows of token ids have BOS: ``window``, ``text`` or ``none``, as in :func:`token_windows`.

    Args:
        tokens: integer tensor (windows, seqlen), or (tokens,).
        tokenizer: defines which token is BOS.
        model: a model or its configuration, which also defines BOS.

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
    """Return the number of tokens per window: ``seqlen``, or the default for a model (``None`` for no model).

    Raises:
        InvalidArgumentError: if ``seqlen`` exceeds the context length of the model.
    """
    _check_numbers(seqlen=(seqlen, 1))
    limit = None if model is None else context_length(model)
    if seqlen is not None and limit is not None and seqlen > limit:
        raise InvalidArgumentError(
            f"[token_windows] seqlen must be at most the model's context length, {limit}: got seqlen={seqlen}"
        )
    return min(longest, limit or longest) if seqlen is None else seqlen


def context_length(model: Any) -> int | None:
    """Return the context length, in tokens, of a model or configuration; ``None`` if it has no limit."""
    config = text_config(model)
    for name in CONTEXT_LENGTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def text_config(model: Any) -> Any:
    """Return the configuration of a model; for a multimodal model, that of its language model."""
    config = getattr(model, "config", model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_vocabulary(ids: torch.Tensor, model: Any) -> None:
    """Check that all token ids are in the vocabulary of the model, if one is given.

    Raises:
        InvalidArgumentError: for an id that is negative or not below ``vocab_size``.
    """
    low, high = int(ids.min()), int(ids.max())
    size = None if model is None else getattr(text_config(model), "vocab_size", None)
    if low < 0 or (size is not None and high >= size):
        raise InvalidArgumentError(
            f"[token_windows] token ids must be at least 0 and below the model's vocab_size, {size}: "
            f"got {low if low < 0 else high}; was the text tokenized for another model?"
        )


def _check_numbers(**numbers: tuple[int | None, int]) -> None:
    """Check that each number is ``None`` or an integer of at least its minimum."""
    for name, (value, least) in numbers.items():
        if value is not None and (not isinstance(value, int) or value < least):
            raise InvalidArgumentError(
                f"[token_windows] {name} must be an integer of at least {least}: got {name}={value}"
            )


def _ids_given(source: Any) -> torch.Tensor | None:
    """Return the token ids of a source as a tensor; ``None`` if the source is text."""
    if isinstance(source, str | os.PathLike):
        return None
    if isinstance(source, Mapping) and "input_ids" in source:
        return _unpadded(source)
    rows = list(source) if isinstance(source, Sequence) and not is_torch(source) else []
    if isinstance(source, Sequence) and (not rows or isinstance(rows[0], str | Mapping)):
        return None
    if rows and all(_is_row_of_ids(row) for row in rows):
        return _joined([each for row in rows for each in _as_rows(torch.as_tensor(row))])
    if not is_torch(source):
        try:
            array = np.asarray(source)
        except ValueError:
            array = np.asarray([None])
        if array.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"[token_windows] source must be a file, a dataset, texts or token ids: got {type(source).__name__}"
            )
        source = torch.from_numpy(array.astype(np.int64))
    return _as_ids(source)


def _as_ids(ids: torch.Tensor) -> torch.Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidArgumentError(f"[token_windows] token ids must be integers: got dtype={dtype_name(ids)}")
    if ids.ndim not in (1, 2):
        raise InvalidArgumentError(f"[token_windows] token ids must have 1 or 2 dimensions: got {ids.ndim}")
    return ids.to("cpu", torch.int64)


def _is_row_of_ids(row: Any) -> bool:
    """Whether ``row`` holds token ids: a list of integers, or an array or tensor (two dimensions: several rows)."""
    if is_torch(row) or isinstance(row, np.ndarray):
        return row.ndim in (1, 2)
    return isinstance(row, Sequence) and not isinstance(row, str) and all(isinstance(token, int) for token in row)


def _as_rows(ids: torch.Tensor) -> list[torch.Tensor]:
    return list(ids) if ids.ndim == 2 else [ids]


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Combine the token ids of several texts: as windows if all have the same length, else joined to one row."""
    flat = [_as_ids(row.flatten() if row.numel() else row.flatten().long()) for row in rows]
    return torch.stack(flat) if len({len(row) for row in flat}) == 1 else torch.cat(flat)


def _unpadded(encoded: Mapping[str, Any]) -> torch.Tensor:
    """Return the ``input_ids`` of a tokenizer's output, without tokens whose attention mask is 0."""
    ids, mask = encoded["input_ids"], encoded.get("attention_mask")
    found = _ids_given(ids)
    if found is None:
        raise InvalidArgumentError(f"[token_windows] input_ids must be token ids: got {type(ids).__name__}")
    if mask is None:
        return found
    kept = _ids_given(mask)
    if kept is None or kept.shape != found.shape:
        raise InvalidArgumentError("[token_windows] attention_mask must have the shape of input_ids")
    return found if bool(kept.all()) else found[kept.bool()]


def _as_given(windows: torch.Tensor, seqlen: int | None, model: Any) -> torch.Tensor:
    """Check and return windows that were given as such."""
    count, length = windows.shape
    if seqlen not in (None, length):
        raise InvalidArgumentError(
            f"[token_windows] seqlen must be {length}, the length of the given windows: got seqlen={seqlen}"
        )
    if count == 0 or length == 0:
        raise InvalidArgumentError(f"[token_windows] there must be at least one window: got {count} of {length} tokens")
    window_length(length, model)
    return windows


def _cut(ids: torch.Tensor, seqlen: int, prefix: list[int]) -> torch.Tensor:
    """Cut whole windows of ``seqlen`` tokens from the start of the text; each begins with the tokens of ``prefix``."""
    windows = []
    at = 0
    while True:
        begun = _begun(ids[at : at + seqlen], prefix)[:seqlen]
        if len(begun) < seqlen or seqlen <= len(prefix):
            break
        windows.append(begun)
        at += seqlen - (0 if _begins(ids[at:], prefix) else len(prefix))
    if seqlen <= len(prefix):
        raise InvalidArgumentError(
            f"[token_windows] seqlen must be above {len(prefix)}, the number of BOS tokens in each window: "
            f"got seqlen={seqlen}"
        )
    if not windows:
        raise InvalidArgumentError(
            f"[token_windows] the text is shorter than one window: it has {len(ids)} tokens, but seqlen={seqlen} "
            f"needs {max(1, seqlen - len(prefix))}; give a longer text or a smaller seqlen"
        )
    return torch.stack(windows)


def _begins(ids: torch.Tensor, prefix: list[int]) -> bool:
    return ids[: len(prefix)].tolist() == prefix


def _begun(ids: torch.Tensor, prefix: list[int]) -> torch.Tensor:
    """Put the tokens of ``prefix`` first, unless the tokens begin with them already."""
    return ids if _begins(ids, prefix) else torch.cat([torch.tensor(prefix, dtype=torch.int64), ids])


def _asked_for(tokenizer: Any, bos: str) -> list[int]:
    """Return the tokens that the tokenizer adds before a text by default, or else its BOS."""
    found = [] if tokenizer is None else own_bos(tokenizer)
    token = getattr(tokenizer, "bos_token_id", None)
    if not found and token is None:
        raise InvalidArgumentError(
            f"[token_windows] bos must be auto or none, because the tokenizer has no BOS token: got bos={bos}"
        )
    return found or [int(token)]  # type: ignore[arg-type]


def _draw(count: int, nsamples: int, seed: int) -> torch.Tensor:
    """Return the indices of the windows that a seed draws; the same on every platform and version."""
    keys = np.random.PCG64(seed).random_raw(count)
    return torch.from_numpy(np.argsort(keys, kind="stable")[:nsamples])


def _text(source: Any, tokenizer: Any, drawn: bool, column: str | None) -> str | torch.Tensor:
    """Return the whole text of a source, or the token ids if its rows hold token ids."""
    if not isinstance(source, str | os.PathLike):
        return _join(((f"item {i}", row) for i, row in enumerate(source)), "the list", tokenizer, column)
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path, tokenizer, column)
    if not path.is_dir() and (isinstance(source, Path) or path.suffix.lower() in (".txt", ".jsonl", ".json")):
        raise InvalidArgumentError(f"[token_windows] source must be an existing file: there is no file {source}")
    return _join(_rows_of_dataset(str(source), drawn), str(source), tokenizer, column)


def _read(path: Path, tokenizer: Any, column: str | None) -> str | torch.Tensor:
    try:
        text = path.read_text(encoding="utf-8-sig")  # of which a byte order mark is no part
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"[token_windows] {path} is not UTF-8 text: byte {error.start}") from None
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InvalidArgumentError(
                f"[token_windows] {path} is not JSON: {error}; if each line is an object, rename the file to .jsonl"
            ) from None
        if not isinstance(content, list):
            raise InvalidArgumentError(
                f"[token_windows] {path} must contain a list of texts or rows: got {type(content).__name__}"
            )
        return _join(((f"item {i}", row) for i, row in enumerate(content)), str(path), tokenizer, column)
    if path.suffix.lower() != ".jsonl":
        return text
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                raise InvalidArgumentError(f"[token_windows] {path}, line {number} is not JSON: {error}") from None
    return _join(rows, str(path), tokenizer, column)


def _join(rows: Iterable[tuple[str, Any]], where: str, tokenizer: Any, column: str | None) -> str | torch.Tensor:
    """Join texts by blank lines, conversations (in the tokenizer's chat format) directly, or collect token ids."""
    found: dict[str, list[Any]] = {"texts": [], "conversations": [], "token ids": []}
    for place, row in rows:
        kind, value = _of_row(row, f"{where}, {place}", column)
        if kind == "token ids":
            found[kind].extend(_as_rows(value))  # a data loader gives several texts at a time
        else:
            found[kind].append(
                _conversation(value, f"{where}, {place}", tokenizer) if kind == "conversations" else value
            )
        kinds = [kind for kind, values in found.items() if values]
        if len(kinds) > 1:
            raise InvalidArgumentError(f"[token_windows] {where}, {place}: {' and '.join(kinds)} must not be mixed")
    if found["token ids"]:
        return _joined(found["token ids"])
    return "".join(found["conversations"]) or "\n\n".join(found["texts"])


def _of_row(row: Any, where: str, column: str | None) -> tuple[str, Any]:
    """Return the kind of a row (``texts``, ``conversations`` or ``token ids``) and its content."""
    row = {column or "text": row} if isinstance(row, str) else row
    if isinstance(row, Mapping) and column is None:
        for name in TEXT_FIELDS:
            if isinstance(row.get(name), str):
                return "texts", row[name]
        for name in CONVERSATION_FIELDS:
            if name in row:
                return "conversations", row[name]
        if isinstance(row.get("instruction"), str):
            parts = [row.get(name) for name in INSTRUCTION_FIELDS]
            return "texts", "\n\n".join(part for part in parts if isinstance(part, str) and part)
        if "input_ids" in row:
            return "token ids", _unpadded(row)
    elif isinstance(row, Mapping) and isinstance(row.get(column), str):
        return "texts", row[column]
    elif isinstance(row, Mapping) and isinstance(row.get(column), Sequence):
        value = row[column]
        return ("token ids", _unpadded({"input_ids": value})) if _is_row_of_ids(value) else ("conversations", value)
    had = f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
    wanted = f"a text in the field {column}" if column else "a text or messages"
    hint = "; set text_column to the field with the text" if isinstance(row, Mapping) else ""
    raise InvalidArgumentError(f"[token_windows] {where} must have {wanted}: got {had}{hint}")


def _conversation(messages: Any, where: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidArgumentError(
            f"[token_windows] {where} has messages, but the tokenizer has no chat template; set tokenizer.chat_template"
        )
    if isinstance(messages, Sequence) and messages and all(isinstance(m, Mapping) and "from" in m for m in messages):
        messages = [{"role": SPEAKERS.get(m["from"], m["from"]), "content": m.get("value", "")} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of its own
        raise InvalidArgumentError(f"[token_windows] {where} does not fit the chat template: {error}") from error


def _rows_of_dataset(source: str, drawn: bool) -> Iterable[tuple[str, Any]]:
    """Yield the rows of a dataset, each with its position for messages."""
    try:
        import datasets
    except ImportError:
        raise InvalidArgumentError(
            f"[token_windows] there is no file {source}; to load it as a dataset, pip install datasets"
        ) from None
    name, configuration, split = ([*source.split(":"), None, None])[:3]
    split = split or ("train" if drawn else "test")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # whatever the package, its file formats or the network may raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise QuantratureError(f"[token_windows] cannot load {source} as a dataset, split {split}: {text}") from error
    return ((f"row {i}", row) for i, row in enumerate(rows))
