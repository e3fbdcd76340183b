"""What an implementation of arXiv 2503.01901 must show, on the model that comes with the demo; settings and tables of
the paper are named where a test stands for one."""

import functools

import pytest
import torch

import quantrature as qtr
from quantrature import analysis, models, ops
from quantrature.analysis.integral import integrate
from quantrature.analysis.objective import Loss, mean_over
from quantrature.analysis.path import Moved, WeightPath
from quantrature.demo.text import calibration_text
from quantrature.demo.tour import MODEL
from quantrature.methods import image_of, quantize_matrix
from quantrature.models.running import not_training
from quantrature.plan import PlanEntry
from quantrature.requantization import KeptWeights, Requantization, Stage

ENTRY = PlanEntry(3, 64)


@pytest.fixture(scope="module")
def windows():
    ids = models.load_tokenizer(MODEL)(calibration_text()[:60000])["input_ids"]
    return torch.tensor(ids[: 32 * 128]).view(32, 128)[::4]


@pytest.fixture(scope="module")
def way(windows):
    """Loss and slope anywhere on the way, and what a rule predicts."""
    model = models.load_model(MODEL, "float32")
    moved = [Moved(linear, image_of(linear.name, linear.weight, ENTRY)) for linear in models.find_linears(model)]
    with not_training(model), WeightPath(model, moved) as path:

        class Way:
            @staticmethod
            def loss(t):
                path.move_to(t)
                return mean_over(Loss(), model, windows, 8)

            @staticmethod
            @functools.cache
            def slope(t):
                return sum(integrate(path, windows, [(t, 1.0)], batch_size=8).signed.values())

            def error(self, rule, nodes):
                return sum(w * self.slope(t) for t, w in analysis.quadrature(rule, nodes)) / self.true - 1

        found = Way()
        found.true = found.loss(1) - found.loss(0)
        yield found


@pytest.fixture(scope="module")
def found(windows):
    model = models.load_model(MODEL, "float32")
    return qtr.analyze(model, windows, metrics=["pqi", "first_order", "fisher"], bits=3, nodes=3, batch_size=8)


def test_the_integral_is_complete(way):
    """Table 3: 0.16 % at 32 intervals."""
    assert abs(way.error("paper", 33)) < 0.01
    assert abs(way.error("midpoint", 16)) < 0.001
    assert abs(way.error("gauss", 3)) < 0.001


def test_rules_converge_at_their_order_on_a_model(way):
    assert way.error("paper", 5) / way.error("paper", 9) == pytest.approx(2, rel=0.1)
    assert way.error("paper", 17) / way.error("paper", 33) == pytest.approx(2, rel=0.1)
    assert way.error("midpoint", 4) / way.error("midpoint", 8) == pytest.approx(4, rel=0.1)
    assert 0.15 < way.error("right", 4) < 0.45  # about a quarter too much


def test_what_is_measured_at_the_original_weights_says_little(way, found):
    """Tables 1 and 2: first order and diagonal Fisher fail, a second-order expansion along the way does not."""
    total = {metric: sum(m.scores[metric] for m in found.matrices) for metric in ("first_order", "fisher")}
    assert abs(total["first_order"]) < 0.3 * way.true
    assert total["fisher"] < 0.02 * way.true
    step = 0.05
    curvature = (way.loss(step) - way.loss(0) - step * way.slope(0.0)) / step**2
    assert way.slope(0.0) + curvature == pytest.approx(way.true, rel=0.35)


def test_absolute_values_mostly_cancel_and_gather_in_few_weights(way, found):
    """Tables 4 and 5."""
    every = torch.cat([values.flatten() for values in found.maps["pqi"].values()]).double()
    assert float(every.sum()) > 20 * way.true
    top = every.sort(descending=True).values
    for share, held in ((0.0015, 0.0453), (0.0071, 0.1129), (0.0525, 0.3406)):
        assert float(top[: round(share * len(top))].sum() / top.sum()) == pytest.approx(held, rel=0.4)
    by_role = {}
    for matrix in found.matrices:
        by_role.setdefault(matrix.role.split(".")[-1], []).append(matrix.scores["pqi"])
    mean = {role: sum(scores) / len(scores) for role, scores in by_role.items()}
    assert mean["v_proj"] > mean["k_proj"] > mean["q_proj"]
    assert mean["o_proj"] > mean["down_proj"] > mean["up_proj"]


def requantized(windows, **settings):
    model = models.load_model(MODEL, "float32")
    return qtr.requant(model, windows, bits=3, nodes=2, batch_size=8, prove=False, **settings)[1]


def test_the_order_of_the_ablation(windows, way):
    """Table 8: both < outliers by PQI <= everywhere alike < nothing; significant alone between; random like nothing."""
    both = requantized(windows, significant_fraction=0.002)
    nothing, outliers = both.stages[0].measured_loss_change, both.stages[1].measured_loss_change
    significant = requantized(windows, outlier_fraction=0.0, significant_fraction=0.002).measured_loss_change
    evenly = requantized(windows, significant_fraction=0.0, temperatures=(float("inf"),)).measured_loss_change
    assert both.measured_loss_change < outliers <= evenly < nothing
    assert outliers < significant < nothing
    assert nothing == pytest.approx(way.true, rel=1e-3)

    model = models.load_model(MODEL, "float32")
    generator = torch.Generator().manual_seed(0)
    moved = []
    for linear in models.find_linears(model):
        places = torch.randperm(linear.numel, generator=generator)[: round(0.0065 * linear.numel)].sort().values
        stored = quantize_matrix(linear.name, linear.weight, ENTRY, places)
        moved.append(Moved(linear, lambda stored=stored: stored.dequantize("float32")))
    with not_training(model), WeightPath(model, moved) as path:
        before = mean_over(Loss(), model, windows, 8)
        path.move_to(1)
        assert mean_over(Loss(), model, windows, 8) - before == pytest.approx(nothing, rel=0.1)


def test_a_second_step_is_enough(windows):
    """Table 8: steps of 0.05, 0.025 and 0.0125 % end within a hundredth of the loss change of each other."""
    ends = [
        requantized(windows, significant_fraction=0.002, steps=steps, temperatures=(1.0,)).measured_loss_change
        for steps in (1, 2, 4)
    ]
    assert max(ends) < 1.1 * min(ends)


@pytest.mark.parametrize(
    ("grid", "outliers", "significant", "bits"),
    [(2.02, 0, 0.5, 2.26), (4.02, 0, 0.5, 4.26), (3, 0.45, 0.05, 3.24), (4, 0.45, 0.05, 4.24), (3.125, 0.25, 0, 3.245)],
)
def test_bits_by_the_rule_of_the_paper(grid, outliers, significant, bits):
    """Tables 6 and 7 for QTIP, SqueezeLLM and AWQ in groups of 256."""
    weights = 10**7
    kept = KeptWeights("m", weights, round(outliers / 100 * weights), round(significant / 100 * weights))
    size = round(grid * weights / 8)
    record = Requantization((kept,), (Stage("host", 0, 0.0),), (), None, size, size, {}, "", "")
    assert record.paper_bits_per_weight == pytest.approx(bits, abs=1e-6)


def test_a_kept_weight_takes_less_than_the_48_bits_of_the_paper():
    w = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    for share, least in ((0.0005, 42), (0.005, 35)):
        sparse = ops.extract_outliers(w, fraction=share)[1]
        assert 8 * sparse.nbytes / sparse.nnz < least
