"""Plans from models and folders, and the verb that makes them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from quantrature import InvalidArgumentError, QuantratureError, models, ops
from quantrature.allocation import (
    Option,
    Validation,
    activation_sensitivity,
    allocate,
    conspicuous,
    estimate,
    measured_loss_changes,
    random_plans,
    stored_bytes,
    validate,
)
from quantrature.allocation.sources import Source
from quantrature.analysis import Sensitivity, analyze
from quantrature.cli import main
from quantrature.methods import quantize_matrix
from quantrature.plan import Plan, PlanEntry
from tiny_models import byte_tokenizer, tiny_model

TEXT = "It was the season of Light, it was the season of Darkness. " * 20
TOKENS = torch.arange(96).reshape(3, 32) % 251


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a text."""
    root = tmp_path_factory.mktemp("plan")
    tiny_model("llama").save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def analyzed(model):
    return analyze(model, TOKENS, metrics=["pqi", "kurtosis"], bits=[3], group_size=16, nodes=2)


def stored(model, plan):
    """What the matrices of a plan really take."""
    total = 0
    for linear in models.find_linears(model):
        entry = plan.entries[linear.name]
        if not entry.keeps:
            total += quantize_matrix(linear.name, linear.weight.contiguous(), entry).nbytes
    return total


# Sizes


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 140),
    st.integers(1, 8),
    st.sampled_from([-1, 1, 7, 16, 64, 128]),
    st.booleans(),
    st.sampled_from([None, 1, 3, 8]),
    st.sampled_from([0.0, 0.004, 0.1, 0.5]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_sizes_are_those_of_the_ops(rows, columns, bits, group_size, sym, meta_bits, outliers, dtype):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(dtype)
    entry = PlanEntry(bits, group_size, sym=sym, meta_bits=meta_bits, outlier_fraction=outliers)
    quantized = quantize_matrix("w", weight, entry)
    scale, zero = quantized.dense.scale, quantized.dense.zero
    # What only the weights tell: whether scales can be quantized once more, and whether float16 holds them.
    plain = not isinstance(scale, ops.QuantizedTensor)
    size = stored_bytes(
        rows, columns, replace(entry, meta_bits=None) if plain else entry, str(dtype).removeprefix("torch.")
    )
    if plain:
        wide = [part for part in (scale, zero) if part is not None and part.dtype == torch.float32]
        size += sum(2 * part.numel() for part in wide)
    else:
        size -= 4 * scale.scale.numel() if scale.scale.dtype == torch.float16 else 0
        size += 4 * zero.scale.numel() if zero is not None and zero.scale.dtype == torch.float32 else 0
    assert quantized.nbytes == size


def test_scales_too_small_for_float16_are_seen(model):
    small = tiny_model("llama")
    first = models.find_linears(small)[0]
    first.parameter.data *= 1e-6
    found = analyze(small, TOKENS, metrics=["pqi"], bits=[3], group_size=16, nodes=1)
    by_shape = stored_bytes(first.out_features, first.in_features, PlanEntry(3, 16), "float32")
    assert found.matrices[0].nbytes["b3g16"] > by_shape
    for source, strategy in ((found, "pqi"), (found, "uniform"), (small, "uniform")):
        plan = allocate(source, strategy=strategy, avg_bits=5.02, group_sizes=[16, 32])
        assert plan.allocation["bytes"] == stored(small, plan) <= plan.allocation["budget_bytes"]


# The analysis


def test_an_analysis_notes_settings(analyzed, model, tmp_path):
    for matrix, linear in zip(analyzed.matrices, models.find_linears(model), strict=True):
        assert set(matrix.error) == set(matrix.nbytes) == {f"b{b}g{g}" for b in range(1, 9) for g in (8, 16, 32)}
        for key in ("b1g8", "b3g16", "b8g32"):
            quantized = quantize_matrix("w", linear.weight, Option.parse(key).entry())
            apart = (quantized.dequantize("float32") - linear.weight).double().square().sum()
            assert matrix.error[key] == pytest.approx(float(apart), rel=1e-6)
            assert matrix.nbytes[key] == quantized.nbytes
        assert matrix.dtype == "float32"
    analyzed.save(tmp_path / "sens")
    assert Sensitivity.load(tmp_path / "sens").matrices == analyzed.matrices
    assert not analyze(model, TOKENS, metrics=["kurtosis"], group_size=16).matrices[0].error


# Plans


@pytest.mark.parametrize("strategy", ["uniform", "mxq", "pqi"])
@pytest.mark.parametrize("avg_bits", [3.6, 4.4, 6])
def test_what_is_planned_is_what_is_stored(analyzed, model, strategy, avg_bits):
    plan = allocate(analyzed, strategy=strategy, avg_bits=avg_bits, weights=model, group_sizes=[16, 32])
    quantized = quantrature.quantize(tiny_model("llama"), plan=plan)
    assert plan.allocation["bytes"] == stored(model, plan) <= plan.allocation["budget_bytes"]
    assert quantized is not None


def test_missing_settings_are_measured_with_the_weights(analyzed, model):
    measured = allocate(analyzed, avg_bits=6, weights=model, group_sizes=[12])
    assumed = allocate(analyzed, avg_bits=6, group_sizes=[12])
    assert measured.allocation["error_energies"] == assumed.allocation["error_energies"] == "measured"
    assert measured.allocation["predicted_loss_change"] != assumed.allocation["predicted_loss_change"]
    other = allocate(analyzed, avg_bits=5, weights=model, method="hqq", outlier_fractions=[0, 0.02], group_sizes=[16])
    assert {entry.method for _, entry in other} == {"hqq"}
    assert other.allocation["bytes"] == stored(model, other)


def test_a_folder_is_as_good_as_the_model(folder, model):
    for strategy in ("uniform", "mxq", "kurtboost"):
        loaded = allocate(model, strategy=strategy, avg_bits=4.6)
        streamed = allocate(folder / "model", strategy=strategy, avg_bits=4.6)
        assert streamed == loaded


@pytest.mark.parametrize("layout", ["llama-tied", "gpt2", "qwen2-moe"])
def test_folders_of_other_layouts(layout, tmp_path):
    there = tiny_model(layout)
    there.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source, loaded = Source.of(tmp_path), Source.of(there)
    assert [(m.name, m.rows, m.columns) for m in source.matrices] == [
        (m.name, m.rows, m.columns) for m in loaded.matrices
    ]
    for m in source.matrices:
        assert torch.equal(source.weight(m.name), loaded.weight(m.name))


def test_weights_under_other_names_are_loaded_as_a_whole(tmp_path, caplog):
    there = tiny_model("llama-tied")
    there.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    source = Source.of(tmp_path)
    assert "the whole model is loaded" in caplog.text
    assert len(source.matrices) == 14
    assert torch.equal(source.weight(source.matrices[0].name), models.find_linears(there)[0].weight)


def test_mxq_of_a_model_beats_uniform_in_what_it_minimises(model):
    def norms(plan):
        total = 0.0
        for linear in models.find_linears(model):
            image = quantize_matrix("w", linear.weight, plan.entries[linear.name]).dequantize("float32")
            total += math.sqrt(float((image - linear.weight).double().square().sum()))
        return total

    plan = allocate(model, strategy="mxq", avg_bits=4.6)
    uniform = allocate(model, strategy="uniform", avg_bits=4.6, method="hqq", meta_bits=8, bits=(2, 3, 4, 8))
    assert plan.allocation["objective"] == pytest.approx(norms(plan), rel=1e-6)
    assert norms(plan) < norms(uniform)
    assert plan.allocation["nominal_bits_per_weight"] < 4.6
    assert {(e.method, e.meta_bits) for _, e in plan} == {("hqq", 8)}


def boosted_model():
    """Enough layers for something to be conspicuous; one q_proj has heavy tails."""
    config = tiny_model("llama").config
    config.num_hidden_layers = 24
    torch.manual_seed(0)
    model = type(tiny_model("llama"))(config)
    model.model.layers[5].self_attn.q_proj.weight.data[0, 0] = 1.0
    return model


def test_kurtboost_of_a_model():
    model = boosted_model()
    plan = allocate(model, strategy="kurtboost", avg_bits=3.25, stops=3)
    assert plan.allocation["setting"] == "b3g64"
    assert plan.allocation["boosted"] == "b4g64"
    assert set(plan.allocation["flagged"]["self_attn.q_proj"]) == {5, 6}
    for name, entry in plan:
        role = name.split(".", 3)[3]
        flagged = int(name.split(".")[2]) in plan.allocation["flagged"].get(role, [])
        assert entry.setting == ("b4g64" if flagged else "b3g64")
        assert ("stands out" in entry.reason) == flagged
    one = allocate(model, strategy="kurtboost", avg_bits=3.25, stops=3, top_m=1)
    assert len(one.allocation["flagged"]["self_attn.q_proj"]) == 1


def test_sensiboost_of_a_model():
    model = boosted_model()
    names = [linear.name for linear in models.find_linears(model)]
    scores = {name: 1.0 + 0.1 * (int(name.split(".")[2]) % 3) for name in names}
    scores["model.layers.7.mlp.down_proj"] = 99.0
    plan = allocate(
        model, strategy="sensiboost", avg_bits=2.3, sensitivity=scores, meta_bits=None, bits=[2, 3], stops=9
    )
    downs = np.array([scores[name] for name in names if name.endswith("down_proj")])
    assert plan.allocation["flagged"] == {"mlp.down_proj": conspicuous(downs, ratio=True)}
    assert plan.allocation["setting"] == "b2g128"
    assert plan.allocation["boosted"] == "b3g32"
    assert 7 in plan.allocation["flagged"]["mlp.down_proj"]


# Validation


def test_predictions_are_compared_with_measurements():
    model = tiny_model("llama")
    for linear in models.find_linears(model):
        linear.parameter.data *= 5  # so that the loss bends
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = analyze(model, TOKENS, metrics=["pqi"], bits=[2, 3, 4], group_size=16, nodes=4)
    uniform = [allocate(found, strategy="uniform", avg_bits=32, bits=[b], group_sizes=[16]) for b in (2, 4)]
    measured = measured_loss_changes(model, TOKENS, uniform)
    proofs = {proof.setting: proof.measured_loss_change for proof in found.proofs}
    assert measured == pytest.approx([proofs["b2g16"], proofs["b4g16"]])
    plans = random_plans(found, 4, seed=3)
    assert plans == random_plans(found, 4, seed=3) != random_plans(found, 4, seed=4)
    assert {entry.bits for plan in plans for _, entry in plan} == {2, 3, 4}
    validation = validate(model, TOKENS, found, count=4, seed=3)
    assert validation.predicted == tuple(plan.predicted_loss_change for plan in plans)
    assert validation.measured == tuple(measured_loss_changes(model, TOKENS, plans))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    about = validation.to_json()
    assert about["plans"] == 4
    with pytest.raises(InvalidArgumentError, match=r"\[random_plans\] count must be at least 1: got 0"):
        random_plans(found, 0)
    with pytest.raises(InvalidArgumentError, match="is no quantizable matrix of this model"):
        measured_loss_changes(model, TOKENS, [Plan({"a": PlanEntry(3)})])


def test_figures_of_a_validation():
    found = Validation((1.0, 2.0, 3.0, 4.0), (1.1, 2.0, 4.0, 3.9))
    assert found.spearman == pytest.approx(0.8)
    assert found.median_relative_error == pytest.approx((0.1 / 1.1 + 0.1 / 3.9) / 2)
    assert math.isnan(Validation((1.0,), (1.0,)).spearman)


# Activation sensitivity


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_activation_sensitivity_is_measured_part_by_part(layout):
    model = tiny_model(layout)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = activation_sensitivity(model, TOKENS, bits=2, group_size=16, batch_size=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    linears = models.find_linears(model)
    assert list(sorted(found)) == sorted(linear.name for linear in linears)
    assert all(score > 0 for score in found.values())

    def measured(part, module):
        """Inputs and outputs of the original once, then the same inputs with a quantized part."""
        calls = []
        hook = module.register_forward_hook(lambda m, a, k, out: calls.append((a, k, out)), with_kwargs=True)
        with torch.no_grad():
            model(TOKENS, use_cache=False)
        hook.remove()
        (arguments, named, output) = calls[0]
        for name in part:
            linear = linears.find(name)
            entry = PlanEntry(2, 16, method="hqq")
            image = quantize_matrix(name, linear.weight.contiguous(), entry).dequantize("float32")
            linear.weight.copy_(image)
        with torch.no_grad():
            again = module(*arguments, **named)
        model.load_state_dict(before)
        first, second = (x[0] if isinstance(x, tuple) else x for x in (output, again))
        return float((first - second).double().square().mean())

    if layout == "gpt2":
        for name in ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj"):
            assert found[name] == pytest.approx(measured([name], model.get_submodule(name)), rel=1e-4)
        return
    attention, mlp = "model.layers.1.self_attn", "model.layers.0.mlp"
    qkv = [f"{attention}.{x}_proj" for x in "qkv"]
    expected = measured(qkv, model.get_submodule(attention))
    assert [found[name] for name in qkv] == pytest.approx([expected] * 3, rel=1e-4)
    assert found[f"{attention}.o_proj"] == found[qkv[0]]  # grouped queries: v is smaller than o
    expected = measured([f"{mlp}.gate_proj", f"{mlp}.up_proj"], model.get_submodule(mlp))
    assert found[f"{mlp}.gate_proj"] == found[f"{mlp}.up_proj"] == pytest.approx(expected, rel=1e-4)
    down = f"{mlp}.down_proj"
    assert found[down] == pytest.approx(measured([down], model.get_submodule(down)), rel=1e-4)


def test_the_output_projection_has_a_score_of_its_own_where_v_has_its_shape():
    model = tiny_model("phi")
    found = activation_sensitivity(model, TOKENS, bits=2, group_size=16)
    assert len({round(math.log(score), 6) for name, score in found.items() if ".0." in name}) == 4
    config = tiny_model("llama").config
    config.num_key_value_heads = 4
    full = activation_sensitivity(type(tiny_model("llama"))(config), TOKENS, bits=2, group_size=16)
    attention = "model.layers.0.self_attn"
    assert full[f"{attention}.o_proj"] != full[f"{attention}.q_proj"]


def test_uniform_takes_the_setting_that_just_fits_as_stored():
    model = tiny_model("llama")
    for linear in models.find_linears(model):
        linear.weight.mul_(1000)  # float16 holds the scales of their scales
    plan = allocate(model, strategy="uniform", avg_bits=9, bits=(4,), group_sizes=(16,), meta_bits=8)
    size = stored(model, plan)
    shapes = [(m.rows, m.columns, m.dtype) for m in Source.of(model).matrices]
    of_shape = sum(stored_bytes(rows, columns, PlanEntry(4, 16, meta_bits=8), dtype) for rows, columns, dtype in shapes)
    assert size < of_shape
    wishes = {"strategy": "uniform", "bits": (2, 4), "group_sizes": (16,), "meta_bits": 8}
    assert allocate(model, target_bytes=size, **wishes).allocation["setting"] == "b4g16"
    assert allocate(model, target_bytes=size - 1, **wishes).allocation["setting"] == "b2g16"


def test_a_source_remembers_what_it_measured(model, monkeypatch):
    import quantrature.analysis.errors as errors

    quantized = []
    true = errors.quantize_matrix
    monkeypatch.setattr(
        errors,
        "quantize_matrix",
        lambda name, w, entry, **given: (quantized.append((name, entry)), true(name, w, entry))[1],
    )
    source = Source.of(model)
    plans = [allocate(source, strategy="mxq", avg_bits=b, bits=(2, 3), group_sizes=(16,)) for b in (4, 4.2)]
    assert len(quantized) == len(set(quantized)) == 2 * len(plans[0])
    allocate(source, strategy="mxq", avg_bits=4.2, bits=(2, 3), group_sizes=(16,), method="mse")
    assert len(quantized) == len(set(quantized)) == 4 * len(plans[0])
    assert plans[1] == allocate(model, strategy="mxq", avg_bits=4.2, bits=(2, 3), group_sizes=(16,))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "pqi"}, "strategy pqi needs an analysis with the metric pqi: got none for model.layers.0.self"),
        ({"strategy": "sensiboost"}, "sensiboost needs the activation sensitivity of every matrix: got none for model"),
        (
            {"strategy": "sensiboost", "sensitivity": {f"model.layers.0.self_attn.{x}_proj": 0.0 for x in "qkvo"}},
            "must be above 0, because ratios are computed: got 0.0 for model.layers.0.self_attn.q_proj",
        ),
        ({"strategy": "kurtboost", "pin": {"model": 4}}, "kurtboost supports no groups and no constraint except skip"),
        ({"strategy": "kurtboost", "stops": -1}, "must be at least 0: got stops=-1, top_m=0"),
        (
            {"strategy": "kurtboost", "avg_bits": 2},
            "kurtboost needs a budget of at least 2.13 bits per weight: got 2.0000",
        ),
        ({"strategy": "uniform", "meta_bits": "few"}, "meta_bits must be None or 1 to 8: got 'few'"),
    ],
)
def test_what_a_model_cannot_give_is_refused(model, arguments, message):
    with pytest.raises(InvalidArgumentError) as refused:
        allocate(model, **{"avg_bits": 4, **arguments})
    assert message in str(refused.value)


