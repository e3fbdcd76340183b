import json
import sys
import types

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from quantrature import InvalidArgumentError, QuantratureError
from quantrature.text import context_length, token_windows
from tiny_models import byte_tokenizer, tiny_config, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20  # 900 bytes, a token each


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def decoded(tokenizer, windows):
    return tokenizer.decode(windows.flatten())


def test_windows_follow_one_another(tokenizer):
    windows = token_windows([TEXT], tokenizer, seqlen=64)
    assert windows.shape == (14, 64)
    assert windows.dtype == torch.int64
    assert decoded(tokenizer, windows) == TEXT[: 14 * 64]
    assert decoded(tokenizer, token_windows([TEXT], tokenizer, seqlen=64, max_tokens=200)) == TEXT[:192]


def test_a_file_is_one_text(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n" * 30, encoding="utf-8")
    for source in (path, str(path)):
        windows = token_windows(source, tokenizer, seqlen=48)
        assert decoded(tokenizer, windows) == "Grüße\n" * 30


def test_texts_are_joined_by_blank_lines(tokenizer, tmp_path):
    expected = "one\n\ntwo\u2028three\n\n four"
    texts = ["one", "two\u2028three", " four"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n")
    length = len(expected.encode())
    for source in (texts, tuple(texts), [{"text": t} for t in texts], path):
        assert decoded(tokenizer, token_windows(source, tokenizer, seqlen=length)) == expected


def test_conversations_go_through_the_chat_template(tmp_path):
    tokenizer = byte_tokenizer()
    path = tmp_path / "chat.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(InvalidArgumentError, match=r"chat.jsonl, line 1 has messages, but the tokenizer has no chat"):
        token_windows(path, tokenizer, seqlen=8)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    windows = token_windows(path, tokenizer, seqlen=len("user: Hi!assistant: Ho!") * 2)
    assert decoded(tokenizer, windows) == "user: Hi</s>assistant: Ho</s>" * 2
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InvalidArgumentError, match=r"line 1 does not fit the chat template: no system role"):
        token_windows(path, tokenizer, seqlen=8)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda x: np.array(x, np.uint16),
        lambda x: torch.tensor(x, dtype=torch.int32),
    ],
)
def test_token_ids_in_any_form(convert):
    ids = list(range(100))
    assert torch.equal(token_windows(convert(ids), seqlen=30), torch.arange(90).view(3, 30))
    rows = [ids[:50], ids[50:]]
    assert torch.equal(token_windows(convert(rows)), torch.arange(100).view(2, 50))
    assert torch.equal(token_windows(convert(rows), seqlen=50, max_tokens=99), torch.arange(50).view(1, 50))


def test_samples_are_drawn_without_replacement_and_nested():
    ids = torch.arange(1000)
    drawn = token_windows(ids, seqlen=10, nsamples=40, seed=3)
    assert drawn.shape == (40, 10)
    starts = drawn[:, 0].tolist()
    assert len(set(starts)) == 40
    assert all(start % 10 == 0 for start in starts)
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(10))
    assert torch.equal(token_windows(ids, seqlen=10, nsamples=7, seed=3), drawn[:7])
    assert not torch.equal(token_windows(ids, seqlen=10, nsamples=40, seed=4), drawn)
    assert sorted(starts) != starts


