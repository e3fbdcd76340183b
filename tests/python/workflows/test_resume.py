"""Analyses and ReQuants that are interrupted, and go on to the same bits."""

import json

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, checkpoint
from quantrature.analysis import objective
from quantrature.analysis.snapshot import Snapshot
from quantrature.cli import main
from quantrature.models import gradients
from quantrature.nn import quantized_layers
from sharp_models import TOKENS, sharp_model
from tiny_models import byte_tokenizer

ANALYSIS = {"metrics": ["pqi"], "bits": 2, "group_size": 16, "nodes": 3}
REQUANT = {
    "bits": 2,
    "group_size": 16,
    "nodes": 2,
    "batch_size": 2,
    "outlier_fraction": 0.02,
    "significant_fraction": 0.01,
}


class Stop(KeyboardInterrupt):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the n-th forward pass from now on fail, and every unit of work save its state."""
    save = Snapshot.save
    monkeypatch.setattr(Snapshot, "save", lambda self, *a, **k: save(self, *a, **{**k, "last": True}))
    nll = gradients.next_token_nll
    passes, limit = [], [0]

    def counting(model, tokens):
        passes.append(1)
        if len(passes) == limit[0]:
            raise Stop
        return nll(model, tokens)

    monkeypatch.setattr(gradients, "next_token_nll", counting)
    monkeypatch.setattr(objective, "next_token_nll", counting)

    def after(count):
        passes.clear()
        limit[0] = count
        return passes

    return after


@pytest.mark.parametrize("mode", ["after_mean", "per_sample", "per_node"])
def test_an_interrupted_analysis_goes_on_where_it_was(tmp_path, interrupt, mode):
    arguments = {**ANALYSIS, "abs_mode": mode, "resume_folder": tmp_path / "state"}
    passes = interrupt(0)
    whole = qtr.analyze(sharp_model(), TOKENS, **arguments)
    measuring = 2 * len(TOKENS)
    assert len(passes) == measuring + 3 * len(TOKENS)
    assert list(tmp_path.iterdir()) == []
    passes = interrupt(measuring + 6)
    with pytest.raises(Stop):
        qtr.analyze(sharp_model(), TOKENS, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    passes = interrupt(0)
    resumed = qtr.analyze(sharp_model(), TOKENS, **arguments, resume="required")
    done = 3 if mode == "per_sample" else 5  # whole samples, or single gradients
    assert len(passes) == measuring + 3 * len(TOKENS) - done
    assert resumed.matrices == whole.matrices
    assert resumed.proofs == whole.proofs
    for name, values in whole.maps["pqi"].items():
        assert torch.equal(resumed.maps["pqi"][name], values)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_another_analysis_is_not_taken_up(tmp_path, interrupt):
    interrupt(15)
    with pytest.raises(Stop):
        qtr.analyze(sharp_model(), TOKENS, **ANALYSIS, resume_folder=tmp_path / "state")
    others = {**ANALYSIS, "resume_folder": tmp_path / "state"}
    for change in ({"rule": "midpoint"}, {"nodes": 2}, {"abs_mode": "per_node"}, {"method": "hqq"}):
        with pytest.raises(
            InvalidArgumentError, match="resume is required, but .*integral-b2g16.safetensors holds no state"
        ):
            qtr.analyze(sharp_model(), TOKENS, **{**others, **change}, resume="required")
    with pytest.raises(InvalidArgumentError, match="resume is required"):
        qtr.analyze(sharp_model(), TOKENS + 1, **others, resume="required")
    passes = interrupt(0)
    qtr.analyze(sharp_model(), TOKENS, **others, resume="never")
    assert len(passes) == 5 * len(TOKENS)
    with pytest.raises(InvalidArgumentError, match="resume must be one of auto, required, never"):
        qtr.analyze(sharp_model(), TOKENS, **others, resume="maybe")
    with pytest.raises(InvalidArgumentError, match="resume_folder must be given"):
        qtr.analyze(sharp_model(), TOKENS, **ANALYSIS, resume="required")


def test_a_folder_that_is_not_the_runs_own_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    gptq = {"bits": 3, "group_size": 16, "method": "gptq", "calibration": TOKENS, "progress": False}
    qtr.analyze(sharp_model(), TOKENS, **ANALYSIS, resume_folder=tmp_path)
    qtr.requant(sharp_model(), TOKENS, **REQUANT, resume_folder=tmp_path)
    qtr.quantize(sharp_model(), **gptq, resume_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    run = {"analyze": (qtr.analyze, (TOKENS,), ANALYSIS), "requant": (qtr.requant, (TOKENS,), REQUANT)}
    for name, (function, arguments, settings) in {**run, "quantize": (qtr.quantize, (), gptq)}.items():
        with pytest.raises(InvalidArgumentError, match=rf"\[{name}\] resume_folder must be a folder: .* is a file"):
            function(sharp_model(), *arguments, **settings, resume_folder=tmp_path / "notes.txt")
        with pytest.raises(
            InvalidArgumentError, match=rf"\[{name}\] resume_folder must be given with resume='required'"
        ):
            function(sharp_model(), *arguments, **settings, resume="required")


def test_saving_takes_little_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("quantrature.analysis.snapshot.time.monotonic", lambda: clock[0])
    state = Snapshot(tmp_path / "state", {})
    saved = []

    def slow(sums, path, metadata):
        saved.append(clock[0])
        path.touch()
        clock[0] += 9

    monkeypatch.setattr("safetensors.torch.save_file", slow)
    while clock[0] < 500:
        state.save(0, {}, {})
        clock[0] += 1
    assert saved == [60, 60 + 9 + 180, 60 + 2 * (9 + 180)]


def tensors(model):
    return {name: layer.stored() for name, layer in quantized_layers(model).items()}


@pytest.mark.parametrize("selection", ["temperature", "greedy"])
def test_an_interrupted_requant_goes_on_where_it_was(tmp_path, interrupt, selection):
    arguments = {
        **REQUANT,
        "selection": selection,
        "resume_folder": tmp_path / "state",
        "temperatures": (1.0, 0.5, 2.0),
    }
    passes = interrupt(0)
    model = sharp_model()
    _, whole = qtr.requant(model, TOKENS, **arguments)
    expected, total = tensors(model), len(passes)
    assert list(tmp_path.iterdir()) == []
    # Four integrals of 2 nodes, each after a measurement; trials; two batches each.
    trials = 3 if selection == "temperature" else 0
    assert total == 2 * (1 + 4 * 3 + trials)
    redone = []
    for at in range(5, total + 1, 3):
        interrupt(at)
        with pytest.raises(Stop):
            qtr.requant(sharp_model(), TOKENS, **arguments)
        passes = interrupt(0)
        model = sharp_model()
        _, record = qtr.requant(model, TOKENS, **arguments, resume="required" if at > 6 else "auto")
        redone.append(len(passes) - (total - at + 1))
        assert record == whole
        found = tensors(model)
        for name, parts in expected.items():
            assert all(torch.equal(found[name][part], tensor) for part, tensor in parts.items())
        assert list(tmp_path.iterdir()) == []
    # The original loss, the measurement of the stage at hand, and of a trial or gradient at most one.
    assert max(redone) <= 2 + 2 + 1


def test_a_requant_that_may_not_or_must_resume(tmp_path, interrupt):
    arguments = {**REQUANT, "selection": "greedy", "resume_folder": tmp_path / "state"}
    with pytest.raises(InvalidArgumentError, match="resume is required"):
        qtr.requant(sharp_model(), TOKENS, **arguments, resume="required")
    passes = interrupt(0)
    qtr.requant(sharp_model(), TOKENS, **arguments)
    total = len(passes)
    interrupt(total - 3)
    with pytest.raises(Stop):
        qtr.requant(sharp_model(), TOKENS, **arguments)
    left = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert left == ["integral.safetensors", "journal.safetensors"]
    with pytest.raises(InvalidArgumentError, match="resume is required"):
        qtr.requant(sharp_model(), TOKENS, **{**arguments, "significant_fraction": 0.015}, resume="required")
    passes = interrupt(0)
    qtr.requant(sharp_model(), TOKENS, **arguments, resume="never")
    assert len(passes) == total
    with pytest.raises(InvalidArgumentError, match=r"\[requant\] resume must be one of auto, required, never"):
        qtr.requant(sharp_model(), TOKENS, **arguments, resume="maybe")
    with pytest.raises(InvalidArgumentError, match="resume_folder must be given"):
        qtr.requant(sharp_model(), TOKENS, **REQUANT, resume="required")


def test_a_journal_that_is_broken_is_not_taken_up(tmp_path, interrupt):
    arguments = {**REQUANT, "selection": "greedy", "resume_folder": tmp_path / "state"}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "journal.safetensors").write_bytes(b"nothing of the kind")
    _, record = qtr.requant(sharp_model(), TOKENS, **arguments)
    assert record.gradient_evaluations == 8
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a quantized copy and a text."""
    root = tmp_path_factory.mktemp("resume")
    sharp_model().save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    checkpoint.save(qtr.quantize(sharp_model(), bits=2, group_size=16), root / "host", tokenizer=byte_tokenizer())
    (root / "text.txt").write_text("It was the best of times, it was the worst of times. " * 8)
    return root


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_improvement_of_a_folder_goes_on(folders, tmp_path, interrupt):
    arguments = [folders / "host", folders / "source", TOKENS]
    settings = {"significant_fraction": 0.02, "nodes": 2, "batch_size": 2, "resume_folder": tmp_path / "state"}
    passes = interrupt(0)
    whole = qtr.requant_folder(*arguments, **settings, output=tmp_path / "whole")
    interrupt(len(passes) - 1)
    with pytest.raises(Stop):
        qtr.requant_folder(*arguments, **settings, output=tmp_path / "parts")
    passes = interrupt(0)
    assert qtr.requant_folder(*arguments, **settings, output=tmp_path / "parts", resume="required") == whole
    assert len(passes) <= 6  # the original loss and that of the last stage, and two batches of gradients
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize(
    "verb",
    [
        ["analyze", "source", "--bits", "2", "--group-size", "16", "--metrics", "pqi"],
        ["quantize", "source", "--bits", "2", "--group-size", "16", "--requant", "--selection", "greedy"],
        ["requant", "host", "--source", "source", "--significant-fraction", "0.02"],
    ],
)
def test_the_command_line_goes_on_beside_its_output(folders, tmp_path, interrupt, verb, capsys):
    arguments = [str(folders / part) if part in ("source", "host") else part for part in verb]
    arguments += ["--calibration", str(folders / "text.txt"), "--nsamples", "3", "--seqlen", "24", "--nodes", "2"]

    def run(output, *more):
        return main([*arguments, "-o", str(tmp_path / output), "--json", *more])

    passes = interrupt(0)
    assert run("whole") == 0
    interrupt(len(passes) - 1)
    assert run("parts") == 130
    assert any(path.name.startswith("parts.resume") for path in tmp_path.iterdir())
    assert run("parts", "--resume", "required") == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for each in said:
        each.pop("output", None)
    assert said[0] == said[1]
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