def test_what_an_analysis_cannot_give_is_refused(analyzed, model):
    import dataclasses

    bare = [dataclasses.replace(m, scores={}, error={}) for m in analyzed.matrices]
    bare = dataclasses.replace(analyzed, matrices=tuple(bare))
    with pytest.raises(InvalidArgumentError, match="kurtboost needs the weights, or an analysis with the metric"):
        allocate(bare, strategy="kurtboost", avg_bits=4)
    with pytest.raises(InvalidArgumentError, match=r"mxq needs the weights, or an analysis .* got nothing for model"):
        allocate(bare, strategy="mxq", avg_bits=4)
    with pytest.raises(InvalidArgumentError, match=r"the weights must be those of the model .* got None for model"):
        allocate(analyzed, avg_bits=4, weights=tiny_model("gpt2"))
    with pytest.raises(InvalidArgumentError, match="an analysis, a model or a folder with one: got int"):
        allocate(3, avg_bits=4)


def test_broken_folders_are_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "model", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(QuantratureError, match=r"model.safetensors is truncated or corrupted"):
        allocate(tmp_path / "cut", strategy="uniform", avg_bits=4)
    shutil.copytree(folder / "model", tmp_path / "bad")
    (tmp_path / "bad/model.safetensors").unlink()
    (tmp_path / "bad/model.safetensors.index.json").write_text("{")
    with pytest.raises(QuantratureError, match=r"index.json is not a valid index of shards"):
        allocate(tmp_path / "bad", strategy="uniform", avg_bits=4)
    tiny_model("llama").double().save_pretrained(tmp_path / "double")
    with pytest.raises(InvalidArgumentError, match=r"q_proj.weight must be float32, float16 or bfloat16: got F64"):
        allocate(tmp_path / "double", strategy="uniform", avg_bits=4)