def test_a_seed_means_the_same_everywhere():
    # written down once: neither the platform nor a release of NumPy may change which windows are drawn
    drawn = token_windows(torch.arange(1000), seqlen=10, nsamples=6, seed=0)
    assert (drawn[:, 0] // 10).tolist() == [11, 92, 3, 20, 13, 2]


def test_too_few_windows_are_all_used_with_a_note(caplog):
    drawn = token_windows(torch.arange(35), seqlen=10, nsamples=8)
    assert sorted(drawn[:, 0].tolist()) == [0, 10, 20]
    assert "the text has only 3 windows of 10 tokens; all are used" in caplog.text


@pytest.mark.parametrize(
    ("name", "length"), [("llama", 64), ("gpt2", 64), ("opt", 64), ("gpt-neox", 64), ("bert", 64), ("t5", None)]
)
def test_the_default_length_is_what_the_model_was_built_for(name, length):
    assert context_length(tiny_config(name)) == length
    windows = token_windows(torch.zeros(5000, dtype=torch.int64), model=tiny_model(name, "meta"))
    assert windows.shape[1] == (length or 2048)


def test_the_default_length_is_at_most_2048():
    config = tiny_config("llama")
    config.max_position_embeddings = 131072
    assert token_windows(torch.zeros(5000, dtype=torch.int64), model=config).shape == (2, 2048)
    assert token_windows(torch.zeros(5000, dtype=torch.int64)).shape == (2, 2048)


def test_bos_is_added_where_it_is_asked_for():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    assert tokenizer("a").input_ids[0] == 256
    plain = token_windows([TEXT], tokenizer, seqlen=60, bos="none")
    assert 256 not in plain
    once = token_windows([TEXT], tokenizer, seqlen=60, bos="text")
    assert (once == 256).nonzero().tolist() == [[0, 0]]
    assert torch.equal(once.flatten()[1:], plain.flatten()[:-1])
    each = token_windows([TEXT], tokenizer, seqlen=61, bos="window")
    assert (each[:, 0] == 256).all()
    assert torch.equal(each[:, 1:], plain[: len(each)])


def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_data_set_is_named_with_configuration_and_split(tokenizer, monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"text": "one"}, {"text": "two"}]

    fake_datasets(monkeypatch, load)
    assert decoded(tokenizer, token_windows("some/set", tokenizer, seqlen=8)) == "one\n\ntwo"
    token_windows("some/set", tokenizer, seqlen=8, nsamples=1)
    token_windows("some/set:raw", tokenizer, seqlen=8)
    token_windows("some/set::validation", tokenizer, seqlen=8)
    assert asked == [
        ("some/set", None, "test"),
        ("some/set", None, "train"),
        ("some/set", "raw", "test"),
        ("some/set", None, "validation"),
    ]


def test_a_data_set_that_cannot_be_had_is_named(tokenizer, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    fake_datasets(monkeypatch, load)
    with pytest.raises(
        QuantratureError, match=r"cannot load some/set as a dataset, split test: Couldn't reach the Hub"
    ):
        token_windows("some/set", tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InvalidArgumentError, match=r"there is no file some/set; to load it as a dataset, pip install datasets"
    ):
        token_windows("some/set", tokenizer)


def test_a_data_set_in_a_folder(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    windows = token_windows(folder, tokenizer, seqlen=8)
    assert decoded(tokenizer, windows) == "one\n\ntwo"


def test_a_text_shorter_than_a_window_says_how_short(tokenizer):
    with pytest.raises(
        InvalidArgumentError, match=r"one window: it has 900 tokens, but seqlen=901 needs 901; .* a smaller seqlen"
    ):
        token_windows([TEXT], tokenizer, seqlen=901)
    with pytest.raises(InvalidArgumentError, match=r"it has 63 tokens, but seqlen=64 needs 64"):
        token_windows([TEXT], tokenizer, model=tiny_config("llama"), max_tokens=63)
    with pytest.raises(InvalidArgumentError, match=r"it has 0 tokens, but seqlen=8 needs 8"):
        token_windows([], tokenizer, seqlen=8)


IDS = list(range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": IDS, "seqlen": 0}, "seqlen must be an integer of at least 1: got seqlen=0"),
        ({"source": IDS, "seqlen": 8.0}, "seqlen must be an integer of at least 1: got seqlen=8.0"),
        ({"source": IDS, "nsamples": 0}, "nsamples must be an integer of at least 1: got nsamples=0"),
        ({"source": IDS, "max_tokens": -1}, "max_tokens must be an integer of at least 1: got max_tokens=-1"),
        ({"source": IDS, "seed": -1}, "seed must be an integer of at least 0: got seed=-1"),
        ({"source": IDS, "bos": True}, "bos must be one of auto, none, text, window: got bos=True"),
        ({"source": IDS, "bos": "text", "seqlen": 8}, "because the tokenizer has no BOS token: got bos=text"),
        ({"source": [IDS], "bos": "window"}, "bos must be auto or none if the source is windows: got bos=window"),
        ({"source": [IDS], "seqlen": 50}, "seqlen must be 100, the length of the given windows: got seqlen=50"),
        ({"source": [IDS], "max_tokens": 99}, "there must be at least one window: got 0 of 100 tokens"),
        ({"source": [IDS], "model": "llama"}, "at most the model's context length, 64: got seqlen=100"),
        ({"source": IDS, "seqlen": 65, "model": "llama"}, "context length, 64: got seqlen=65"),
        ({"source": [*IDS, 258], "seqlen": 1, "model": "llama"}, "below the model's vocab_size, 258: got 258"),
        ({"source": [*IDS, -1], "seqlen": 1}, "token ids must be at least 0"),
        ({"source": [IDS, [0.5]]}, "source must be a file, a dataset, texts or token ids: got list"),
        ({"source": [0.5]}, "source must be a file, a dataset, texts or token ids: got list"),
        ({"source": None}, "source must be a file, a dataset, texts or token ids: got NoneType"),
        ({"source": torch.ones(9)}, "token ids must be integers: got dtype=float32"),
        ({"source": torch.ones(9, dtype=torch.bool)}, "token ids must be integers: got dtype=bool"),
        ({"source": [[[1]]]}, "token ids must have 1 or 2 dimensions: got 3"),
        ({"source": ["text"]}, "tokenizer must be given if the source is text: got tokenizer=None"),
        ({"source": "nowhere.txt", "tokenizer": 1}, "source must be an existing file: there is no file nowhere.txt"),
        ({"source": ["text", 5], "tokenizer": 1}, "the list, item 1 must have a text or messages: got int"),
    ],
)
def test_bad_input_is_named(arguments, message):
    if "model" in arguments:
        arguments = {**arguments, "model": tiny_config(arguments["model"])}
    with pytest.raises(InvalidArgumentError, match=message):
        token_windows(**arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a.jsonl, line 2 is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b", "id": 2}', r"a.jsonl, line 3 must have a text .* got the fields body, id"),
        (b'{"text": 5}', r"a.jsonl, line 1 must have a text or messages: got the fields text"),
        (b"[1]", r"a.jsonl, line 1 must have a text or messages: got list"),
        (
            b'{"messages": [{"role": "user"}]}\n{"text": "a"}',
            r"a.jsonl, line 2: texts and conversations must not be mixed",
        ),
        (
            b'{"text": "a"}\n{"messages": [{"role": "user"}]}',
            r"a.jsonl, line 2: texts and conversations must not be mixed",
        ),
        (b'{"text": "\xff"}', r"a.jsonl is not UTF-8 text: byte 10"),
    ],
)
def test_a_bad_line_is_named(content, message, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "-"
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message):
        token_windows(path, tokenizer, seqlen=1)


