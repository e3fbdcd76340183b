import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from quantrature import InvalidArgumentError
from quantrature.allocation import LossModel, Option, allocate, fusion_groups, stored_bytes
from quantrature.allocation.loss import FLOOR, analytic_error
from quantrature.analysis.sensitivity import MatrixSensitivity, Sensitivity
from quantrature.plan import Plan, PlanEntry

ROLES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
OPTIONS = [Option(b, g) for b in range(2, 9) for g in (32, 64, 128)]


def sensitivity(losses=None, blocks=2, references=("b2g64", "b3g64", "b4g64"), errors=True, **changes):
    """An analysis of a small Llama, where matrix i costs losses[i] in nats for each unit of error energy."""
    matrices = []
    for block, (role, (rows, columns)) in itertools.product(range(blocks), ROLES.items()):
        i = len(matrices)
        rate = losses[i] if losses else 1e-6 * (1 + (7 * i) % 11)
        energy = {o.key: rows * columns * analytic_error(o, columns) for o in OPTIONS}
        matrices.append(
            MatrixSensitivity(
                f"model.layers.{block}.{role}",
                role,
                block,
                rows,
                columns,
                {},
                {key: rate * energy[key] for key in references},
                energy if errors else {},
                dtype="bfloat16",
            )
        )
    about = {"method": "rtn", "sym": False, "group_size": 64, "bits": [2, 3, 4], **changes}
    return Sensitivity(tuple(matrices), (), about, "model", "text")


def size(sens, plan):
    return sum(stored_bytes(m.out_features, m.in_features, plan.entries[m.name], m.dtype) for m in sens.matrices)


def weights(sens):
    return sum(m.numel for m in sens.matrices)


# Sizes


def test_size_of_an_entry():
    assert stored_bytes(10, 64, PlanEntry(4, 64)) == 10 * (32 + 4)
    assert stored_bytes(10, 64, PlanEntry(3, 32)) == 10 * (24 + 8)
    assert stored_bytes(10, 64, PlanEntry(3, 32, sym=True)) == 10 * (24 + 4)
    assert stored_bytes(10, 65, PlanEntry(3, 32)) == 10 * (27 + 12)
    assert stored_bytes(10, 65, PlanEntry(3, -1)) == 10 * (27 + 4)
    assert stored_bytes(10, 64, PlanEntry(16), "float32") == 10 * 64 * 4
    assert stored_bytes(10, 64, PlanEntry(3, 2, meta_bits=8)) == 10 * 24 + 320 + 8 * 3 + 320 + 4 * 3
    assert stored_bytes(10, 64, PlanEntry(3, 2, sym=True, meta_bits=4)) == 10 * 24 + 160 + 8 * 3
    sparse = PlanEntry(4, 64, outlier_fraction=0.01)
    assert stored_bytes(10, 64, sparse) == 10 * 36 + 6 * (2 + 2) + 2 * 11
    assert stored_bytes(10, 64, sparse, "float32") == 10 * 36 + 6 * (4 + 2) + 2 * 11
    assert stored_bytes(1, 1 << 17, PlanEntry(4, 64, outlier_fraction=1e-5)) == (1 << 16) + 4 * 2048 + (2 + 4) + 2 * 2


@pytest.mark.parametrize("option", [Option(3), Option(2, -1), Option(8, 128, 0.005), Option(4, 64, 1e-05)])
def test_a_setting_survives_its_text(option):
    assert Option.parse(option.key) == option


# The integer program


def brute_force(costs, sizes, budget):
    fitting = [
        sum(c[k] for c, k in zip(costs, choice, strict=True))
        for choice in itertools.product(*(range(len(c)) for c in costs))
        if sum(s[k] for s, k in zip(sizes, choice, strict=True)) <= budget
    ]
    return min(fitting, default=None)


# Loss


def test_references_are_met_and_joined_in_the_logarithm_of_the_error():
    error = {"b2g64": 16.0, "b3g64": 4.0, "b4g64": 1.0, "b5g64": 0.25, "b1g64": 64.0, "b3g32": 2.0}
    model = LossModel(["a"], [64], [100], [{"b2g64": 0.9, "b3g64": 0.1, "b4g64": 0.02}], [error])
    predict = {key: model.loss_changes([model.cost(0, Option.parse(key))])[0] for key in error}
    assert predict["b2g64"] == pytest.approx(0.9)
    assert predict["b3g64"] == pytest.approx(0.1)
    assert predict["b4g64"] == pytest.approx(0.02)
    assert predict["b3g32"] == pytest.approx(math.sqrt(0.1 * 0.02))
    assert predict["b5g64"] == pytest.approx(0.02 / 4**model.power)
    assert predict["b1g64"] == pytest.approx(0.9 * 4**model.power)
    assert model.power == pytest.approx((math.log(9, 4) + math.log(5, 4)) / 2)
    assert model.floored == {"b2g64": 0, "b3g64": 0, "b4g64": 0}


