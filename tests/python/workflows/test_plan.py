import json

import pytest

from quantrature import InvalidArgumentError, Plan, PlanEntry

GOOD = {"format": "quantrature-plan", "format_version": 2, "entries": {"a": {"bits": 3}, "b": {"bits": 16}}}


def test_a_plan_survives_its_file(tmp_path):
    plan = Plan(
        {
            "a": PlanEntry(3, -1, True, "mse", 8, 0.005, "because", 0.25),
            "b": PlanEntry(16),
        },
        {"method": "pqi", "avg_bits": 3.25},
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_edited_plan_takes_defaults_for_what_was_left_out():
    plan = Plan.from_json(GOOD)
    assert plan.entries["a"] == PlanEntry(3, 64, False, "rtn", None, 0.0, "", None)
    assert plan.entries["b"].keeps
    assert not plan.entries["a"].keeps
    assert len(plan) == 2
    assert [name for name, _ in plan] == ["a", "b"]


def test_the_prediction_is_a_sum_or_nothing():
    plan = Plan({"a": PlanEntry(3, predicted_loss_change=0.25), "b": PlanEntry(3, predicted_loss_change=0.5)})
    assert plan.predicted_loss_change == 0.75
    assert plan.replace("b", predicted_loss_change=None).predicted_loss_change is None
    assert plan.replace("b", bits=2).entries["b"].bits == 2
    assert plan.entries["b"].bits == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 0),
        ("bits", 9),
        ("bits", 3.5),
        ("bits", True),
        ("group_size", 0),
        ("group_size", -2),
        ("group_size", "64"),
        ("sym", 1),
        ("method", "magic"),
        ("meta_bits", 0),
        ("meta_bits", 9),
        ("outlier_fraction", -0.1),
        ("outlier_fraction", 1.1),
        ("outlier_fraction", True),
        ("reason", 3),
        ("predicted_loss_change", "low"),
    ],
)
def test_an_impossible_field_is_named_with_its_entry(field, value):
    data = {**GOOD, "entries": {"good": {"bits": 3}, "model.bad": {"bits": 3, field: value}}}
    with pytest.raises(InvalidArgumentError, match=rf"entry 'model.bad': {field} must be .*: got "):
        Plan.from_json(data)


def test_hqq_has_no_symmetric_grid():
    with pytest.raises(InvalidArgumentError, match="method must be rtn or mse when sym is true"):
        PlanEntry(3, sym=True, method="hqq")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], "is no plan"),
        ({"format": "other"}, "is no plan"),
        ({**GOOD, "format_version": 3}, "format_version 3; this version reads 1 and 2"),
        ({**GOOD, "entries": {}}, "entries must not be empty"),
        ({**GOOD, "entries": {"a": 3}}, "entry 'a': must be an object"),
        ({**GOOD, "entries": {"a": {"bits": 3, "group": 64}}}, "entry 'a': unknown field 'group'"),
        (
            {**GOOD, "entries": {"a": {"bits": 3, "outliers": 0.1}}},
            "outliers was renamed to outlier_fraction in format version 2",
        ),
        ({**GOOD, "entries": {"a": {"group_size": 64}}}, "entry 'a': bits is missing"),
        ({**GOOD, "allocation": []}, "allocation must be an object: got"),
    ],
)
def test_what_is_no_plan_is_refused(data, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        Plan.from_json(data)


def test_a_plan_of_format_version_1_is_read_under_the_names_of_today():
    old = {**GOOD, "format_version": 1, "allocation": {"method": "pqi", "host": "hqq", "bytes": 3}}
    old["entries"] = {"a": {"bits": 3, "outliers": 0.005, "solver": "minmax"}, "b": {"bits": 3, "solver": "hqq"}}
    plan = Plan.from_json(old)
    assert plan.entries["a"].outlier_fraction == 0.005
    assert [entry.method for _, entry in plan] == ["rtn", "hqq"]
    assert plan.allocation == {"strategy": "pqi", "method": "hqq", "bytes": 3}
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json()["format_version"] == 2


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="cannot read .*none.json"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{\n"format": }')
    with pytest.raises(InvalidArgumentError, match="broken.json is not JSON: .* line 2"):
        Plan.load(tmp_path / "broken.json")


def test_an_unknown_module_is_named_with_the_nearest_one():
    plan = Plan.from_json(json.loads(json.dumps(GOOD)))
    plan.check_modules(["a", "b", "c"])
    with pytest.raises(InvalidArgumentError, match="entry 'a' is no quantizable matrix of this model"):
        plan.check_modules(["b"])
    named = Plan({"model.layers.0.q_prj": PlanEntry(3)})
    with pytest.raises(InvalidArgumentError, match="did you mean 'model.layers.0.q_proj'"):
        named.check_modules(["model.layers.0.q_proj"])