def test_a_byte_order_mark_is_no_part_of_the_text(tokenizer, tmp_path):
    for name, content in (("a.jsonl", '{"text": "one"}\n{"text": "two"}'), ("a.txt", "one\n\ntwo"), ("a.json", "[]")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    for name in ("a.jsonl", "a.txt"):
        assert decoded(tokenizer, token_windows(tmp_path / name, tokenizer, seqlen=8)) == "one\n\ntwo"
    with pytest.raises(InvalidArgumentError, match="it has 0 tokens"):
        token_windows(tmp_path / "a.json", tokenizer, seqlen=8)


HUMAN = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
MESSAGES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CHAT = "user: Hi</s>assistant: Ho</s>"


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ("one", None, "one"),
        ({"text": "one", "content": "two"}, None, "one"),
        ({"content": "one", "id": 3}, None, "one"),
        ({"instruction": "do", "input": "this", "output": "done"}, None, "do\n\nthis\n\ndone"),
        ({"instruction": "do", "input": "", "output": "done"}, None, "do\n\ndone"),
        ({"instruction": "do", "context": "this", "response": "done"}, None, "do\n\nthis\n\ndone"),
        ({"instruction": "do", "output": "done", "text": "do: done"}, None, "do: done"),
        ({"messages": MESSAGES}, None, CHAT),
        ({"conversations": HUMAN}, None, CHAT),
        ({"conversations": MESSAGES}, None, CHAT),
        ({"text": "one", "body": "two"}, "body", "two"),
        ({"text": "one", "dialog": HUMAN}, "dialog", CHAT),
        ({"text": "one", "ids": [64, 65]}, "ids", None),
        ({"input_ids": [64, 65, 66], "attention_mask": [1, 1, 0]}, None, None),
    ],
)
def test_rows_in_the_forms_that_data_sets_have(row, column, expected, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(json.dumps(row) + "\n")
    listed.write_text(json.dumps([row]))
    fake_datasets(monkeypatch, lambda name, configuration, split: [row])
    ids = [64, 65] if expected is None else tokenizer(expected)["input_ids"]
    for source in ([row], (row,), iter([row]), lines, listed, "some/set"):
        windows = token_windows(source, tokenizer, seqlen=len(ids), text_column=column)
        assert windows.tolist() == [ids]


def test_batches_of_a_data_loader_are_rows():
    """As data loaders give them, several texts at a time, with and without the names of the inputs."""
    windows = torch.arange(48).view(6, 8)
    for batches in (
        [{"input_ids": windows[:4], "attention_mask": torch.ones(4, 8, dtype=torch.int64)}, {"input_ids": windows[4:]}],
        torch.utils.data.DataLoader([{"input_ids": row} for row in windows], batch_size=4),
        [windows[:4], windows[4:]],
        [windows[:3].numpy(), windows[3:].numpy()],
    ):
        assert torch.equal(token_windows(batches), windows)


def test_the_ending_of_a_name_may_be_in_capitals(tokenizer, tmp_path):
    for name, content in (("a.JSONL", '{"text": "one"}\n{"text": "two"}'), ("a.Json", '["one", "two"]')):
        (tmp_path / name).write_text(content)
        assert decoded(tokenizer, token_windows(tmp_path / name, tokenizer, seqlen=8)) == "one\n\ntwo"


def test_what_a_tokenizer_returns_is_taken(tokenizer):
    texts = ["one two three", "four"]
    apart = tokenizer(texts)
    joined = [token for row in apart["input_ids"] for token in row]
    single = tokenizer("".join(texts))
    tensors = tokenizer(texts[:1] * 3, return_tensors="pt")
    tokenizer.pad_token = "</s>"
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    rows = [dict(tokenizer(text)) for text in texts]
    for source in (
        apart,
        apart["input_ids"],
        single,
        tokenizer(["".join(texts)], return_tensors="pt"),
        padded,
        rows,
        [torch.tensor(row) for row in apart["input_ids"]],
        [tokenizer(text, return_tensors="pt") for text in texts],
        [tokenizer(text, return_tensors="np")["input_ids"] for text in texts],
    ):
        assert token_windows(source, seqlen=len(joined)).tolist() == [joined]
    assert token_windows(tensors).shape == (3, 13)
    assert token_windows([tokenizer(texts[0])] * 3).shape == (3, 13)
    with pytest.raises(InvalidArgumentError, match="attention_mask must have the shape of input_ids"):
        token_windows({"input_ids": [1, 2], "attention_mask": [1]}, seqlen=1)


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ('{"text": "one"}', None, r"a.json must contain a list of texts or rows: got dict"),
        ('{"text": "one"}\n{"text": "two"}', None, r"a.json is not JSON: .*; if each line .* rename the file"),
        ('["one", 2]', None, r"a.json, item 1 must have a text or messages: got int"),
        ('[{"body": "a"}]', None, r"item 0 must have .* got the fields body; set text_column"),
        ('[{"text": "a"}]', "body", r"item 0 must have a text in the field body: got the fields text"),
        ('[{"input_ids": [1]}, "a"]', None, r"item 1: texts and token ids must not be mixed"),
        ('[{"conversations": [{"from": "human", "value": "a"}]}]', None, r"item 0 has messages, but the tokenizer has"),
    ],
)
def test_a_json_file_that_is_no_list_of_texts_is_refused(content, column, message, tokenizer, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        token_windows(tmp_path / "a.json", tokenizer, seqlen=1, text_column=column)
    with pytest.raises(InvalidArgumentError, match="must be an existing file"):
        token_windows("nowhere.json", tokenizer)


def test_verbs_take_the_name_of_the_field(tmp_path, capfd):
    from quantrature.cli import main

    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.json").write_text(json.dumps([{"body": TEXT}]))
    given = ["--text", str(tmp_path / "a.json"), "--seqlen", "32", "--json"]
    assert main(["eval", str(tmp_path / "model"), *given]) == 1
    assert "set text_column" in capfd.readouterr().err
    assert main(["eval", str(tmp_path / "model"), *given, "--text-column", "body"]) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] == 28 * 31
    assert (
        main(["eval", str(tmp_path / "model"), *given, "--text-column", "body", "--seqlen", "64", "--stride", "32"])
        == 0
    )
    calibrated = ["quantize", str(tmp_path / "model"), "--bits", "4", "--method", "gptq", "--seqlen", "32"]
    calibrated += ["--calibration", str(tmp_path / "a.json"), "--text-column", "body", "-o", str(tmp_path / "out")]
    assert main(calibrated) == 0
