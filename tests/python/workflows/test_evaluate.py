import math

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn

from quantrature import InvalidArgumentError, QuantratureError, evaluate, models, text
from quantrature.models import running as _forward
from tiny_models import VOCABULARY, byte_tokenizer, tiny_model

TEXT = "It was the best of times, it was the worst of times. " * 12


class Bigram(nn.Module):
    """Logits that depend on the last token alone, so that every number can be looked up."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table, dtype=torch.float32))
        self.calls = []

    def forward(self, input_ids):
        self.calls.append(tuple(input_ids.shape))
        return type("Output", (), {"logits": self.table[input_ids]})()


@pytest.fixture
def tables():
    return np.random.default_rng(0).normal(0, 2, (2, 11, 11)).astype(np.float32)


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 11, (9, 20))


def losses(table, ids):
    return -scipy.special.log_softmax(table.astype(np.float64), axis=1)[ids[..., :-1], ids[..., 1:]]


def test_perplexity_is_its_definition(tables, ids):
    expected = losses(tables[0], ids)
    found = evaluate.perplexity(Bigram(tables[0]), ids)
    assert found.tokens == 9 * 19
    assert found.windows == 9
    np.testing.assert_allclose(found.nll, expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, np.exp(expected.mean()), rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, expected.mean(axis=1).std(ddof=1) / 3, rtol=1e-5)
    assert evaluate.perplexity(Bigram(tables[0]), ids.flatten(), seqlen=20) == found


def test_divergence_is_its_definition(tables, ids):
    p, q = (scipy.special.log_softmax(table.astype(np.float64), axis=1) for table in tables[::-1])
    kl = (np.exp(p) * (p - q)).sum(axis=1)[ids[:, :-1]]
    found = evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids)
    np.testing.assert_allclose(found.mean, kl.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.median, np.median(kl), rtol=1e-6)
    np.testing.assert_allclose(found.p99, np.quantile(kl, 0.99), rtol=1e-6)
    np.testing.assert_allclose(found.maximum, kl.max(), rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, kl.mean(axis=1).std(ddof=1) / 3, rtol=1e-5)
    assert found.same_top1 == (p.argmax(axis=1) == q.argmax(axis=1))[ids[:, :-1]].mean()
    change = losses(tables[0], ids) - losses(tables[1], ids)
    np.testing.assert_allclose(found.loss_change, change.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.loss_change_standard_error, change.mean(axis=1).std(ddof=1) / 3, rtol=1e-5)
    assert (found.tokens, found.windows) == (9 * 19, 9)
    assert found.model == evaluate.perplexity(Bigram(tables[0]), ids)
    assert found.reference == evaluate.perplexity(Bigram(tables[1]), ids)


def test_a_model_does_not_diverge_from_itself():
    model = tiny_model("llama")
    found = evaluate.divergence(model, model, [TEXT], tokenizer=byte_tokenizer())
    assert (found.mean, found.maximum, found.same_top1, found.loss_change) == (0, 0, 1, 0)
    assert found.tokens == 9 * 63


def test_batches_and_chunks_change_nothing(monkeypatch, tables, ids):
    whole = evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids)
    model = Bigram(tables[0])
    assert evaluate.perplexity(model, ids, batch_size=4) == whole.model
    assert model.calls == [(4, 20), (4, 20), (1, 20)]
    monkeypatch.setattr(_forward, "CHUNK", 40)  # three tokens of eleven logits
    assert [(some.start, some.stop) for _, some in _forward.chunks(1, 8, 11)] == [(0, 3), (3, 6), (6, 8)]
    np.testing.assert_allclose(evaluate.perplexity(model, ids).nll, whole.model.nll, rtol=1e-7)
    small = evaluate.divergence(model, Bigram(tables[1]), ids, batch_size=5)
    np.testing.assert_allclose(
        [small.mean, small.p99, small.reference.nll], [whole.mean, whole.p99, whole.reference.nll], rtol=1e-6
    )
    assert small.same_top1 == whole.same_top1


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_evaluated_as_they_are(name, dtype):
    model = tiny_model(name).to(dtype)
    windows = text.token_windows([TEXT], byte_tokenizer(), seqlen=32)
    with torch.no_grad():
        logits = model(windows).logits.double()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    found = evaluate.perplexity(model, [TEXT], 32, tokenizer=byte_tokenizer(), batch_size=len(windows))
    np.testing.assert_allclose(found.nll, expected, rtol=1e-6)


def test_overlapping_windows_score_each_token_once(tables):
    ids = np.random.default_rng(2).integers(0, 11, 103)
    expected = losses(tables[0], ids)
    model = Bigram(tables[0])
    found = evaluate.perplexity(model, ids, seqlen=20, stride=7)
    # the context is of no consequence to a bigram, so every token's loss is known
    np.testing.assert_allclose(found.nll, expected.mean(), rtol=1e-6)
    assert found.tokens == 102
    assert found.windows == 13
    assert model.calls == [(1, 20), (8, 20), (3, 20), (1, 19)]


def test_overlapping_windows_are_those_of_the_guide():
    model, ids = tiny_model("llama"), torch.randint(0, VOCABULARY, (150,), generator=torch.manual_seed(0))
    total, done = 0.0, 1
    for start in range(0, 150, 16):
        stop = min(start + 64, 150)
        labels = ids[start:stop].clone()
        labels[: done - start] = -100
        with torch.no_grad():
            mean = model(ids[None, start:stop], labels=labels[None]).loss.double().item()
        total += mean * (stop - done)
        done = stop
        if stop == 150:
            break
    found = evaluate.perplexity(model, ids, stride=16)
    np.testing.assert_allclose(found.nll, total / 149, rtol=1e-6)
    one_bos = evaluate.perplexity(model, [TEXT], 64, stride=32, tokenizer=byte_tokenizer(), bos="text")
    assert one_bos.tokens == len(TEXT)


def test_one_window_has_no_standard_error(tables, ids):
    found = evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids[:1])
    assert math.isnan(found.standard_error)
    assert math.isnan(found.model.standard_error)


def test_what_the_reference_rules_out_adds_nothing(tables, ids):
    tables = tables.copy()
    tables[:, :, 5] = -np.inf
    ids = np.where(ids == 5, 4, ids)
    found = evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids)
    rest = np.delete(np.delete(tables, 5, axis=1), 5, axis=2)
    expected = evaluate.divergence(Bigram(rest[0]), Bigram(rest[1]), np.where(ids > 5, ids - 1, ids))
    np.testing.assert_allclose([found.mean, found.maximum], [expected.mean, expected.maximum], rtol=1e-6)
    tables[1, :, 5] = 0
    with pytest.raises(QuantratureError, match=r"\[divergence\] the divergence is not finite in window 0"):
        evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids)


def test_a_window_without_a_finite_loss_is_named(tables):
    ids = np.zeros((6, 20), np.int64)
    ids[4, 3] = 7
    tables[0, 7, 2] = np.nan
    with pytest.raises(
        QuantratureError, match=r"\[perplexity\] the loss is not finite in window 4 \(tokens 80 to 99\)"
    ):
        evaluate.perplexity(Bigram(tables[0]), ids, batch_size=4)
    with pytest.raises(QuantratureError, match=r"\[divergence\] the divergence is not finite in window 4"):
        evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids)
    with pytest.raises(QuantratureError, match=r"\[divergence\] the divergence is not finite in window 4"):
        evaluate.divergence(Bigram(tables[1]), Bigram(tables[0]), ids)


def test_a_hopeless_model_has_infinite_perplexity():
    table = np.zeros((3, 3), np.float32)
    table[0, 1] = 3e4
    assert evaluate.perplexity(Bigram(table), np.zeros((2, 5), np.int64)).perplexity == math.inf


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    evaluate.perplexity(model, [TEXT], tokenizer=byte_tokenizer())
    assert set(seen) == {(False, False)}
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlen": 21}, r"\[token_windows\] seqlen must be 20, the length of the given windows: got seqlen=21"),
        ({"batch_size": 0}, r"batch_size must be a positive integer: got batch_size=0"),
        ({"stride": 0}, r"stride must be 1 to 19, for seqlen=20: got stride=0"),
        ({"stride": 20}, r"stride must be 1 to 19, for seqlen=20: got stride=20"),
        ({"stride": 5}, r"stride needs one row of at least seqlen=20 tokens: got shape=\(9, 20\)"),
    ],
)
def test_bad_arguments_are_named(tables, ids, arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        evaluate.perplexity(Bigram(tables[0]), ids, **{"seqlen": 20, **arguments})


def test_a_window_of_one_token_is_refused(tables, ids):
    with pytest.raises(InvalidArgumentError, match=r"\[perplexity\] seqlen must be at least 2"):
        evaluate.perplexity(Bigram(tables[0]), ids[:, :1])
    with pytest.raises(InvalidArgumentError, match=r"\[divergence\] seqlen must be at least 2"):
        evaluate.divergence(Bigram(tables[0]), Bigram(tables[1]), ids[:, :1])


def test_a_model_that_is_not_causal_is_refused():
    for name, kind in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        with pytest.raises(
            InvalidArgumentError, match=rf"\[perplexity\] model must be a causal language model: got {kind}"
        ):
            evaluate.perplexity(tiny_model(name), [[1, 2, 3]])
    with pytest.raises(InvalidArgumentError, match=r"model must be a causal language model: got LlamaModel"):
        evaluate.divergence(tiny_model("llama"), tiny_model("llama").model, [[1, 2, 3]])


def test_different_vocabularies_are_refused(tables, ids):
    with pytest.raises(InvalidArgumentError, match=r"the same vocabulary size: got model=11, reference=12"):
        evaluate.divergence(Bigram(tables[0]), Bigram(np.zeros((12, 12))), ids)
    other = tiny_model("llama")
    other.config.vocab_size = VOCABULARY + 6
    with pytest.raises(InvalidArgumentError, match=r"the same vocabulary size: got model=258, reference=264"):
        evaluate.divergence(tiny_model("llama"), other, [[1, 2, 3]])


def test_token_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"below the model's vocab_size, 258: got 300"):
        evaluate.perplexity(tiny_model("llama"), [[1, 2, 300]])


@pytest.mark.slow
def test_the_anchor_of_the_shared_model(shared):
    folder = shared / "models" / "books-llama"
    found = evaluate.perplexity(
        models.load_model(folder, dtype="float32"),
        shared / "data" / "books-eval.txt",
        seqlen=256,
        tokenizer=models.load_tokenizer(folder),
        max_tokens=65536,
    )
    assert found.tokens == 65280
    assert round(found.perplexity, 4) == 40.5453  # ../shared/anchors/results.md
