"""ReQuant: budgets, what is restored and what is not, the record, and the ablation of the paper on a trained model."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry, QuantratureError, checkpoint, models, ops
from quantrature.methods import quantize_matrix
from quantrature.models.folding import narrowest
from quantrature.nn import quantized_layers
from quantrature.requantization import Requantization
from quantrature.requantization.outliers import greedy_split, split
from sharp_models import TOKENS, loss, sharp_model
from tiny_models import byte_tokenizer, tiny_model

HOST = {"bits": 2, "group_size": 16}
QUICK = {**HOST, "nodes": 2, "batch_size": 4}


def weights_of(model):
    return {linear.name: linear.weight.clone() for linear in models.find_linears(model)}


def kept_places(model):
    return {
        name: set(layer.matrix.outliers.positions().tolist()) if layer.matrix.outliers is not None else set()
        for name, layer in quantized_layers(model).items()
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.floats(0, 1e-3, allow_subnormal=True)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 1),
    st.sampled_from([math.inf, 2.0, 1.0, 0.3, 0.01]),
    st.floats(0.01, 1),
)
def test_a_split_meets_its_budget_and_no_matrix_goes_beyond_the_largest_share(matrices, filling, temperature, largest):
    sizes, pqi = zip(*matrices, strict=True)
    room = sum(math.floor(largest * size) for size in sizes)
    budget = math.floor(filling * room)
    found = split(budget, sizes, pqi, temperature, largest)
    assert sum(found) == budget
    assert all(0 <= count <= largest * size for count, size in zip(found, sizes, strict=True))


def test_the_temperature_says_how_much_mean_pqi_counts():
    sizes, pqi = [1000, 1000, 2000], [1.0, 4.0, 2.0]
    assert split(80, sizes, pqi, math.inf, 1.0) == [20, 20, 40]
    assert split(90, sizes, pqi, 1.0, 1.0) == [10, 40, 40]
    assert split(75, sizes, pqi, 0.5, 1.0) == [3, 48, 24]
    assert split(90, sizes, pqi, 1.0, 0.03) == [12, 30, 48]  # ten too many for the second go to the others
    assert split(7, [10, 10], [0.0, 0.0], 1.0, 1.0) == [4, 3]
    with pytest.raises(InvalidArgumentError, match="because max_outlier_fraction limits each matrix: got 5"):
        split(5, [10, 10], [1.0, 1.0], 1.0, 0.2)


def test_the_greedy_split_goes_where_pqi_falls_most():
    errors = [{0: 10.0, 10: 9.0, 50: 8.9}, {0: 10.0, 10: 5.0, 50: 4.0}, {0: 1.0, 10: 1.0, 50: 2.0}]
    assert greedy_split(10, [1000] * 3, [1.0, 1.0, 1.0], errors, 0.05) == [0, 10, 0]
    assert greedy_split(20, [1000] * 3, [1.0, 1.0, 1.0], errors, 0.05) == [10, 10, 0]
    assert greedy_split(20, [1000] * 3, [1.0, 0.01, 1.0], errors, 0.05) == [10, 10, 0]
    assert greedy_split(70, [1000] * 3, [1.0, 1.0, 1.0], errors, 0.05) == [20, 50, 0]
    assert sum(greedy_split(149, [1000] * 3, [1.0, 1.0, 1.0], errors, 0.05)) == 149


@pytest.mark.parametrize("layout", ["llama", "gpt2", "llama-tied"])
@pytest.mark.parametrize("selection", ["temperature", "greedy"])
def test_what_is_kept_and_what_is_not(layout, selection):
    model = sharp_model(layout)
    original, before = weights_of(model), float(loss(model).detach())
    returned, record = qtr.requant(
        model, TOKENS, **{**QUICK, "nodes": 6}, outlier_fraction=0.02, significant_fraction=0.01, selection=selection
    )
    assert returned is model
    total = sum(w.numel() for w in original.values())
    assert (record.outliers, record.significant) == (round(0.02 * total), round(0.01 * total))
    kept = kept_places(model)
    for matrix in record.matrices:
        assert len(kept[matrix.name]) == matrix.outliers + matrix.significant
        assert matrix.outliers <= 0.05 * matrix.weights
        weight, image = original[matrix.name].flatten(), quantized_layers(model)[matrix.name].dequantize().flatten()
        places = sorted(kept[matrix.name])
        assert torch.equal(image[places], weight[places])
        # The outliers are the largest, and the grid is fitted to what they leave.
        largest = ops.topk(weight.contiguous(), matrix.outliers)[1]
        assert set(largest.tolist()) <= kept[matrix.name]
        expected = quantize_matrix(matrix.name, original[matrix.name].contiguous(), PlanEntry(2, 16), largest)
        elsewhere = torch.ones(len(weight), dtype=torch.bool)
        elsewhere[places] = False
        assert torch.equal(image[elsewhere], expected.dequantize("float32").flatten()[elsewhere])
    assert [stage.name for stage in record.stages] == ["quantized", "outliers", "detach 1", "detach 2"]
    first = record.outliers
    assert [stage.kept for stage in record.stages] == [
        0,
        first,
        first + record.significant // 2,
        first + record.significant,
    ]
    assert record.measured_loss_change == pytest.approx(float(loss(model).detach()) - before, abs=2e-5)
    for stage in record.stages:
        assert stage.predicted_loss_change == pytest.approx(stage.measured_loss_change, rel=0.02, abs=2e-5)
    assert record.gradient_evaluations == 24
    assert sum(m.predicted_loss_change for m in record.matrices) == pytest.approx(record.predicted_loss_change)


def test_the_best_temperature_is_taken():
    model = sharp_model()
    _, record = qtr.requant(
        model, TOKENS, **QUICK, outlier_fraction=0.02, significant_fraction=0.0, temperatures=(math.inf, 1.0, 0.5)
    )
    best = min(record.trials, key=lambda trial: trial.measured_loss_change)
    assert [trial.temperature for trial in record.trials] == [math.inf, 1.0, 0.5]
    assert len({trial.measured_loss_change for trial in record.trials}) == 3
    assert record.temperature == best.temperature
    assert record.measured_loss_change == pytest.approx(best.measured_loss_change, abs=1e-6)
    assert [stage.name for stage in record.stages] == ["quantized", "outliers"]


def test_one_step_restores_what_an_analysis_ranks_first():
    found = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], **QUICK)
    model = sharp_model()
    _, record = qtr.requant(model, TOKENS, **QUICK, outlier_fraction=0.0, significant_fraction=0.01, steps=1)
    ranked = ops.topk([found.maps["pqi"][m.name] for m in record.matrices], record.significant, key="value")
    assert kept_places(model) == {
        m.name: set(places.tolist()) for m, (_, places) in zip(record.matrices, ranked, strict=True)
    }
    assert record.temperature is None
    assert record.trials == ()


def test_every_step_integrates_anew():
    model = sharp_model()
    qtr.requant(model, TOKENS, **QUICK, outlier_fraction=0.0, significant_fraction=0.04, steps=1)
    one = kept_places(model)
    model = sharp_model()
    _, thrice = qtr.requant(model, TOKENS, **QUICK, outlier_fraction=0.0, significant_fraction=0.04, steps=3)
    three = kept_places(model)
    assert one != three
    assert sum(map(len, one.values())) == sum(map(len, three.values())) == thrice.significant
    assert len(thrice.stages) == 4
    assert thrice.measured_loss_change < thrice.stages[0].measured_loss_change


def test_everything_can_be_kept():
    model = sharp_model()
    original = weights_of(model)
    _, record = qtr.requant(model, TOKENS, **QUICK, outlier_fraction=0.02, significant_fraction=0.98, prove=False)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.dequantize(), original[name])
    assert record.measured_loss_change == 0
    assert record.predicted_loss_change is None
    assert record.matrices[0].predicted_loss_change is None


def test_a_plan_may_differ_between_matrices_and_leave_some():
    model = sharp_model()
    names = [linear.name for linear in models.find_linears(model)]
    plan = Plan.uniform(names, PlanEntry(2, 16, method="hqq")).replace(names[0], bits=16).replace(names[1], bits=4)
    _, record = qtr.requant(model, TOKENS, plan=plan, outlier_fraction=0.02, significant_fraction=0.01, nodes=2)
    layers = quantized_layers(model)
    assert names[0] not in layers
    assert [m.name for m in record.matrices] == names[1:]
    assert layers[names[1]].spec.dense.bits == 4
    assert record.settings["grids"] == ["b4g16", "b2g16"]


def test_kept_weights_take_16_bits_where_that_loses_nothing():
    assert narrowest(torch.tensor([[1.0, 2.5]])).dtype == torch.bfloat16
    assert narrowest(torch.tensor([[1.0, 1.0009765625]])).dtype == torch.float16
    assert narrowest(torch.tensor([[1.0, 1e-9, 1.0009765625]])).dtype == torch.float32
    assert narrowest(torch.tensor([[1.0]], dtype=torch.float16)).dtype == torch.float16
    for convert, size in ((lambda m: m.bfloat16().float(), 4), (lambda m: m, 6)):
        model = convert(sharp_model())
        _, record = qtr.requant(model, TOKENS, **QUICK, outlier_fraction=0.02, significant_fraction=0.01)
        offsets = sum(2 * (layer.out_features + 1) for layer in quantized_layers(model).values() if layer.spec.outliers)
        assert record.nbytes - record.grid_nbytes == size * (record.outliers + record.significant) + offsets
        assert record.nbytes == sum(layer.spec.nbytes for layer in quantized_layers(model).values())
        kept = (record.outliers + record.significant) / record.weights
        assert record.paper_bits_per_weight == pytest.approx(2 + 32 / 16 + 48 * kept)
        assert record.bits_per_weight == 8 * record.nbytes / record.weights


def test_a_result_survives_its_folder(tmp_path):
    model = sharp_model()
    _, record = qtr.requant(model, TOKENS, **QUICK, outlier_fraction=0.02, significant_fraction=0.01)
    checkpoint.save(model, tmp_path / "out", requant=record)
    assert Requantization.load(tmp_path / "out" / "requant.json") == record
    loaded = models.load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert json.loads((tmp_path / "out" / "requant.json").read_text())["trials"][0]["temperature"] == "infinite"


def test_broken_records_are_named(tmp_path):
    path = tmp_path / "requant.json"
    for content, complaint in (
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is not of the format"),
        ('{"format": "quantrature-requant", "format_version": 1}', "json: (model|modules) is missing"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InvalidArgumentError, match=complaint):
            Requantization.load(path)


def test_a_failure_leaves_the_model_as_it_was():
    model = sharp_model()
    before = weights_of(model)
    handle = model.model.layers[1].mlp.up_proj.register_full_backward_pre_hook(lambda m, g: (g[0] * math.inf,))
    with pytest.raises(QuantratureError, match="is not finite at node"):
        qtr.requant(model, TOKENS, **QUICK)
    handle.remove()
    assert not quantized_layers(model)
    for linear in models.find_linears(model):
        assert torch.equal(linear.weight, before[linear.name])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"outlier_fraction": -1}, "outlier_fraction must be a fraction between 0 and 1: got outlier_fraction=-1"),
        ({"significant_fraction": 1.01}, "significant_fraction must be a fraction between"),
        ({"max_outlier_fraction": 5.0}, "max_outlier_fraction must be a fraction between"),
        ({"outlier_fraction": 0.6, "significant_fraction": 0.5}, "at most 1 together: got 1.1"),
        ({"outlier_fraction": 0, "significant_fraction": 0}, "must not both be 0"),
        ({"outlier_fraction": 0.06}, "because max_outlier_fraction limits each matrix"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"selection": "magic"}, "selection must be one of temperature, greedy"),
        ({"temperatures": (1.0, 0.0)}, "temperatures must be at least one number above 0"),
        ({"temperatures": ()}, "temperatures must be at least one number above 0"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"bits": None}, "give either bits or plan"),
        (
            {"bits": None, "plan": {"outlier_fraction": 0.1}},
            "outlier_fraction must be 0 in the plan's entries: got more for 'model",
        ),
        ({"bits": None, "plan": {"bits": 16}}, "the plan must quantize at least one matrix"),
    ],
)
def test_bad_arguments(arguments, complaint):
    model = sharp_model()
    if "plan" in arguments:
        names = [linear.name for linear in models.find_linears(model)]
        entry = PlanEntry(**{"bits": 2, **arguments["plan"]})
        arguments = arguments | {"plan": Plan.uniform(names, entry), "group_size": 64}
    with pytest.raises(InvalidArgumentError, match=complaint):
        qtr.requant(model, TOKENS, **{**HOST, **arguments})
    with pytest.raises(InvalidArgumentError, match=r"^\[requant\] "):
        qtr.requant(model, TOKENS, **{**HOST, **arguments})
    assert not quantized_layers(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and two quantized copies, with and without outliers."""
    root = tmp_path_factory.mktemp("requant")
    sharp_model().save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    for name, share in (("plain", 0.0), ("kept", 0.01)):
        checkpoint.save(
            qtr.quantize(sharp_model(), **HOST, outlier_fraction=share), root / name, tokenizer=byte_tokenizer()
        )
    return root


