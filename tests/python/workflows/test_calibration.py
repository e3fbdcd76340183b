"""Quantizing block by block by calibration text: order, inputs, memory of the model, resuming, failures."""

import json

import pytest
import torch
from safetensors.torch import load_file

import quantrature as qtr
from interruptions import limited_to
from model_state import same, state_of
from quantrature import InvalidArgumentError, Plan, PlanEntry, QuantratureError, checkpoint, models
from quantrature.cli import main
from quantrature.methods import METHODS, Method
from quantrature.models.part_outputs import PartOutputs
from quantrature.nn import quantized_layers
from quantrature.quantization import calibrate, collect, sequential
from tiny_models import byte_tokenizer, tiny_model

WINDOWS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
LAYOUTS = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi",
    "opt",
    "gpt2",
    "gpt-neox",
    "falcon",
    "mixtral",
    "qwen2-moe",
    "gpt-oss",
]
GPTQ = PlanEntry(3, 16, method="gptq")
AWQ = PlanEntry(3, 16, method="awq", options={"fold": False})
QTIP = PlanEntry(3, -1, method="qtip", options={"state_bits": 8})

CALIBRATED = {
    "gptq": {},
    "gptq-groups": {"method": "gptq", "static_groups": False},
    "awq": {},
    "squeezellm": {"sensitive": 0.01},
    "qtip": {"state_bits": 10},
    "qtip-hyb": {"method": "qtip", "state_bits": 12, "code": "hyb"},
    "qtip-1mad": {"method": "qtip", "state_bits": 11, "code": "1mad"},
}
"""Every method that needs calibration, with settings."""


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_quantized_and_survives_the_way_through_a_folder(layout, tmp_path):
    model = tiny_model(layout)
    before = logits(model)
    qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=WINDOWS, batch_size=4)
    after = logits(model)
    assert set(quantized_layers(model)) == {x.name for x in models.find_linears(tiny_model(layout))}
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.95
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(models.load_model(tmp_path / "out")), after)


def naive(model, entry, true_sequential):
    """The same by whole forward passes: each matrix on what the model, quantized up to it, gives it."""
    linears = models.find_linears(model, experts=False)
    roles = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    steps = {}
    for linear in linears:
        stage = roles[linear.name.rpartition(".")[2]] if true_sequential else 0
        steps.setdefault((linear.block, stage), []).append(linear)
    found = {}
    for _, members in sorted(steps.items(), key=lambda item: item[0]):
        seen = {}

        def see(name, seen=seen):
            return lambda module, args: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

        hooks = [m.module.register_forward_pre_hook(see(m.name)) for m in members]
        logits(model)
        for hook in hooks:
            hook.remove()
        for m in members:
            x = torch.cat(seen[m.name])
            matrix = qtr.methods.quantize_matrix(
                m.name,
                m.weight.contiguous(),
                entry,
                statistics=qtr.methods.Statistics(hessian=x.mT @ x / len(x), activations=x),
            )
            found[m.name] = matrix.dequantize()
        for m in members:
            m.weight.copy_(found[m.name])
    return found


@pytest.mark.parametrize("entry", [GPTQ, AWQ, QTIP], ids=lambda entry: entry.method)
@pytest.mark.parametrize("true_sequential", [True, False])
def test_inputs_come_from_what_is_quantized_already(true_sequential, entry):
    model = tiny_model("llama")
    linears = models.find_linears(model)
    entries = {linear.name: entry for linear in linears}
    before = state_of(model)
    found = calibrate(model, linears, entries, WINDOWS, batch_size=4, true_sequential=true_sequential)
    assert same(state_of(model), before)
    expected = naive(tiny_model("llama"), entry, true_sequential)
    for name, image in expected.items():
        got = found.matrices[name].dequantize()
        # Sums in another order may turn single codes, and with them what follows: of a trellis, whole blocks.
        if entry is QTIP:
            assert torch.nn.functional.cosine_similarity(got.flatten(), image.flatten(), dim=0) > 0.97, name
        else:
            assert (got == image).float().mean() > 0.97, name
    other = calibrate(model, linears, entries, WINDOWS, batch_size=4, true_sequential=not true_sequential)
    changed = {
        n.split(".", 3)[3] for n, m in found.matrices.items() if not torch.equal(m.dequantize(), image_of(other, n))
    }
    assert "mlp.down_proj" in changed


def image_of(found, name):
    return found.matrices[name].dequantize()