def test_matrices_that_harm_each_other():
    """A model whose loss is a power of a sum over error energies; PQI shares the loss of a reference out among them."""
    rates, power = (1e-3, 4e-3, 2e-3), 1.3
    energy = [{"b2g64": 90.0, "b3g64": 20.0, "b4g64": 5.0}, {"b2g64": 40.0, "b3g64": 9.0, "b4g64": 2.0}]
    energy.append({"b2g64": 30.0, "b3g64": 7.0, "b4g64": 1.5})

    def loss(keys):
        return sum(r * e[k] for r, e, k in zip(rates, energy, keys, strict=True)) ** power

    changes = [
        {key: r * e[key] * loss([key] * 3) ** (1 - 1 / power) for key in e} for r, e in zip(rates, energy, strict=True)
    ]
    model = LossModel(["a", "b", "c"], [64] * 3, [100] * 3, changes, energy)
    assert model.power == pytest.approx(power)
    for keys in itertools.product(energy[0], repeat=3):
        shares = model.loss_changes([model.cost(i, Option.parse(key)) for i, key in enumerate(keys)])
        assert sum(shares) == pytest.approx(loss(keys))
    slower = [{key: math.sqrt(value) for key, value in of_matrix.items()} for of_matrix in changes]
    assert LossModel(["a", "b", "c"], [64] * 3, [100] * 3, slower, energy).power == 1
    assert LossModel(["a"], [64], [1], [{"b2g64": -1.0, "b3g64": -2.0}], [energy[0]]).power >= 1


def test_what_is_expected_is_an_average_over_references():
    error = [{"b2g64": 16.0, "b3g64": 4.0, "b5g64": 0.5}, {"b2g64": 8.0, "b3g64": 2.0, "b5g64": 0.25}]
    model = LossModel(
        ["a", "b"], [64] * 2, [100] * 2, [{"b2g64": 0.8, "b3g64": 0.3}, {"b2g64": 0.4, "b3g64": 0.2}], error
    )
    for i in range(2):
        costs = [model.cost(i, Option(bits)) for bits in (2, 3)]
        rate = sum(costs) / (error[i]["b2g64"] + error[i]["b3g64"])
        assert model.expected_cost(i, Option(5)) == pytest.approx(rate * error[i]["b5g64"])
        assert model.expected_cost(i, Option(2)) != pytest.approx(costs[0])
    assert model.expected_cost(0, Option(2, 64, 0.01)) is None
    assert LossModel(["a"], [64], [100], [{"b3g64": 0.0}], [{"b3g64": 0.0}]).expected_cost(0, Option(3)) == 0


def test_a_loss_change_has_a_floor():
    changes = [{"b3g64": 0.02}, {"b3g64": -0.01}, {"b3g64": 0.0}]
    model = LossModel(["a", "b", "c"], [64] * 3, [100] * 3, changes, [{"b3g64": 2.0}, {"b3g64": 1.0}, {"b3g64": 2.0}])
    predict = [model.cost(i, Option(3)) for i in range(3)]
    average = 0.01 / 5
    raised = [0.02, FLOOR * average * 1, FLOOR * average * 2]
    assert predict == pytest.approx([0.01 * loss / sum(raised) for loss in raised])
    assert model.floored == {"b3g64": 2}
    nothing_lost = LossModel(["a", "b"], [64] * 2, [100] * 2, [{"b3g64": -0.02}, {"b3g64": -0.01}], [{}, {}])
    assert nothing_lost.cost(0, Option(3)) == pytest.approx(FLOOR * 0.03 / 2)