def test_activation_sensitivity_refuses(model):
    with pytest.raises(InvalidArgumentError, match="batch_size must be at least 1: got 0"):
        activation_sensitivity(model, TOKENS, batch_size=0)


# The verb


def run(capfd, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def run_json(capfd, *arguments):
    status, out, err = run(capfd, *arguments, "--json")
    assert (status, err) == (0, ""), err
    return json.loads(out)


def test_plan_by_pqi_from_a_model(capfd, folder, tmp_path):
    text = ("--calibration", folder / "text.txt", "--nsamples", 2, "--seqlen", 32, "--nodes", 2)
    more = ("-o", tmp_path / "plan.json", "--validate", 3)
    found = run_json(capfd, "plan", folder / "model", "--avg-bits", 4.5, *text, *more)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.to_json() == found
    assert found["allocation"]["strategy"] == "pqi"
    assert found["allocation"]["validation"]["plans"] == 3
    assert len(found["allocation"]["validation"]["measured"]) == 3
    assert found["allocation"]["bits_per_weight"] <= 4.5
    assert set(found["allocation"]["floored"]) == {"b2g64", "b3g64", "b4g64"}
    status, _, err = run(capfd, "quantize", folder / "model", "--plan", tmp_path / "plan.json", "-o", tmp_path / "q")
    assert (status, err) == (0, "")


def test_plan_from_an_analysis(capfd, folder, tmp_path, analyzed):
    analyzed.save(tmp_path / "sens")
    constraints = (
        "--pin",
        "re:.*down_proj=b8g16",
        "--min-bits",
        "re:.*o_proj=5",
        "--max-bits",
        "model.layers.0.mlp.up_proj=2",
    )
    choice = (
        "--bits",
        "2,3,4,5,8",
        "--group-sizes",
        "16,32",
        "--outlier-fractions",
        "0,0.0001",
        "--weights",
        folder / "model",
    )
    arguments = ("plan", tmp_path / "sens", "--target-size", "30kB", *constraints, *choice, "--groups", "none")
    found = run_json(capfd, *arguments, "--skip", "model.layers.1.mlp.up_proj")
    entries = found["entries"]
    assert found["allocation"]["budget_bytes"] == 30_000 >= found["allocation"]["bytes"]
    assert entries["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert entries["model.layers.0.self_attn.o_proj"]["bits"] >= 5
    assert entries["model.layers.0.mlp.up_proj"]["bits"] == 2
    assert entries["model.layers.1.mlp.up_proj"]["bits"] == 16
    status, out, err = run(capfd, "plan", tmp_path / "sens", "--avg-bits", 5, "-o", tmp_path / "plan.json")
    assert (status, err) == (0, "")
    for words in ("pqi, quantized by rtn", "bits per weight", "predicted loss change", "written to"):
        assert words in " ".join(out.split())


@pytest.mark.parametrize("strategy", ["uniform", "mxq", "kurtboost", "sensiboost"])
def test_plan_by_other_strategies(capfd, folder, strategy):
    more = ("--calibration", folder / "text.txt", "--nsamples", 2) if strategy == "sensiboost" else ()
    found = run_json(capfd, "plan", folder / "model", "--strategy", strategy, "--avg-bits", 4.6, *more)
    assert found["allocation"]["strategy"] == strategy
    assert len(found["entries"]) == 14
    plain = run_json(
        capfd, "plan", folder / "model", "--strategy", strategy, "--avg-bits", 6.6, "--meta-bits", 0, *more
    )
    assert {entry["meta_bits"] for entry in plain["entries"].values()} == {None}


def test_plan_of_a_table(capfd, tmp_path):
    header = "layer,module,nbit1,gsize1,nbit2,gsize2,fnorm,params,kurtosis,sensitivity"
    rows = [f"{i},a,{b},64,8,128,{2.0**-b},1024,{3 + i},1" for i in range(3) for b in (2, 3, 4)]
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]))
    for strategy in ("mxq", "kurtboost", "sensiboost"):
        found = run_json(capfd, "plan", "--table", tmp_path / "t.csv", "--strategy", strategy, "--avg-bits", 3.3)
        assert found["bits_per_weight"] <= 3.3
        assert found["memory_mib"] <= found["budget_mib"]
        assert set(found["allocation"][0]) == {"layer", "module", "bits", "group_size"}
        assert len(found["allocation"]) == 3
        assert found["objective"] == pytest.approx(3 / 8)
    status, out, _ = run(capfd, "plan", "--table", tmp_path / "t.csv", "--strategy", "mxq", "--avg-bits", 3.3)
    assert status == 0
    assert "objective" in out