def test_the_fisher_information_is_that_of_the_model_as_it_is():
    model = tiny_model("llama")
    linears = models.find_linears(model)
    entries = {linear.name: PlanEntry(3, -1, method="squeezellm") for linear in linears}
    one, other = (calibrate(model, linears, entries, WINDOWS, true_sequential=each) for each in (True, False))
    assert all(torch.equal(matrix.dequantize(), image_of(other, name)) for name, matrix in one.matrices.items())


def test_the_order_within_a_block(monkeypatch):
    done = []
    true = sequential.quantize_matrix
    monkeypatch.setattr(
        sequential,
        "quantize_matrix",
        lambda name, *a, **k: (done.append(name.split(".", 3)[3]), true(name, *a, **k))[1],
    )
    model = tiny_model("llama")
    qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=WINDOWS)
    block = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    assert done == 2 * [*block, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def test_methods_that_need_nothing_may_stand_in_the_same_plan():
    model = tiny_model("llama")
    linears = models.find_linears(model)
    plan = Plan({x.name: GPTQ if "mlp" in x.name else PlanEntry(3, 16) for x in linears})
    alone = qtr.quantize(tiny_model("llama"), bits=3, group_size=16)
    qtr.quantize(model, plan=plan, calibration=WINDOWS)
    for name, layer in quantized_layers(model).items():
        same_codes = torch.equal(layer.codes, quantized_layers(alone)[name].codes)
        assert same_codes == ("self_attn" in name)


def test_statistics_are_collected_on_the_model_as_it_is():
    model = tiny_model("llama")
    linears = models.find_linears(model)
    before = state_of(model)
    needs = {linears[0].name: ("hessian", "activations"), linears[-1].name: ("fisher",)}
    found = collect(model, linears, needs, WINDOWS, batch_size=4)
    assert same(state_of(model), before)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(WINDOWS)).reshape(-1, 32)
    first = found[linears[0].name]
    assert first.tokens == WINDOWS.numel()
    torch.testing.assert_close(first.hessian, x.mT @ x / len(x))
    assert torch.equal(first.activations, x)  # fewer than are sampled
    expected = torch.zeros(linears[-1].weight.shape)
    for window in WINDOWS:
        weight = linears[-1].parameter
        loss = model(window[None], labels=window[None]).loss
        expected += torch.autograd.grad(loss, weight)[0].square()
    torch.testing.assert_close(found[linears[-1].name].fisher, expected, rtol=1e-4, atol=1e-12)


def test_sampled_activations_are_spread_evenly():
    from quantrature.quantization.statistics import SAMPLED, Gatherer

    rows = torch.arange(5 * SAMPLED + 7.0)[:, None].expand(-1, 3)
    gatherer = Gatherer(["activations"], len(rows))
    for batch in rows.split(100):
        gatherer.take(batch[None])
    found = gatherer.statistics()
    assert found.tokens == len(rows)
    assert torch.equal(found.activations, rows[::5])


class Stop(Exception):
    pass


def interrupted(monkeypatch, folder, after, **settings):
    """Quantize until so many matrices are done."""
    limited = limited_to(after, sequential.quantize_matrix, Stop)
    model = tiny_model("llama")
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "quantize_matrix", limited)
        with pytest.raises(Stop):
            quantized(model, folder, **settings)
    assert same(state_of(model), before)


def quantized(model, folder, **settings):
    given = {"bits": 3, "group_size": 16, "method": "gptq", "calibration": WINDOWS, "resume_folder": folder} | settings
    return qtr.quantize(model, **given)


@pytest.mark.parametrize("name", CALIBRATED)
def test_resuming_gives_the_same_bytes_and_does_not_repeat_finished_blocks(name, monkeypatch, tmp_path, caplog):
    settings = {"method": name, **CALIBRATED[name]}
    whole = state_of(quantized(tiny_model("llama"), None, **settings))
    interrupted(monkeypatch, tmp_path / "state", after=9, **settings)
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["block-00000.safetensors"]
    done = []
    true = sequential.quantize_matrix
    monkeypatch.setattr(
        sequential, "quantize_matrix", lambda name, *a, **k: (done.append(name), true(name, *a, **k))[1]
    )
    resumed = quantized(tiny_model("llama"), tmp_path / "state", resume="required", **settings)
    assert len(done) == 7
    assert f"1 of 2 blocks are read from {tmp_path / 'state'}" in caplog.text
    assert all(name.startswith("model.layers.1.") for name in done)
    assert same(state_of(resumed), whole)
    assert not (tmp_path / "state").exists()


