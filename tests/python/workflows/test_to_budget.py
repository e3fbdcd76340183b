"""One call from a model to the best quantized model for a budget."""

import dataclasses

import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, Plan
from quantrature.analysis import integrate_plan
from quantrature.analysis.sensitivity import Sensitivity
from quantrature.evaluate import divergence
from quantrature.nn import quantized_layers
from quantrature.to_budget import EFFORTS, Effort, quantize_to_budget
from sharp_models import sharp_model

TEXT = torch.randint(0, 250, (20, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_efforts(monkeypatch):
    """The same steps on fewer windows."""
    monkeypatch.setitem(EFFORTS, "fast", Effort(2, 2, 0, 6, 3))
    monkeypatch.setitem(EFFORTS, "default", Effort(2, 2, 2, 6, 3))


def analyzed(model, **settings):
    return qtr.analyze(
        model, TEXT[:3], objective="kl", metrics=["pqi"], bits=[3, 4], group_size=32, nodes=3, **settings
    )


def mixed_plan(found):
    names = [m.name for m in found.matrices]
    plan = Plan.uniform(names, qtr.PlanEntry(4, 32))
    for name in names[::2]:
        plan = plan.replace(name, bits=2)
    return plan.replace(names[1], bits=16)


def test_an_integral_at_a_plan_predicts_what_is_measured(tmp_path):
    model = sharp_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = analyzed(model)
    plan = mixed_plan(found)
    more = integrate_plan(model, TEXT[:3], found, plan)
    (at_plan,) = more.plans
    assert set(at_plan.settings) == {name for name, entry in plan if not entry.keeps}
    assert at_plan.proof.predicted_loss_change == pytest.approx(sum(at_plan.loss_change.values()))
    assert at_plan.proof.predicted_loss_change == pytest.approx(at_plan.proof.measured_loss_change, rel=0.02)
    reference = sharp_model()
    expected = divergence(qtr.quantize(sharp_model(), plan=plan), reference, TEXT[:3]).mean
    assert at_plan.proof.measured_loss_change == pytest.approx(expected, rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    more.save(tmp_path / "sens")
    assert Sensitivity.load(tmp_path / "sens").plans == more.plans


def test_a_plan_that_was_integrated_is_predicted_as_it_was_integrated():
    model = sharp_model()
    found = analyzed(model)
    names = [m.name for m in found.matrices]
    pin = {name: "b2g32" if i % 2 else "b4g32" for i, name in enumerate(names)}
    plan = qtr.allocate(found, avg_bits=16, pin=pin, groups="none")
    more = integrate_plan(model, TEXT[:3], found, plan)
    again = qtr.allocate(more, avg_bits=16, pin=pin, groups="none")
    measured = more.plans[0].proof.measured_loss_change
    assert again.predicted_loss_change == pytest.approx(measured, rel=0.02)
    assert abs(again.predicted_loss_change - measured) <= abs(plan.predicted_loss_change - measured)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, f, p: (sharp_model("qwen2"), TEXT[:3], f, p), "model must be the model that was analyzed"),
        (lambda m, f, p: (m, TEXT[:2], f, p), "windows must be those of the analysis"),
        (
            lambda m, f, p: (m, TEXT[:3], dataclasses.replace(f, matrices=f.matrices[1:]), p),
            "plan must have matrices of the analysis",
        ),
    ],
)
def test_what_does_not_belong_to_the_analysis_is_refused(change, message):
    model = sharp_model()
    found = analyzed(model)
    with pytest.raises(InvalidArgumentError, match=message):
        integrate_plan(*change(model, found, mixed_plan(found)))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_the_result_keeps_the_budget_and_says_what_it_costs(method, effort):
    model = sharp_model()
    result = quantize_to_budget(model, TEXT, avg_bits=4.5, method=method, effort=effort, group_size=32, seqlen=48)
    assert result.model is model
    assert len(quantized_layers(model)) == len(result.plan)
    assert {entry.method for _, entry in result.plan} == {method}
    assert 3.5 < result.plan.allocation["bits_per_weight"] <= 4.5
    assert len(result.sensitivity.plans) in ({0} if effort == "fast" else {1, 2})
    assert result.held_out.windows == 3
    if method == "rtn":  # gptq fits its 300 tokens of random text much better than others
        assert result.held_out.divergence == pytest.approx(result.plan.predicted_loss_change, rel=0.5)


def test_held_out_windows_are_not_those_that_were_chosen_on():
    result = quantize_to_budget(sharp_model(), TEXT, avg_bits=4.5, method="rtn", effort="fast", seqlen=48)
    order = torch.randperm(len(TEXT), generator=torch.Generator().manual_seed(0))
    original = sharp_model()
    assert divergence(result.model, original, TEXT[order[:3]]).mean == pytest.approx(
        result.held_out.divergence, rel=1e-3
    )
    assert result.sensitivity.calibration == qtr.models.fingerprint.of_tokens(TEXT[order[3:5]])


def test_the_smallest_model_within_a_divergence():
    how = {"method": "rtn", "effort": "fast", "group_size": 32, "seqlen": 48}
    middle = quantize_to_budget(sharp_model(), TEXT, avg_bits=5, **how).plan
    loose, tight = (
        quantize_to_budget(sharp_model(), TEXT, max_divergence=middle.predicted_loss_change * times, **how).plan
        for times in (3, 1.001)
    )
    assert loose.predicted_loss_change <= 3 * middle.predicted_loss_change
    assert tight.predicted_loss_change <= 1.001 * middle.predicted_loss_change
    assert loose.allocation["bits_per_weight"] < tight.allocation["bits_per_weight"] <= 5.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of avg_bits, target_bytes, max_divergence: got none"),
        ({"avg_bits": 4, "target_bytes": 4}, "got avg_bits, target_bytes"),
        ({"avg_bits": 4, "effort": "some"}, "effort must be one of fast, default, best: got 'some'"),
        ({"avg_bits": 4, "method": "best"}, "method must be one of"),
        ({"avg_bits": 0.5}, "avg_bits must be at least"),
        ({"max_divergence": -1.0}, "max_divergence must be above 0: got -1"),
        ({"max_divergence": 1e-12}, "max_divergence cannot be reached: the least predicted divergence is"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        quantize_to_budget(sharp_model(), TEXT, **{"method": "rtn", "effort": "fast", "seqlen": 48, **arguments})


def test_a_text_of_one_window_is_refused():
    with pytest.raises(InvalidArgumentError, match="calibration must have at least 2 windows of 48 tokens"):
        quantize_to_budget(sharp_model(), TEXT[:1], avg_bits=4, seqlen=48)