def test_unmeasured_errors_follow_the_step_of_the_grid():
    model = LossModel(["a"], [64], [100], [{"b3g64": 0.07}], [{}])
    assert not model.measured
    assert model.cost(0, Option(4)) == pytest.approx(0.07 * (7 / 15) ** 2)
    assert model.cost(0, Option(3, 32)) < 0.07
    assert model.cost(0, Option(3, -1)) == pytest.approx(0.07)
    measured = LossModel(["a"], [64], [100], [{"b3g64": 0.07}], [{"b3g64": 1.0, "b4g64": 0.2}])
    assert measured.measured
    assert measured.cost(0, Option(4)) == pytest.approx(0.07 * 0.2)
    assert measured.cost(0, Option(5)) == pytest.approx(0.07 * 0.2 * (15 / 31) ** 2)


# Plans


def test_pqi_spends_where_it_helps():
    rates = [1e-8] * 14
    rates[6] = 1e-4
    sens = sensitivity(rates)
    plan = allocate(sens, avg_bits=3.25)
    bits = {name: entry.bits for name, entry in plan}
    precious = bits.pop("model.layers.0.mlp.down_proj")
    assert precious > max(bits.values())
    uniform = allocate(sens, strategy="uniform", avg_bits=3.25)
    assert plan.predicted_loss_change < 0.5 * uniform.predicted_loss_change


def test_the_plan_says_how_it_came_about():
    sens = sensitivity()
    plan = quantrature.allocate(sens, strategy="pqi", avg_bits=3.25)
    about = plan.allocation
    assert about["strategy"] == "pqi"
    assert about["method"] == "rtn"
    assert about["budget"] == {"avg_bits": 3.25}
    assert about["budget_bytes"] == weights(sens) * 3.25 / 8
    assert about["bytes"] == size(sens, plan) <= about["budget_bytes"]
    assert about["slack_bytes"] == about["budget_bytes"] - about["bytes"] < 700
    assert about["bits_per_weight"] == 8 * about["bytes"] / weights(sens)
    assert about["predicted_loss_change"] == plan.predicted_loss_change
    assert about["gap"] <= 1e-6
    assert about["error_energies"] == "measured"
    assert (about["model"], about["calibration"]) == ("model", "text")
    for _, entry in plan:
        assert " nats for " in entry.reason
        assert entry.predicted_loss_change > 0
        assert entry.method == "rtn"
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_pqi_is_optimal():
    sens = sensitivity(blocks=1)
    found = allocate(sens, avg_bits=4, bits=(2, 3, 4, 8), group_sizes=(64,), groups="none")
    costs, sizes = [], []
    for m in sens.matrices:
        options = [Option(b) for b in (2, 3, 4, 8)]
        rate = m.loss_change["b3g64"] / m.error["b3g64"]
        costs.append([rate * m.error[o.key] for o in options])
        sizes.append([stored_bytes(m.out_features, m.in_features, o.entry()) for o in options])
    best = brute_force(costs, sizes, weights(sens) * 4 // 8)
    assert found.predicted_loss_change == pytest.approx(best, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-1e-3, 1e-2), min_size=14, max_size=14),
    st.floats(2.5, 9),
    st.sampled_from(["uniform", "pqi"]),
    st.sampled_from(["fused", "none"]),
)
def test_the_budget_is_never_exceeded(losses, avg_bits, strategy, groups):
    sens = sensitivity(losses)
    plan = allocate(sens, strategy=strategy, avg_bits=avg_bits, groups=groups)
    assert 8 * size(sens, plan) <= avg_bits * weights(sens) + 1e-5
    assert plan.allocation["bytes"] == size(sens, plan)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-1e-3, 1e-2), min_size=7, max_size=7), st.lists(st.floats(2.5, 8.6), min_size=3, max_size=6))
def test_more_budget_never_predicts_more_loss(losses, budgets):
    sens = sensitivity(losses, blocks=1)
    predicted = [allocate(sens, avg_bits=b).predicted_loss_change for b in sorted(budgets)]
    for less, more in itertools.pairwise(predicted):
        assert more <= less * (1 + 2e-6) + 1e-12