def test_a_state_of_other_work_is_not_taken_up(monkeypatch, tmp_path):
    folder = tmp_path / "state"
    interrupted(monkeypatch, folder, after=9)
    with pytest.raises(InvalidArgumentError, match=r"\[quantize\] resume is required, but .*state holds no block"):
        quantized(tiny_model("llama"), folder, resume="required", bits=4)
    with pytest.raises(InvalidArgumentError, match="resume is required"):
        quantized(tiny_model("llama"), folder, resume="required", calibration=WINDOWS[:5])
    with pytest.raises(InvalidArgumentError, match=r"resume must be one of auto, required, never: got 'maybe'"):
        quantized(tiny_model("llama"), folder, resume="maybe")
    file = folder / "block-00000.safetensors"
    tensors = load_file(file)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert tensors
    expected = state_of(quantized(tiny_model("llama"), None))
    assert same(state_of(quantized(tiny_model("llama"), folder)), expected)


def test_activations_that_are_not_finite_are_named_by_module_and_sample():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    before = state_of(model)
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(
        QuantratureError, match=rf"\[quantize\] the input of {name} is not finite in calibration sample 0"
    ):
        qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=WINDOWS)
    assert same(state_of(model), before)

    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    windows = WINDOWS.clone()
    windows[windows == 7] = 8
    windows[4, 3] = 7
    with pytest.raises(QuantratureError, match=r"the embeddings are not finite in calibration sample 4"):
        qtr.quantize(model, bits=4, group_size=16, method="gptq", calibration=windows, batch_size=4)


def test_a_method_that_needs_text_says_so():
    with pytest.raises(InvalidArgumentError, match=r"\[quantize\] method gptq needs calibration text"):
        qtr.quantize(tiny_model("llama"), bits=4, method="gptq")


def reusing_nothing(monkeypatch):
    monkeypatch.setattr(PartOutputs, "__init__", lambda self, block: vars(self).update(_parts=[], _kept={}))


