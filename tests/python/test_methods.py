"""The registry of host methods, and the one call that quantizes a matrix by any of them."""

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan, PlanEntry, methods
from quantrature.methods import METHODS, SOLVERS, Method, Statistics, quantize_matrix, solver_of
from quantrature.storage import QuantizedMatrix
from tiny_models import tiny_model

WEIGHT = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calibrated(monkeypatch):
    """A method that needs a Hessian and has options, registered for the while."""
    seen = []

    def quantize(weight, entry, kept, statistics):
        seen.append((SOLVERS["toy"].settings(entry), kept, statistics))
        return METHODS["rtn"].quantize(weight, PlanEntry(entry.bits, entry.group_size), kept, statistics)

    toy = Method("a toy", "toy", quantize, needs=("hessian",), options={"damp": 0.5, "ordered": False})
    monkeypatch.setitem(METHODS, "toy", toy)
    monkeypatch.setitem(SOLVERS, "toy", toy)
    return seen


def test_every_method_has_a_solver_that_a_plan_takes():
    for name, method in METHODS.items():
        assert SOLVERS[solver_of(name)] is method
        assert PlanEntry(4, method.group_size or 128, solver=method.solver).solver == method.solver
        assert str(method).startswith(method.about)
        assert set(method.needs) <= set(methods.STATISTICS)


def test_a_method_gets_weight_kept_places_statistics_and_its_settings(calibrated):
    entry = PlanEntry(4, 16, solver="toy", options={"damp": 1})
    kept = torch.tensor([3, 40])
    statistics = Statistics(hessian=torch.eye(32))
    matrix = quantize_matrix("w", WEIGHT, entry, kept, statistics)
    assert isinstance(matrix, QuantizedMatrix)
    assert torch.equal(matrix.outliers.positions(), kept)
    settings, places, given = calibrated[0]
    assert settings == {"damp": 1, "ordered": False}
    assert torch.equal(places, kept)
    assert given is statistics


@pytest.mark.parametrize("statistics", [None, Statistics(fisher=torch.ones(8, 32))])
def test_a_matrix_without_the_statistics_that_its_method_needs_is_named(calibrated, statistics):
    with pytest.raises(InvalidArgumentError, match=r"layers.0.q: method toy needs a calibration text, for the hessian"):
        quantize_matrix("layers.0.q", WEIGHT, PlanEntry(4, 16, solver="toy"), statistics=statistics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampp": 1.0}, "options of toy must be among damp, ordered: got 'dampp'"),
        ({"damp": "much"}, "option damp of toy must be float: got 'much'"),
        ({"ordered": 1}, "option ordered of toy must be bool: got 1"),
        ([1], r"options must be an object: got \[1\]"),
    ],
)
def test_options_are_checked_when_an_entry_is_made(calibrated, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PlanEntry(4, 16, solver="toy", options=options)


def test_methods_without_options_say_so():
    with pytest.raises(InvalidArgumentError, match="options of minmax must be among none: got 'damp'"):
        PlanEntry(4, 16, options={"damp": 1.0})


def test_options_are_part_of_a_plan(calibrated, tmp_path):
    entry = PlanEntry(4, 16, solver="toy", options={"ordered": True})
    assert str(entry) == "b4g16 toy, ordered True"
    assert hash(entry) == hash(PlanEntry(4, 16, solver="toy"))
    plan = Plan({"a": entry, "b": PlanEntry(4, 16)})
    plan.save(tmp_path / "plan.json")
    assert "options" not in plan.to_json()["entries"]["b"]
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.entries == plan.entries
    assert list(plan.diff(Plan({"a": PlanEntry(4, 16, solver="toy"), "b": PlanEntry(4, 16)}))) == ["a"]


def test_quantize_passes_options_on_or_says_where_they_belong():
    model = tiny_model("llama")
    with pytest.raises(InvalidArgumentError, match=r"\[quantize\] options of minmax must be among none: got 'damp'"):
        qtr.quantize(model, bits=4, damp=0.5)
    plan = Plan({"model.layers.0.mlp.up_proj": PlanEntry(4, 16)})
    with pytest.raises(InvalidArgumentError, match="damp belongs into the options of the plan's entries"):
        qtr.quantize(model, plan=plan, damp=0.5)