@pytest.mark.parametrize("host", ["plain", "kept"])
def test_a_folder_is_improved_within_its_budget(folders, tmp_path, host):
    before = checkpoint.inspect(folders / host)
    host_model = models.load_model(folders / host)
    record = qtr.requant_folder(
        folders / host,
        folders / "source",
        TOKENS,
        target_bytes=before.bytes + 3000,
        output=tmp_path / "out",
        nodes=2,
    )
    found = checkpoint.inspect(tmp_path / "out")
    assert before.bytes < found.bytes == record.nbytes <= before.bytes + 3000
    rows = sum(layer.out_features + 1 for layer in quantized_layers(host_model).values())
    room = 3000 - (2 * rows if host == "plain" else 0)  # row offsets, and 6 bytes a weight
    assert record.significant == room // 6
    assert record.measured_loss_change < record.stages[0].measured_loss_change
    improved = models.load_model(tmp_path / "out")
    earlier, places = kept_places(host_model), kept_places(improved)
    source = weights_of(models.load_model(folders / "source"))
    for matrix in record.matrices:
        name = matrix.name
        assert earlier[name] <= places[name]
        assert (len(earlier[name]), len(places[name])) == (matrix.outliers, matrix.outliers + matrix.significant)
        layer, old = quantized_layers(improved)[name], quantized_layers(host_model)[name]
        assert layer.intact
        assert torch.equal(layer.codes, old.codes)
        image, expected = layer.dequantize(), old.dequantize()
        expected.view(-1)[sorted(places[name])] = source[name].flatten()[sorted(places[name])]
        assert torch.equal(image, expected)


