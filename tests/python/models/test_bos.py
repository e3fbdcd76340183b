"""Where text is given BOS: as the tokenizer does by itself, in every function and verb, and on record."""

import inspect
import json
from typing import ClassVar

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import quantrature as qtr
from quantrature import InvalidArgumentError, allocation, analysis, checkpoint, evaluate
from quantrature.cli import VERBS, app, main
from quantrature.demo import text
from quantrature.demo.tour import MODEL
from quantrature.text import bos_of, own_bos, token_windows
from tiny_models import byte_tokenizer, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20
BOS, EOS = 256, 257


def templated(single):
    """A tokenizer of bytes that puts special tokens around a text by its post-processor."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


class Slow(transformers.PreTrainedTokenizer):
    """A tokenizer in Python, which adds special tokens in its own code."""

    vocab_files_names: ClassVar[dict[str, str]] = {}

    def __init__(self, add_bos_token):
        self.add_bos_token = add_bos_token
        super().__init__(bos_token="<s>", eos_token="</s>")

    vocab_size = 256

    def get_vocab(self):
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def build_inputs_with_special_tokens(self, ids, other=None):
        return [self.bos_token_id] * self.add_bos_token + ids + [self.eos_token_id]


def llama(**settings):
    letters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *letters])}
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=[], **settings)


def with_no_bos_after_all():
    tokenizer = llama(add_bos_token=True)
    tokenizer.add_bos_token = False
    return tokenizer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (byte_tokenizer, []),
        (lambda: templated("<s> $A"), [BOS]),
        (lambda: templated("<s> $A </s>"), [BOS]),
        (lambda: templated("$A </s>"), []),
        (lambda: templated("<s> </s> $A"), [BOS, EOS]),  # two, like [gMASK]<sop> of GLM-4
        (lambda: Slow(True), [BOS]),
        (lambda: Slow(False), []),
        (lambda: llama(add_bos_token=True), [1]),
        (lambda: llama(add_bos_token=True, add_eos_token=True), [1]),
        (lambda: llama(add_bos_token=False), []),
        (lambda: llama(add_eos_token=True), []),
        (with_no_bos_after_all, []),
    ],
)
def test_windows_begin_as_the_tokenizer_begins_a_text(make, expected):
    tokenizer = make()
    assert own_bos(tokenizer) == expected
    plain = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    for chosen in ({}, {"nsamples": 5}):
        windows = token_windows([TEXT], tokenizer, seqlen=32, **chosen)
        assert (windows[:, : len(expected)] == torch.tensor(expected)).all()
        assert bos_of(windows, tokenizer) == ("window" if expected else "none")
    rest = token_windows([TEXT], tokenizer, seqlen=32)[:, len(expected) :].flatten()
    assert torch.equal(rest, plain[: len(rest)])
    assert torch.equal(
        token_windows([TEXT], tokenizer, seqlen=32, bos="none").flatten(), plain[: len(plain) // 32 * 32]
    )


def test_a_text_that_has_bos_gets_no_second_one():
    tokenizer = templated("<s> $A")
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "a" * 15}, {"role": "assistant", "content": "b" * 8}]}]
    windows = token_windows(rows, tokenizer, seqlen=8)
    assert tokenizer.batch_decode(windows) == ["<s>aaaaaaa", "<s>aaaaaaa", "<s>a<s>bbbbb"]
    with_bos = tokenizer([TEXT])["input_ids"][0]
    for bos in ("auto", "window", "text"):
        once = token_windows(with_bos, tokenizer, seqlen=32, bos=bos)
        assert torch.equal(once, token_windows([TEXT], tokenizer, seqlen=32, bos=bos))


def test_windows_that_are_given_stay_as_they_are():
    given = torch.arange(64).view(2, 32)
    assert torch.equal(token_windows(given, templated("<s> $A")), given)
    assert torch.equal(token_windows(given.flatten(), seqlen=32), given)  # no tokenizer that would know BOS


def test_windows_without_room_beside_bos_are_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"seqlen must be above 1, the number of BOS tokens in each window: got seqlen=1"
    ):
        token_windows([TEXT], templated("<s> $A"), seqlen=1)


def test_where_bos_is_told_from_the_tokens():
    windows = torch.arange(64).view(2, 32)
    config = transformers.LlamaConfig(bos_token_id=32)
    assert bos_of(windows, byte_tokenizer()) == bos_of(windows) == "none"
    assert bos_of(windows, model=config) == "text"
    assert bos_of(windows[1:], model=config) == "window"
    assert bos_of(windows[1], model=config) == "text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer adds BOS, and a text."""
    place = tmp_path_factory.mktemp("bos")
    tiny_model("llama").save_pretrained(place / "model")
    templated("<s> $A").save_pretrained(place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def test_perplexity_and_divergence_begin_with_bos(folder):
    model, tokenizer = tiny_model("llama"), templated("<s> $A")
    windows = token_windows([TEXT], tokenizer, seqlen=32, bos="window")
    expected = evaluate.perplexity(model, windows)
    found = evaluate.perplexity(model, [TEXT], 32, tokenizer=tokenizer)
    assert found == expected
    assert found.bos == "window"
    apart = evaluate.divergence(model, tiny_model("llama", seed=1), [TEXT], 32, tokenizer=tokenizer)
    assert apart.model == expected
    without = evaluate.perplexity(model, [TEXT], 32, tokenizer=tokenizer, bos="none")
    assert without.bos == "none"
    assert without.nll != found.nll


@pytest.mark.parametrize("single", ["<s> $A", "<s> </s> $A"])
def test_overlapping_windows_begin_with_bos(single):
    model, tokenizer = tiny_model("llama"), templated(single)
    prefix = own_bos(tokenizer)
    found = evaluate.perplexity(model, [TEXT[:100]], 32, stride=16, tokenizer=tokenizer)
    ids = tokenizer(TEXT[:100], add_special_tokens=False)["input_ids"]
    losses, length = {}, 32 - len(prefix)
    start = 0
    while len(losses) < len(ids):
        window = torch.tensor([prefix + ids[start : start + length]])
        with torch.no_grad():
            log_probabilities = model(window).logits[0].log_softmax(-1)
        for i in range(len(prefix), window.shape[1]):
            place = start + i - len(prefix)
            losses.setdefault(place, -float(log_probabilities[i - 1, window[0, i]]))
        start += 16
    assert found.tokens == len(ids) == 100
    assert found.nll == pytest.approx(sum(losses.values()) / 100, rel=1e-5)
    assert found.bos == "window"


def cli(capfd, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capfd.readouterr().out


def test_eval_says_where_bos_was(folder, capfd):
    given = ("eval", folder / "model", "--text", folder / "text.txt", "--seqlen", 32)
    model, tokenizer = tiny_model("llama"), templated("<s> $A")
    for more in ((), ("--stride", 16)):
        stride = int(more[1]) if more else None
        for bos, said in (("auto", "window"), ("window", "window"), ("text", "text"), ("none", "none")):
            found = json.loads(cli(capfd, *given, *more, "--bos", bos, "--json"))
            assert found["bos"] == said
            expected = evaluate.perplexity(model, [TEXT], 32, stride=stride, tokenizer=tokenizer, bos=bos)
            assert (found["nll"], found["tokens"]) == (pytest.approx(expected.nll), expected.tokens)
    assert "windows, each begun by BOS" in cli(capfd, *given)


def test_analysis_and_plan_say_where_bos_was(folder, tmp_path, capfd):
    given = ("--calibration", folder / "text.txt", "--nsamples", 2, "--seqlen", 32)
    sens, plan = tmp_path / "sens", tmp_path / "plan.json"
    cli(capfd, "analyze", folder / "model", "-o", sens, *given, "--bits", "3", "--group-size", 16, "--nodes", 2)
    found = analysis.Sensitivity.load(sens)
    assert found.settings["bos"] == "window"
    cli(capfd, "plan", sens, "--avg-bits", 5, "-o", plan)
    assert qtr.Plan.load(plan).allocation["bos"] == "window"
    direct = json.loads(cli(capfd, "plan", folder / "model", "--avg-bits", 6, *given, "--nodes", 2, "--json"))
    assert direct["allocation"]["bos"] == "window"
    # An analysis of an earlier release does not say.
    summary = json.loads((sens / "sensitivity.json").read_text())
    del summary["settings"]["bos"]
    (sens / "sensitivity.json").write_text(json.dumps(summary))
    assert "bos" not in allocation.allocate(sens, avg_bits=5).allocation


@pytest.mark.parametrize("bos", ["auto", "none"])
def test_calibrated_quantization_says_where_bos_was(bos, folder, tmp_path, capfd):
    given = ("--calibration", folder / "text.txt", "--nsamples", 3, "--seqlen", 32, "--bos", bos)
    cli(capfd, "quantize", folder / "model", "-o", tmp_path / "out", "--bits", 3, "--group-size", 16, *given)
    cli(capfd, "quantize", folder / "model", "-o", tmp_path / "gptq", "--bits", 3, "--method", "gptq", *given)
    said = qtr.Plan.load(tmp_path / "gptq" / "plan.json").allocation["quantized_on"]
    expected = "window" if bos == "auto" else "none"
    assert said == {"nsamples": 3, "seqlen": 32, "bos": expected, "seed": 0}
    windows = token_windows([TEXT], templated("<s> $A"), seqlen=32, nsamples=3, bos=expected)
    same = qtr.quantize(tiny_model("llama"), bits=3, method="gptq", calibration=windows)
    checkpoint.save(same, tmp_path / "same")
    file = "model.safetensors"
    assert (tmp_path / "gptq" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    cli(
        capfd,
        "requant",
        tmp_path / "out",
        "--source",
        folder / "model",
        "-o",
        tmp_path / "more",
        "--significant-fraction",
        0.01,
        *given,
    )
    assert json.loads((tmp_path / "more" / "requant.json").read_text())["settings"]["bos"] == expected


def public_functions():
    for module in (qtr, analysis, allocation, evaluate, qtr.text):
        for name in dir(module):
            found = getattr(module, name)
            if not name.startswith("_") and inspect.isfunction(found):
                yield f"{module.__name__}.{name}", inspect.signature(found).parameters


def test_whatever_takes_text_has_the_setting():
    taking = {name: given for name, given in public_functions() if {"tokenizer", "seqlen"} <= set(given)}
    assert {"quantrature.quantize", "quantrature.analyze", "quantrature.evaluate.perplexity"} <= set(taking)
    for name, given in taking.items():
        assert given["bos"].default == "auto", name
        assert given["text_column"].default is None, name
    commands = {command.name: inspect.signature(command.callback).parameters for command in app.registered_commands}
    with_text = [verb for verb in VERBS if "seqlen" in commands[verb]]
    assert with_text == ["analyze", "plan", "plan validate", "quantize", "requant", "eval"]
    for verb in with_text:
        assert commands[verb]["bos"].default == "auto", verb
        assert commands[verb]["text_column"].default is None, verb


def test_numbers_of_tokenizers_without_bos_stay():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    auto, none = (token_windows([text.evaluation_text()], tokenizer, seqlen=64, bos=bos) for bos in ("auto", "none"))
    assert torch.equal(auto, none)
    assert bos_of(auto, tokenizer) == "none"


def test_a_setting_that_there_is_not_is_refused(folder, capfd):
    with pytest.raises(InvalidArgumentError, match="bos must be one of auto, none, text, window: got bos=always"):
        evaluate.perplexity(tiny_model("llama"), [TEXT], tokenizer=byte_tokenizer(), bos="always")
    with pytest.raises(InvalidArgumentError, match="bos must be auto, none or window for tasks: got bos=text"):
        evaluate.tasks(folder / "model", ["arc_easy"], bos="text")


@pytest.mark.filterwarnings("ignore")  # what the harness and the packages it stands on say of themselves
def test_tasks_begin_with_bos(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    tiny_model("llama").save_pretrained(tmp_path)
    said = tokenizer = None

    def simple_evaluate(model, **_):
        nonlocal said
        said = model.tok_encode("ab"), model.tok_batch_encode(["ab"])[0][0].tolist()
        return {"results": {"some": {"acc,none": 1.0}}}

    class NoTasks:  # which are many, and take their time to be found
        def __init__(self, include_path):
            pass

        def match_tasks(self, names):
            return names

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", NoTasks)
    for single, bos, expected in (
        ("<s> $A", "auto", "window"),
        ("<s> $A", "window", "window"),
        ("<s> $A", "none", "none"),
        ("$A </s>", "auto", "none"),
    ):
        tokenizer = templated(single)
        tokenizer.save_pretrained(tmp_path)
        (result,) = evaluate.tasks(tmp_path, ["some"], bos=bos)
        ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
        expected_ids = [BOS, *ids] if expected == "window" else ids
        assert said == (expected_ids, expected_ids)
        assert result.bos == expected
    with pytest.raises(InvalidArgumentError, match="bos=window needs a tokenizer that adds BOS by default"):
        evaluate.tasks(tmp_path, ["some"], bos="window")