def test_what_is_fused_is_stored_alike():
    sens = sensitivity([10.0 ** -(3 + i % 5) for i in range(14)])
    plan = allocate(sens, avg_bits=3.5)
    free = allocate(sens, avg_bits=3.5, groups="none")

    def settings_of(plan, block, *roles):
        return {plan.entries[f"model.layers.{block}.{role}"].setting for role in roles}

    for block in range(2):
        assert len(settings_of(plan, block, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")) == 1
        assert len(settings_of(plan, block, "mlp.gate_proj", "mlp.up_proj")) == 1
    assert len(settings_of(free, 0, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")) > 1
    assert free.predicted_loss_change <= plan.predicted_loss_change


def test_groups_of_a_mixture():
    names = [f"m.0.{r}" for r in ("attn.q_proj", "attn.v_proj", "experts.gate_proj.0", "experts.up_proj.0")]
    names += ["m.0.experts.up_proj.1", "m.1.attn.q_proj", "m.0.experts.gate_up_proj.0"]
    assert fusion_groups(names) == [[0, 1], [2, 3], [4], [5], [6]]


def test_uniform_takes_the_largest_that_fits():
    sens = sensitivity()
    for avg_bits, key in [(4.5, "b4g64"), (4.49, "b4g128"), (100, "b8g32")]:
        plan = allocate(sens, strategy="uniform", avg_bits=avg_bits, group_sizes=(32, 64, 96))
        expected = {"b4g64": 4.5}.get(key)
        assert plan.allocation["bits_per_weight"] <= avg_bits
        if expected:
            assert {entry.setting for _, entry in plan} <= {key, "b4g96"}
    plan = allocate(sens, strategy="uniform", avg_bits=100)
    assert {entry.setting for _, entry in plan} == {"b8g32"}
    assert plan.allocation["setting"] == "b8g32"
    by_bytes = allocate(sens, strategy="uniform", target_bytes=plan.allocation["bytes"])
    assert by_bytes.entries == plan.entries
    without = dataclasses.replace(sens, matrices=tuple(dataclasses.replace(m, loss_change={}) for m in sens.matrices))
    assert allocate(without, strategy="uniform", avg_bits=4).predicted_loss_change is None


def test_method_and_form_of_the_grid():
    plan = allocate(sensitivity(), avg_bits=4, method="hqq", meta_bits=8)
    assert {(e.method, e.meta_bits, e.sym) for _, e in plan} == {("hqq", 8, False)}
    plan = allocate(sensitivity(sym=True), avg_bits=4)
    assert {(e.method, e.meta_bits, e.sym) for _, e in plan} == {("rtn", None, True)}


def test_outliers_are_chosen_when_they_were_analyzed():
    sens = sensitivity()
    with_outliers = dataclasses.replace(
        sens,
        matrices=tuple(
            dataclasses.replace(
                m, error={**m.error, **{f"b{b}g64o0.01": m.error[f"b{b}g64"] / 50 for b in range(2, 9)}}
            )
            for m in sens.matrices
        ),
    )
    plan = allocate(with_outliers, avg_bits=4, group_sizes=[64], outlier_fractions=[0, 0.01])
    plain = allocate(with_outliers, avg_bits=4, group_sizes=[64])
    assert any(entry.outlier_fraction == 0.01 for _, entry in plan)
    assert plan.predicted_loss_change < plain.predicted_loss_change
    assert plan.allocation["bits_per_weight"] <= 4
    with pytest.raises(InvalidArgumentError, match=r"without the weights: got b2g64o0\.01, not measured for model"):
        allocate(sens, avg_bits=4, group_sizes=[64], outlier_fractions=[0, 0.01])


# Constraints


def test_constraints_hold():
    sens = sensitivity()
    plan = allocate(
        sens,
        avg_bits=4,
        pin={"model.layers.0.mlp.down_proj": "b8g16", "model.layers.1.self_attn.o_proj": 5},
        minimum={"re:.*o_proj": 4},
        maximum={"re:.*gate_proj": 3},
        skip=["model.layers.1.mlp.down_proj"],
    )
    assert plan.entries["model.layers.0.mlp.down_proj"].setting == "b8g16"
    assert plan.entries["model.layers.1.self_attn.o_proj"].bits == 5
    assert plan.entries["model.layers.0.self_attn.o_proj"].bits >= 4
    for block in range(2):
        assert plan.entries[f"model.layers.{block}.mlp.up_proj"].bits <= 3
    assert plan.entries["model.layers.1.mlp.down_proj"].keeps
    assert list(plan.entries) == [m.name for m in sens.matrices]
    assert plan.allocation["weights"] == weights(sens) - 64 * 96
    assert plan.allocation["bits_per_weight"] <= 4
    uniform = allocate(sens, strategy="uniform", avg_bits=4, pin={"model.layers.0": 2})
    assert {entry.bits for name, entry in uniform if "layers.0" in name} == {2}
    assert uniform.entries["model.layers.0.mlp.up_proj"].reason == "constraint"


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"avg_bits": 2}, r"avg_bits must be at least 2\.\d{4} for these matrices and settings: got avg_bits=2"),
        ({"target_bytes": 100}, r"target_bytes must be at least \d+ for .* got target_bytes=100"),
        ({}, "give either avg_bits or target_bytes as the budget: got avg_bits=None, target_bytes=None"),
        ({"avg_bits": 3, "target_bytes": 3}, "got avg_bits=3, target_bytes=3"),
        ({"avg_bits": -1}, "avg_bits must be above 0: got avg_bits=-1"),
        ({"avg_bits": math.nan}, "avg_bits must be above 0: got avg_bits=nan"),
        ({"avg_bits": 4, "strategy": "best"}, "strategy must be one of uniform, .*: got 'best'"),
        (
            {"avg_bits": 4, "method": "pqi"},
            "got 'pqi', which is a strategy; use strategy='pqi'",
        ),
        ({"avg_bits": 4, "method": "best"}, "method must be one of rtn, mse, hqq, .*: got 'best'"),
        ({"avg_bits": 4, "groups": "some"}, "groups must be fused or none: got 'some'"),
        ({"avg_bits": 4, "bits": [9]}, "bits must be 1 to 8: got 9"),
        ({"avg_bits": 4, "bits": [16]}, "bits must be 1 to 8: got 16"),
        ({"avg_bits": 4, "bits": []}, "must not be empty"),
        ({"avg_bits": 4, "group_sizes": [0]}, "group_size must be -1 or at least 1: got 0"),
        ({"avg_bits": 4, "outlier_fractions": [2]}, "outlier_fraction must be a fraction between 0 and 1: got 2"),
        ({"avg_bits": 4, "skip": ["re:.*"]}, "skip must leave at least one matrix"),
        ({"avg_bits": 4, "skip": ["lm_head"]}, "a constraint must match at least one matrix or module: got lm_head"),
        ({"avg_bits": 4, "pin": {"re:(": 4}}, r"or re: and a regular expression: got re:\("),
        ({"avg_bits": 4, "pin": {"model": "four"}}, "a setting must look like b3g64 or b3g64o0.005: got 'four'"),
        ({"avg_bits": 4, "pin": {"model": 9}}, "bits must be 1 to 8, or 16 for unquantized: got 9"),
        (
            {"avg_bits": 4, "minimum": {"model.layers.0": 5}, "maximum": {"re:.*q_proj": 4}},
            r"leave no setting for model.layers.0.self_attn.q_proj: at least 5 bits for model.layers.0, "
            r"at most 4 bits for re:\.\*q_proj",
        ),
        (
            {"avg_bits": 4, "pin": {"re:.*0.*q_proj": 4, "re:.*0.*k_proj": 5}},
            "must leave a common setting for .*q_proj, .*k_proj, .*v_proj, .*set groups=none",
        ),
        (
            {"avg_bits": 4, "pin": {"model": 8}},
            r"avg_bits must be at least 8\.\d{4}",
        ),
    ],
)
def test_what_cannot_be_is_refused(wishes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        allocate(sensitivity(), **wishes)


def test_the_smallest_value_named_does():
    sens = sensitivity()
    with pytest.raises(InvalidArgumentError) as refused:
        allocate(sens, avg_bits=1)
    least = float(str(refused.value).split("at least ")[1].split()[0])
    assert allocate(sens, avg_bits=least).allocation["bits_per_weight"] <= least
    with pytest.raises(InvalidArgumentError, match="at least"):
        allocate(sens, avg_bits=least - 2e-4)


def test_an_analysis_without_pqi_is_refused():
    sens = sensitivity()
    first, second, *rest = sens.matrices
    without = dataclasses.replace(first, loss_change={})
    with pytest.raises(InvalidArgumentError, match=r"the metric pqi: got none for model.layers.0.self_attn.q_proj"):
        allocate(dataclasses.replace(sens, matrices=(without, second, *rest)), avg_bits=4)
    for field, what in (("loss_change", "loss change"), ("error", "error energy")):
        bad = dataclasses.replace(second, **{field: {**getattr(second, field), "b3g64": math.nan}})
        message = f"every {what} must be .*: got nan for model.layers.0.self_attn.k_proj at b3g64"
        with pytest.raises(InvalidArgumentError, match=message):
            allocate(dataclasses.replace(sens, matrices=(first, bad, *rest)), avg_bits=4)