def test_quantized_experts_of_a_folder_stay_as_they_are(tmp_path, caplog):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    checkpoint.save(qtr.quantize(tiny_model("mixtral"), **HOST, embedding_bits=8), tmp_path / "host")
    text = {"nodes": 2, "steps": 1, "prove": False}
    record = qtr.requant_folder(
        tmp_path / "host", tmp_path / "source", TOKENS, significant_fraction=0.01, output=tmp_path / "out", **text
    )
    assert "12 matrices of fused experts stay as they are" in caplog.text
    assert {matrix.name for matrix in record.matrices} == {
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"
    }
    host, improved = (quantized_layers(models.load_model(tmp_path / name)) for name in ("host", "out"))
    assert set(host) == set(improved)
    for name, layer in improved.items():
        assert layer.intact
        assert "self_attn" in name or layer.spec == host[name].spec
    assert sum(layer.spec.outliers for layer in improved.values()) == record.significant > 0
    checkpoint.save(qtr.quantize(tiny_model("mixtral"), **HOST, ignore="re:.*self_attn"), tmp_path / "experts")
    with pytest.raises(InvalidArgumentError, match="must have a quantized matrix that is not a fused expert"):
        qtr.requant_folder(
            tmp_path / "experts",
            tmp_path / "source",
            TOKENS,
            significant_fraction=0.01,
            output=tmp_path / "never",
            **text,
        )