def test_plan_of_the_published_table(capfd, shared):
    path = shared / "oracles/fnorm-Llama-2-7b-hf.csv"
    found = run_json(capfd, "plan", "--table", path, "--strategy", "mxq", "--avg-bits", 3.25)
    assert found["objective"] == pytest.approx(4195.6015625, rel=1e-4)
    assert found["memory_mib"] <= 2509.0


def test_dry_runs(capfd, folder, tmp_path, analyzed):
    found = run_json(capfd, "plan", folder / "model", "--strategy", "mxq", "--avg-bits", 4, "--dry-run")
    assert found["matrices"] == 14
    assert found["settings"] == 12
    assert found["memory_bytes"] > 0
    assert found == {**estimate(folder / "model", strategy="mxq"), "seconds": found["seconds"]}
    text = ("--calibration", folder / "text.txt", "--nsamples", 2, "--seqlen", 32)
    pqi = run_json(capfd, "plan", folder / "model", "--avg-bits", 4, "--dry-run", *text)
    assert pqi["memory_bytes"] > found["memory_bytes"]
    analyzed.save(tmp_path / "sens")
    assert run_json(capfd, "plan", tmp_path / "sens", "--avg-bits", 4, "--dry-run")["memory_bytes"] == 0
    status, out, _ = run(capfd, "plan", folder / "model", "--strategy", "mxq", "--avg-bits", 4, "--dry-run")
    assert status == 0
    assert "memory bytes" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either MODEL (a model, or an analysis of a model) or --table"),
        (["MODEL", "--table", "t.csv"], "give either MODEL (a model, or an analysis of a model) or --table"),
        (["MODEL", "--avg-bits", "4", "--strategy", "best"], "--strategy must be one of uniform, mxq, "),
        (["MODEL", "--avg-bits", "4", "--method", "pqi"], "use --strategy pqi"),
        (
            ["MODEL", "--avg-bits", "4", "--strategy", "mxq", "--validate", "2"],
            "--validate needs --strategy pqi and a model",
        ),
        (["MODEL"], "give either --avg-bits or --target-size"),
        (["MODEL", "--avg-bits", "4", "--target-size", "4"], "give either --avg-bits or"),
        (
            ["MODEL", "--target-size", "4 apples"],
            "--target-size must be a size such as 4.2GiB or 900MB: got '4 apples'",
        ),
        (["MODEL", "--target-size", "1.2.3MB"], "--target-size must be a size such as"),
        (["MODEL", "--avg-bits", "4"], "--calibration must name the text that pqi needs"),
        (["MODEL", "--avg-bits", "4", "--strategy", "sensiboost"], "--calibration must name the text that sensiboost"),
        (["MODEL", "--avg-bits", "4", "--outlier-fractions", "0,5"], "--outlier-fractions must be a fraction between"),
        (["MODEL", "--avg-bits", "4", "--bits", "2,x"], "--bits must be numbers separated by commas: got '2,x'"),
        (["MODEL", "--avg-bits", "4", "--pin", "a"], "--pin must be MATRIX=VALUE: got 'a'"),
        (["MODEL", "--avg-bits", "4", "--min-bits", "a=b"], "--min-bits must be MATRIX=BITS: got 'b' for the bits"),
        (
            ["SENS", "--avg-bits", "4", "--strategy", "sensiboost"],
            "sensiboost runs the model: give the model, not",
        ),
        (["SENS", "--avg-bits", "1"], "avg_bits must be at least 2.9"),
        (["SENS", "--avg-bits", "5", "-o", "/nowhere/plan.json"], "cannot write /nowhere/plan.json: No such file"),
        (["--table", "t.csv", "--avg-bits", "4"], "--strategy must be mxq, sensiboost or kurtboost: got pqi"),
        (
            ["--table", "t.csv", "--target-size", "4GB", "--strategy", "mxq"],
            "with --table, the budget must be given as --avg-bits",
        ),
        (["--table", "t.csv", "--avg-bits", "4", "--strategy", "mxq"], "cannot read t.csv: No such file"),
    ],
)
def test_a_failure_is_one_line(capfd, folder, analyzed, tmp_path, arguments, message):
    if "SENS" in arguments:
        analyzed.save(tmp_path / "sens")
    places = {"MODEL": folder / "model", "SENS": tmp_path / "sens"}
    status, out, err = run(capfd, "plan", *(places.get(argument, argument) for argument in arguments), "--json")
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
