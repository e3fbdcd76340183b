"""The tokenizer of a model in the metadata of a GGUF file.

The rules by which llama.cpp splits text before merges have a name, ``tokenizer.ggml.pre``. We find it from the rules
of the tokenizer, not from the name of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._C import InvalidArgumentError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens in GGUF files."""

SPACE = "\u2581"
"""What tokenizers in the manner of SentencePiece write for a space."""

SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "llama-bpe",
}
"""Patterns that split text, as tokenizer.json has them, to their names in llama.cpp."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as GGUF files describe it.

    Attributes:
        model: "gpt2" for merges of bytes, "llama" for merges of characters by scores.
        pre: name of the scheme that splits text before merges.
        tokens: texts of all tokens, by number.
        types: their kinds.
        scores: their scores; empty for merges of bytes.
        merges: pairs of tokens to merge, in order, separated by a space; empty for merges by scores.
        ids: "bos", "eos", "unk" and "pad" to the number of the token, if there is one.
        add_bos: whether a text begins with the token "bos".
        add_eos: whether a text ends with the token "eos".
        add_space_prefix: whether a text gets a space in front.
        chat_template: templates of chats, or one template; ``None`` if there is none.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: Any

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> GgufTokenizer:
        """Describe a tokenizer of transformers.

        Args:
            tokenizer: the tokenizer.
            vocab_size: rows of the token embedding. Numbers without a token get a token that is never used.

        Raises:
            InvalidArgumentError: for a tokenizer whose rules llama.cpp does not have; the message names them.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
        model = rules["model"]
        if model["type"] != "BPE":
            raise _unknown(f"the model {model['type']}")
        by_score = bool(model["byte_fallback"])
        pre, prefixed = ("default", _space_prefix(rules)) if by_score else (_scheme(rules), False)
        texts, types = _tokens(rules, vocab_size, by_score)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        encoded = tokenizer("a")["input_ids"]
        return cls(
            model="llama" if by_score else "gpt2",
            pre=pre,
            tokens=texts,
            types=types,
            scores=_scores(texts, merges) if by_score else (),
            merges=() if by_score else [" ".join(pair) for pair in merges],
            ids={name: number for name, number in ids.items() if number is not None},
            add_bos=ids["bos"] is not None and encoded[0] == ids["bos"],
            add_eos=ids["eos"] is not None and encoded[-1] == ids["eos"],
            add_space_prefix=prefixed,
            chat_template=_template(tokenizer.chat_template),
        )

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the metadata to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(files: Mapping[str, Path], vocab_size: int) -> GgufTokenizer:
    """Describe the tokenizer that is among the files of a model.

    Raises:
        InvalidArgumentError: if there is none, or for one that llama.cpp does not have; the message says what.
    """
    if "tokenizer.json" not in files:
        raise InvalidArgumentError(
            "[export] gguf writes the tokenizer into the file: model must be a folder with tokenizer.json"
        )
    from ..models import load_tokenizer

    return GgufTokenizer.of(load_tokenizer(files["tokenizer.json"].parent), vocab_size)


def _unknown(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"[export] gguf knows no tokenizer with {what}; llama.cpp could not split text alike")


def _steps(rule: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """Return the steps of a rule of tokenizer.json; the key ``parts`` has those of a sequence."""
    if rule is None:
        return []
    return [step for part in rule[parts] for step in _steps(part, parts)] if rule["type"] == "Sequence" else [rule]


def _scheme(rules: Mapping[str, Any]) -> str:
    """Return the name that llama.cpp has for the rules by which text is split before bytes are merged."""
    for step in _steps(rules["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # which llama.cpp leaves out for every model
            raise _unknown(f"the normalizer {step['type']}")
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    found = None
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        own_split = steps[-1]["use_regex"]
        if kinds == ["ByteLevel"] and own_split:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and own_split and steps[0]["individual_digits"]:
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not own_split and not steps[0]["invert"]:
            found = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    if found is None:
        raise _unknown(f"the pre-tokenizer {json.dumps(rules['pre_tokenizer'])}")
    if rules["model"].get("ignore_merges") and found != "llama-bpe":
        raise _unknown("ignore_merges")
    return found


def _space_prefix(rules: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer in the manner of SentencePiece puts a space in front of a text."""
    replaces, prefixed = False, False
    for step in _steps(rules["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefixed = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaces = True
        else:
            raise _unknown(f"the normalizer {json.dumps(step)}")
    for step in _steps(rules["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split"):
            replaces, prefixed = True, step["prepend_scheme"] != "never"
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "}):  # no space is left to split at
            raise _unknown(f"the pre-tokenizer {json.dumps(step)}")
    if not replaces:
        raise _unknown("byte_fallback and spaces that are not replaced")
    return prefixed


def _tokens(rules: Mapping[str, Any], vocab_size: int, by_score: bool) -> tuple[list[str], list[int]]:
    """Return texts and kinds of all tokens."""
    model = rules["model"]
    texts, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    numbers = [*model["vocab"].values(), *(added["id"] for added in rules["added_tokens"])]
    if max(numbers) >= vocab_size:
        raise InvalidArgumentError(
            f"[export] the tokenizer must have at most {vocab_size} tokens, as the model: got token {max(numbers)}"
        )
    for text, i in model["vocab"].items():
        is_byte = by_score and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        texts[i], types[i] = text, BYTE if is_byte else NORMAL
    for added in rules["added_tokens"]:
        i, text = added["id"], added["content"]
        if added["special"]:
            texts[i], types[i] = text, CONTROL
        else:
            # llama.cpp finds these tokens in the text as it is given.
            texts[i], types[i] = text.replace(SPACE, " ") if by_score else text, USER_DEFINED
    if by_score and model["unk_token"] is not None:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    return texts, types


def _scores(texts: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return scores by which merges happen in the same order: minus the place of the first merge that gives a token."""
    first: dict[str, int] = {}
    latest = -1
    for place, (left, right) in enumerate(merges):
        mine = first.setdefault(left + right, place)
        if mine < latest:
            raise _unknown(f"merges that are not sorted by their results, such as {left + right!r}")
        latest = mine
    return [-float(first.get(text, 0)) for text in texts]


def _template(given: Any) -> Any:
    """Return chat templates as the writer takes them: one text, or a list of names and texts."""
    if isinstance(given, Mapping):
        return [{"name": name, "template": template} for name, template in given.items()]
    return given