def test_a_folder_is_improved_in_place(folders, tmp_path):
    checkpoint.save(qtr.quantize(sharp_model(), **HOST), tmp_path / "out", tokenizer=byte_tokenizer())
    with pytest.raises(InvalidArgumentError, match="or overwrite set to replace"):
        qtr.requant_folder(tmp_path / "out", folders / "source", TOKENS, significant_fraction=0.01)
    record = qtr.requant_folder(
        tmp_path / "out",
        folders / "source",
        TOKENS,
        significant_fraction=0.01,
        overwrite=True,
        nodes=2,
        steps=1,
        prove=False,
    )
    assert Requantization.load(tmp_path / "out" / "requant.json") == record
    assert record.significant == round(0.01 * record.weights)
    assert sum(map(len, kept_places(models.load_model(tmp_path / "out")).values())) == record.significant


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "exactly one of significant_fraction, avg_bits and target_bytes"),
        (
            {"significant_fraction": 0.01, "avg_bits": 3.0},
            "exactly one of significant_fraction, avg_bits and target_bytes",
        ),
        ({"significant_fraction": 0.0}, "significant_fraction must be a fraction above 0"),
        ({"significant_fraction": 0.01, "steps": 0}, "steps must be at least 1"),
        ({"avg_bits": 2.0}, "must have room for 1 to"),
        ({"significant_fraction": 0.01, "source": "plain"}, "the model is quantized already"),
    ],
)
def test_bad_arguments_for_a_folder(folders, tmp_path, arguments, complaint):
    arguments = {"source": "source", **arguments}
    source = folders / arguments.pop("source")
    with pytest.raises(QuantratureError, match=complaint):
        qtr.requant_folder(folders / "plain", source, TOKENS, output=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_another_source_is_refused(folders, tmp_path):
    other = sharp_model()
    for linear in models.find_linears(other):
        linear.weight.copy_(torch.randn_like(linear.weight))
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(QuantratureError, match="was not made from"):
        qtr.requant_folder(
            folders / "plain", tmp_path / "other", TOKENS, significant_fraction=0.01, output=tmp_path / "out"
        )
    with pytest.raises(InvalidArgumentError, match="holds no matrix quantized"):
        qtr.requant_folder(
            folders / "source", folders / "source", TOKENS, significant_fraction=0.01, output=tmp_path / "out"
        )


def test_the_ablation_of_the_paper_on_a_trained_model(shared):
    """Table 8 of arXiv 2503.01901: both < outliers only < none in calibration loss, random about none."""
    tokenizer = models.load_tokenizer(shared / "models" / "books-llama")
    text = shared / "data" / "books-calibration.txt"
    common = {"tokenizer": tokenizer, "nsamples": 4, "seqlen": 128, "batch_size": 4, "nodes": 2, "prove": False}

    def change(outliers, significant):
        model = models.load_model(shared / "models" / "books-llama", "float32")
        return qtr.requant(
            model,
            text,
            bits=2,
            outlier_fraction=outliers,
            significant_fraction=significant,
            temperatures=(1.0,),
            **common,
        )[1]

    both = change(0.0045, 0.0005)
    none, only_outliers = both.stages[0].measured_loss_change, both.stages[1].measured_loss_change
    assert both.measured_loss_change < only_outliers < none
    assert change(0.0, 0.0005).measured_loss_change < none

    model = models.load_model(shared / "models" / "books-llama", "float32")
    windows = qtr.text.token_windows(text, tokenizer, seqlen=128, nsamples=4)
    before = float(loss(model, windows).detach())
    generator = torch.Generator().manual_seed(0)
    for linear in models.find_linears(model):
        places = torch.randperm(linear.numel, generator=generator)[: round(0.005 * linear.numel)].sort().values
        linear.weight.copy_(quantize_matrix(linear.name, linear.weight, PlanEntry(2, 64), places).dequantize("float32"))
    by_chance = float(loss(model, windows).detach()) - before
    assert by_chance == pytest.approx(none, rel=0.1)
