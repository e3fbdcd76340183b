"""The Post-quantization Integral of models, against the loss it must add up to and against plain autograd."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import quantrature as qtr
from quantrature import InvalidArgumentError, QuantratureError, Sensitivity, analysis, models
from sharp_models import TOKENS, images, loss, sharp_model


@pytest.mark.parametrize("rule", analysis.RULES)
def test_rules_are_means_over_the_unit_interval(rule):
    nodes = analysis.quadrature(rule, 5)
    assert len(nodes) == 5
    assert sum(weight for _, weight in nodes) == pytest.approx(1, abs=1e-14)
    assert all(0 <= t <= 1 for t, _ in nodes)


@pytest.mark.parametrize(
    ("rule", "degree"), [("gauss", 7), ("midpoint", 1), ("trapezoid", 1), ("left", 0), ("right", 0)]
)
def test_rules_integrate_what_they_should(rule, degree):
    nodes = analysis.quadrature(rule, 4)
    for power in range(degree + 1):
        assert sum(w * t**power for t, w in nodes) == pytest.approx(1 / (power + 1), abs=1e-14)
    assert sum(w * t ** (degree + 1) for t, w in nodes) != pytest.approx(1 / (degree + 2), abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "ends", "ratio"),
    [("left", 0, 2), ("right", 0, 2), ("paper", 1, 2), ("midpoint", 0, 4), ("trapezoid", 1, 4)],
)
def test_rules_converge_at_their_order(rule, ends, ratio):
    def error(intervals):
        nodes = analysis.quadrature(rule, intervals + ends)
        return abs(sum(weight * math.exp(t) for t, weight in nodes) - (math.e - 1))

    for intervals in (16, 32, 64):
        assert error(intervals) / error(2 * intervals) == pytest.approx(ratio, rel=0.05)
    assert abs(sum(w * math.exp(t) for t, w in analysis.quadrature("gauss", 4)) - (math.e - 1)) < 1e-8


@pytest.mark.parametrize(("rule", "sign"), [("left", -1), ("right", 1)])
def test_one_sided_sums_are_off_by_half_a_step_of_the_slope(rule, sign):
    def predicted(rule, nodes):
        found = qtr.analyze(
            sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, rule=rule, nodes=nodes, batch_size=4
        )
        return found.predicted_loss_change

    # Both sums have the inner nodes in common: they differ by (F'(1) - F'(0)) / N.
    slopes = [predicted("right", 1), predicted("left", 1)]
    expected = sign * (slopes[0] - slopes[1]) / (2 * 8)
    assert predicted(rule, 8) - predicted("trapezoid", 9) == pytest.approx(expected, rel=1e-3)


def test_a_weight_that_does_not_move_has_no_pqi():
    model = sharp_model()
    for linear in models.find_linears(model):
        linear.weight[::2] = 0.25  # a constant group is its own image
    images_of = images(model, 2, 16)
    weights = {linear.name: linear.weight.clone() for linear in models.find_linears(model)}
    found = qtr.analyze(model, TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2)
    for name, values in found.maps["pqi"].items():
        still = images_of[name] == weights[name]
        assert still[::2].all()
        assert not values[still].any()
        assert values[~still].any()


def test_the_rule_of_the_paper_has_both_ends_and_equal_weights():
    assert analysis.quadrature("paper", 5) == [(0, 0.2), (0.25, 0.2), (0.5, 0.2), (0.75, 0.2), (1, 0.2)]


@pytest.mark.parametrize(("rule", "nodes"), [("gauss", 0), ("paper", 1), ("trapezoid", 1)])
def test_too_few_nodes_are_refused(rule, nodes):
    with pytest.raises(InvalidArgumentError, match="nodes must be at least"):
        analysis.quadrature(rule, nodes)
    with pytest.raises(InvalidArgumentError, match="rule must be one of"):
        analysis.quadrature("simpson", 3)


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_integral_adds_up_to_the_loss_change(layout, bits):
    model = sharp_model(layout)
    before = float(loss(model).detach())
    found = qtr.analyze(model, TOKENS, metrics=["pqi"], bits=bits, group_size=16, nodes=6)
    (proof,) = found.proofs
    qtr.quantize(model, bits=bits, group_size=16)
    assert proof.measured_loss_change == pytest.approx(float(loss(model).detach()) - before, abs=2e-5)
    assert proof.predicted_loss_change == pytest.approx(proof.measured_loss_change, rel=0.02, abs=2e-5)
    assert proof.predicted_loss_change == pytest.approx(sum(m.loss_change[f"b{bits}g16"] for m in found.matrices))
    assert found.predicted_loss_change == proof.predicted_loss_change
    assert found.gradient_evaluations == 6


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_maps_against_autograd(layout):
    model = sharp_model(layout)
    found = qtr.analyze(model, TOKENS, metrics=["pqi"], bits=2, group_size=16, rule="midpoint", nodes=2)
    moved = images(model, 2, 16)
    linears = models.find_linears(model)
    originals = {linear.name: linear.weight.clone() for linear in linears}
    sums = {name: torch.zeros_like(w) for name, w in originals.items()}
    for t in (0.25, 0.75):
        for linear in linears:
            linear.weight.copy_(originals[linear.name] + t * (moved[linear.name] - originals[linear.name]))
        model.zero_grad()
        loss(model).backward()
        for linear in linears:
            sums[linear.name] += 0.5 * linear.view(linear.parameter.grad)
    for linear in linears:
        expected = (moved[linear.name] - originals[linear.name]) * sums[linear.name]
        scale = float(expected.abs().max())
        assert torch.allclose(found.maps["pqi"][linear.name], expected.abs(), rtol=1e-3, atol=1e-4 * scale)
        matrix = next(m for m in found.matrices if m.name == linear.name)
        assert matrix.loss_change["b2g16"] == pytest.approx(float(expected.double().sum()), rel=1e-3, abs=1e-7)


def test_the_model_is_left_as_it_was():
    model = sharp_model().train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    qtr.analyze(model, TOKENS, metrics=list(analysis.METRICS), bits=(2, 3), group_size=16, nodes=2)
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad == flags[name]
        assert p.grad is None


def test_batches_do_not_change_the_result():
    one = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2)
    all_at_once = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2, batch_size=3)
    assert all_at_once.predicted_loss_change == pytest.approx(one.predicted_loss_change, rel=1e-4)


def test_checkpointing_does_not_change_the_result():
    plain = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2)
    saving = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2, checkpointing=True)
    for name, values in plain.maps["pqi"].items():
        assert torch.allclose(saving.maps["pqi"][name], values, rtol=1e-4, atol=1e-9)


def test_accumulators_in_files_hold_the_same(tmp_path):
    plain = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2)
    mapped = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2, map_folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(plain.matrices)
    for name, values in plain.maps["pqi"].items():
        assert torch.equal(mapped.maps["pqi"][name], values)


def test_where_the_absolute_value_is_taken():
    maps = {
        mode: qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=3, abs_mode=mode).maps[
            "pqi"
        ]
        for mode in analysis.ABS_MODES
    }
    strictly = False
    for name, after in maps["after_mean"].items():
        per_sample, per_node = maps["per_sample"][name], maps["per_node"][name]
        slack = 1e-6 * float(per_node.max())
        assert (after <= per_sample + slack).all()
        assert (per_sample <= per_node + slack).all()
        strictly |= bool((per_sample < per_node - slack).any())
    assert strictly


def test_signed_shares_do_not_depend_on_where_the_absolute_value_is_taken():
    signed = [
        [
            m.loss_change["b2g16"]
            for m in qtr.analyze(
                sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=2, abs_mode=mode
            ).matrices
        ]
        for mode in analysis.ABS_MODES
    ]
    assert signed[1] == pytest.approx(signed[0], rel=1e-3, abs=1e-7)
    assert signed[2] == pytest.approx(signed[0], rel=1e-3, abs=1e-7)


def test_a_tolerance_adds_nodes_until_it_holds():
    found = qtr.analyze(sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=1, tol=1e-3)
    (proof,) = found.proofs
    assert proof.within_tolerance
    assert proof.nodes > 1
    assert proof.gradient_evaluations == 2 * proof.nodes - 1
    assert proof.relative_error <= 1e-3


def test_a_tolerance_that_is_missed_is_said():
    found = qtr.analyze(
        sharp_model(), TOKENS, metrics=["pqi"], bits=2, group_size=16, nodes=1, rule="left", tol=1e-6, max_nodes=2
    )
    assert found.proofs[0].within_tolerance is False
    assert found.proofs[0].nodes == 2


def test_other_metrics_are_what_they_say():
    model = sharp_model()
    found = qtr.analyze(
        model,
        TOKENS,
        metrics=["first_order", "fisher", "magnitude", "error", "activation_error", "kurtosis"],
        bits=2,
        group_size=16,
    )
    assert found.proofs == ()
    moved = images(model, 2, 16)
    squares = {}
    gradients = []
    for sample in TOKENS:
        model.zero_grad()
        loss(model, sample[None]).backward()
        gradients.append({linear.name: linear.parameter.grad.clone() for linear in models.find_linears(model)})
    hooks = []
    for linear in models.find_linears(model):
        squares[linear.name] = 0

        def see(module, inputs, output, name=linear.name):
            image = torch.nn.functional.linear(inputs[0], moved[name] - module.weight)
            squares[name] = squares[name] + float(image.double().square().sum())

        hooks.append(linear.module.register_forward_hook(see))
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    for matrix in found.matrices:
        weight = models.find_linears(model).find(matrix.name).weight
        way = (moved[matrix.name] - weight).double()
        mean = sum(g[matrix.name].double() for g in gradients) / len(TOKENS)
        square = sum(g[matrix.name].double() ** 2 for g in gradients) / len(TOKENS)
        assert matrix.scores["first_order"] == pytest.approx(float((way * mean).sum()), rel=1e-3, abs=1e-7)
        assert matrix.scores["fisher"] == pytest.approx(0.5 * float((way**2 * square).sum()), rel=1e-3)
        assert matrix.scores["magnitude"] == pytest.approx(float(weight.abs().mean()), rel=1e-5)
        assert matrix.scores["error"] == pytest.approx(float((way**2).sum()), rel=1e-5)
        centred = weight.double() - weight.double().mean()
        pearson = float((centred**4).mean() / (centred**2).mean() ** 2)
        assert matrix.scores["kurtosis"] == pytest.approx(pearson, rel=1e-6)
    # The diagonal approximation of the activation-weighted error leaves out what correlates between inputs.
    for matrix in found.matrices:
        assert 0.05 < matrix.scores["activation_error"] * TOKENS.numel() / squares[matrix.name] < 20


def test_one_report_compares_the_metrics():
    found = qtr.analyze(
        sharp_model(), TOKENS, metrics=list(analysis.METRICS), bits=2, group_size=16, nodes=2, batch_size=4
    )
    changes = [m.loss_change["b2g16"] for m in found.matrices]
    correlations = found.rank_correlations()
    assert list(correlations) == list(analysis.METRICS)
    for metric, correlation in correlations.items():
        expected = spearmanr([m.scores[metric] for m in found.matrices], changes).statistic
        assert correlation == pytest.approx(expected)
    assert found.to_json()["rank_correlations"] == correlations
    assert qtr.analyze(sharp_model(), TOKENS, metrics=["kurtosis"], bits=2).rank_correlations() == {}


def test_a_result_survives_its_folder(tmp_path):
    found = qtr.analyze(
        sharp_model(), TOKENS, metrics=["pqi", "fisher", "kurtosis"], bits=(2, 4), group_size=16, nodes=2
    )
    found.save(tmp_path / "sens")
    loaded = Sensitivity.load(tmp_path / "sens")
    assert loaded.matrices == found.matrices
    assert loaded.proofs == found.proofs
    assert loaded.settings == json.loads(json.dumps(found.settings))
    assert set(loaded.maps) == {"pqi", "fisher"}
    for name, values in found.maps["pqi"].items():
        assert torch.equal(loaded.maps["pqi"][name], values)
    data = json.loads((tmp_path / "sens" / "sensitivity.json").read_text())
    assert data["gradient_evaluations"] == 4
    assert data["predicted_loss_change"] == found.predicted_loss_change
    assert len(data["modules"]) == len(found.matrices)
    with pytest.raises(InvalidArgumentError, match="not empty"):
        found.save(tmp_path / "sens")


def test_broken_results_are_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*sensitivity.json"):
        Sensitivity.load(tmp_path)
    path = tmp_path / "sensitivity.json"
    path.write_text("{")
    with pytest.raises(InvalidArgumentError, match="is not JSON"):
        Sensitivity.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(InvalidArgumentError, match="is not of the format"):
        Sensitivity.load(tmp_path)
    path.write_text('{"format": "quantrature-sensitivity", "format_version": 1}')
    with pytest.raises(InvalidArgumentError, match="json: (model|modules) is missing"):
        Sensitivity.load(tmp_path)


def test_a_gradient_that_is_not_finite_is_named_and_the_model_restored():
    model = sharp_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    up = model.model.layers[1].mlp.up_proj
    handle = up.register_full_backward_pre_hook(lambda module, gradient: (gradient[0] * math.inf,))
    with pytest.raises(
        QuantratureError, match=r"gradient of model.layers.* is not finite at node t=0.\d+, calibration sample 0"
    ):
        qtr.analyze(model, TOKENS, metrics=["pqi"], bits=2, group_size=16)
    handle.remove()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_loss_that_is_not_finite_is_named():
    model = sharp_model()
    model.model.norm.weight.data[0] = math.nan
    complaint = "the loss is nan at node t=0, calibration sample 0: the output of model.norm is the first that is not"
    for metrics in (["pqi"], ["fisher"]):
        with pytest.raises(QuantratureError, match=complaint):
            qtr.analyze(model, TOKENS, metrics=metrics, bits=2, group_size=16)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_loss_that_is_not_finite_on_the_way_names_the_sample(batch_size):
    model = sharp_model()
    embeddings = model.model.embed_tokens.weight
    embeddings.data[int(TOKENS[2, 0])] = math.inf  # a token of the third sample alone
    assert int(TOKENS[2, 0]) not in TOKENS[:2]
    with pytest.raises(QuantratureError, match="at node t=0, calibration sample 2: the output of model.embed_tokens"):
        qtr.analyze(model, TOKENS, metrics=["pqi"], bits=2, group_size=16, batch_size=batch_size)


def test_a_gradient_that_is_not_finite_names_the_samples_of_its_batch():
    model = sharp_model()
    calls = []

    def spoil(module, gradient):
        calls.append(1)
        return (gradient[0] * (math.inf if len(calls) == 2 else 1),)

    model.model.layers[1].mlp.up_proj.register_full_backward_pre_hook(spoil)
    with pytest.raises(QuantratureError, match=r"gradient of model.layers.* at node t=0.\d+, calibration sample 2, 3"):
        qtr.analyze(model, TOKENS, metrics=["pqi"], bits=2, group_size=16, batch_size=2)


def test_weights_that_are_not_finite_are_named():
    model = sharp_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InvalidArgumentError, match=r"model.layers.0.mlp.up_proj"):
        qtr.analyze(model, TOKENS, metrics=["kurtosis"], bits=2, group_size=16)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"metrics": ["magic"]}, "metrics must be among"),
        ({"tol": 0.0}, "tol must be above 0"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"group_size": 0}, "group_size must be"),
        ({"method": "magic"}, "method must be one of"),
        ({"rule": "magic"}, "rule must be one of"),
        ({"abs_mode": "magic"}, "abs_mode must be one of"),
        ({"seqlen": 64}, "seqlen must be 24"),
    ],
)
def test_bad_arguments(arguments, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        qtr.analyze(sharp_model(), TOKENS, **arguments)


def test_nodes_of_the_gradient_path_are_formed_in_float32():
    model = sharp_model().to(torch.bfloat16)
    moved = images(model, 2, 16)
    linears = models.find_linears(model)
    originals = {linear.name: linear.weight.clone() for linear in linears}
    path = analysis.path.WeightPath(
        model, [analysis.path.Moved(linear, lambda name=linear.name: moved[name]) for linear in linears]
    )
    with path:
        path.move_to(0.3)
        for linear in linears:
            w = originals[linear.name].float()
            expected = w + np.float32(0.3) * (moved[linear.name] - w)
            assert torch.equal(linear.weight, expected.to(torch.bfloat16))
    for linear in linears:
        assert torch.equal(linear.weight, originals[linear.name])


def test_prediction_on_a_trained_model(shared):
    model = models.load_model(shared / "models" / "books-llama", "float32")
    tokenizer = models.load_tokenizer(shared / "models" / "books-llama")
    text = shared / "data" / "books-calibration.txt"
    found = qtr.analyze(model, text, tokenizer=tokenizer, metrics=["pqi"], bits=2, nsamples=2, seqlen=128, nodes=3)
    assert found.measured_loss_change > 0.05
    assert found.proofs[0].relative_error < 0.02


def test_what_the_paper_found_of_pqi_holds_on_a_trained_model(shared):
    """Local metrics underpredict, absolute values mostly cancel, few weights have much of the sum (Tables 1, 4, 5)."""
    model = models.load_model(shared / "models" / "books-llama", "float32")
    found = qtr.analyze(
        model,
        shared / "data" / "books-calibration.txt",
        tokenizer=models.load_tokenizer(shared / "models" / "books-llama"),
        metrics=["pqi", "first_order"],
        bits=2,
        nsamples=4,
        seqlen=128,
        batch_size=4,
        rule="midpoint",
        nodes=6,
    )
    assert found.proofs[0].relative_error < 0.01
    assert abs(sum(m.scores["first_order"] for m in found.matrices)) < 0.3 * found.measured_loss_change
    every = torch.cat([values.flatten() for values in found.maps["pqi"].values()]).double()
    assert float(every.sum()) > 10 * found.measured_loss_change
    top = every.sort(descending=True).values
    for share, least in ((0.0015, 0.02), (0.0071, 0.06), (0.0525, 0.25)):  # Table 5: 0.045, 0.11, 0.34
        assert float(top[: round(share * len(top))].sum() / top.sum()) > least
    by_role = {}
    for matrix in found.matrices:
        by_role.setdefault(matrix.role, []).append(matrix.scores["pqi"])
    mean = {role: sum(values) / len(values) for role, values in by_role.items()}
    assert mean["self_attn.v_proj"] > mean["self_attn.q_proj"]  # Table 4