@pytest.mark.parametrize(
    ("dense", "true_sequential"),
    [("none", True), ("none", False), ("attention", True), ("first", False), ("last", True)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reusing_outputs_of_final_parts_changes_no_bit(layout, dense, true_sequential, monkeypatch):
    def quantized():
        model = tiny_model(layout)
        names = [linear.name for linear in models.find_linears(model)]
        left = {"none": [], "attention": [n for n in names if "att" in n], "first": names[::2], "last": names[1::2]}
        entries = {name: GPTQ for name in names if name not in left[dense]}
        linears = models.find_linears(model)
        found = calibrate(model, linears, entries, WINDOWS, batch_size=4, true_sequential=true_sequential)
        return {name: matrix.dequantize("float32") for name, matrix in found.matrices.items()}

    reused = quantized()
    reusing_nothing(monkeypatch)
    assert same(reused, quantized())


def test_attention_with_its_final_weights_runs_no_more(monkeypatch):
    def calls_of_q():
        model = tiny_model("llama")
        calls = []
        for block in model.model.layers:
            block.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        linears = models.find_linears(model)
        calibrate(model, linears, {linear.name: GPTQ for linear in linears}, WINDOWS, batch_size=4)
        return len(calls), len(model.model.layers)

    found, blocks = calls_of_q()
    reusing_nothing(monkeypatch)
    without, _ = calls_of_q()
    batches = 2
    assert without - found == 2 * batches * blocks  # the pass for the inputs of down, and the one to the next block


def test_peak_memory_counts_activations_and_hessians():
    linears = models.find_linears(tiny_model("llama"))
    entries = {linear.name: GPTQ for linear in linears}
    found = sequential.peak_bytes(linears, entries, 10, 24)
    assert found > 10 * 24 * 32 * 4 + 3 * 4 * 48**2
    assert sequential.peak_bytes(linears, entries, 10, 24, keep_statistics=True) > found
    of_awq = sequential.peak_bytes(linears, {linear.name: AWQ for linear in linears}, 10, 24)
    block = sum(linear.numel for linear in linears if linear.block == 0)
    assert of_awq > 10 * 24 * 32 * 4 + 12 * block + 4 * 48 * 240


def test_requant_works_on_a_calibrated_host():
    model = tiny_model("llama")
    _, record = qtr.requant(
        model,
        WINDOWS,
        bits=2,
        group_size=16,
        method="gptq",
        outlier_fraction=0.01,
        significant_fraction=0.01,
        nodes=2,
        batch_size=6,
    )
    assert record.outliers and record.significant
    assert record.stages[-1].measured_loss_change < record.stages[0].measured_loss_change


def test_images_of_an_analysis_are_calibrated():
    found = qtr.analyze(tiny_model("llama"), WINDOWS, metrics=["pqi"], bits=2, group_size=16, method="gptq", nodes=6)
    proof = found.proofs[0]
    assert proof.predicted_loss_change == pytest.approx(proof.measured_loss_change, rel=0.1, abs=1e-4)


def test_the_command_line(tmp_path, capfd):
    def cli(*given):
        assert main(list(given)) == 0
        return capfd.readouterr().out

    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    given = ["--bits", "3", "--group-size", "16", "--method", "gptq", "--calibration", str(text), "--nsamples", "4"]
    given += ["--seqlen", "24", "--damp-percent", "0.02", "--no-desc-act", "--no-static-groups"]
    given += ["--resume", "auto"]
    said = json.loads(cli("quantize", str(source), "-o", str(tmp_path / "out"), *given, "--json"))
    assert said["modules"] == 14
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    entry = next(iter(plan["entries"].values()))
    assert entry["method"] == "gptq"
    assert entry["options"] == {"damp_percent": 0.02, "desc_act": False, "static_groups": False}
    assert checkpoint.inspect(tmp_path / "out").bits_per_weight == said["bits_per_weight"]
    assert not (tmp_path / "out.resume").exists()
    cost = json.loads(cli("quantize", str(source), *given, "--dry-run", "--json"))
    assert cost["memory_bytes"] > 0
    assert "gptq" in json.loads(cli("list", "methods", "--json"))["methods"]
    assert "gptq" in METHODS
    assert isinstance(METHODS["gptq"], Method)


def test_an_interrupted_command_says_how_it_goes_on(monkeypatch, tmp_path, capfd):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("llama").save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    given = ["quantize", str(source), "-o", str(out), "--bits", "3", "--group-size", "16", "--method", "gptq"]
    given += ["--calibration", str(text), "--nsamples", "4", "--seqlen", "24"]
    for after, said in ((3, ""), (9, f"finished blocks are in {tmp_path / 'out.resume'}; run the same command")):
        with monkeypatch.context() as patch:
            limited = limited_to(after, sequential.quantize_matrix, KeyboardInterrupt)
            patch.setattr(sequential, "quantize_matrix", limited)
            assert main(given) == 130
        assert not out.exists()
        err = capfd.readouterr().err
        assert said in err
        assert bool(said) == ("to resume" in err)
    assert main([*given, "--resume", "required"]) == 0
    assert "note: 1 of 2 blocks are read from" in capfd.readouterr().err


@pytest.mark.parametrize("name", CALIBRATED)
def test_every_method_from_the_command_line_to_an_evaluation(name, monkeypatch, tmp_path, capfd):
    source, text = tmp_path / "source", tmp_path / "text.txt"
    tiny_model("llama").save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    settings = dict(CALIBRATED[name])
    method = settings.pop("method", name)
    given = ["quantize", str(source), "--bits", "2", "--group-size", "16", "--method", method]
    given += ["--calibration", str(text), "--nsamples", "4", "--seqlen", "24"]
    given += [part for option, value in settings.items() for part in ("--option", f"{option}={value}")]
    assert main([*given, "-o", str(tmp_path / "whole")]) == 0
    assert "peak memory: about" in capfd.readouterr().err
    limited = limited_to(9, sequential.quantize_matrix, Stop)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "quantize_matrix", limited)
        assert main([*given, "-o", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    assert main([*given, "-o", str(tmp_path / "out"), "--resume", "required", "--json"]) == 0
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    capfd.readouterr()
    evaluated = ["eval", str(tmp_path / "out"), "--text", str(text), "--seqlen", "24", "--reference", str(source)]
    assert main([*evaluated, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kld_mean"] > 0
    loaded = models.load_model(tmp_path / "out")
    assert all(layer.intact for layer in quantized_layers(loaded).values())
    dense = models.load_model(tmp_path / "out")
    dense.dequantize()
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-3, atol=1e-4)
    assert main(["verify", str(tmp_path / "out"), "--source", str(source)]) == 0


@pytest.mark.parametrize("name", CALIBRATED)
def test_progress_comes_to_the_work_that_was_announced(name):
    settings = dict(CALIBRATED[name])
    method = settings.pop("method", name)
    size = 16 if METHODS[method].group_size is None else METHODS[method].group_size
    model = tiny_model("llama")
    linears = models.find_linears(model)
    entries = {x.name: PlanEntry(3, size, method=method, options=settings) for x in linears}
    said = []
    calibrate(model, linears, entries, WINDOWS, batch_size=4, report=lambda *given: said.append(given))
    counts, notes = zip(*said, strict=True)
    assert sum(counts) == pytest.approx(sequential.units(linears, entries, len(WINDOWS)))
    assert min(counts) > 0
    blocks = ["model.layers.0", "model.layers.1"]
    before = ["the Fisher information"] if name == "squeezellm" else []
    assert list(dict.fromkeys(notes)) == [*before, *blocks]
