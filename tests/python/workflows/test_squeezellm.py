"""SqueezeLLM: tables by weighted k-means, its own sparse part, and how a share of outliers spreads over matrices."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from transformers import AutoModelForCausalLM

import quantrature as qtr
from quantrature import InvalidArgumentError, PlanEntry, checkpoint, models, ops
from quantrature.methods import Statistics, quantize_matrix
from quantrature.methods.squeezellm import outlier_shares
from quantrature.nn import quantized_layers
from quantrature.plan.option import stored_bytes
from quantrature.quantization import Request, plan_for, text_settings
from sharp_models import TOKENS, sharp_model
from sharp_models import loss as loss_of
from tiny_models import tiny_model

WEIGHT = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * 0.02
FISHER = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)).mul(2).exp() * 1e-9


def entry(bits=3, **changes):
    return PlanEntry(bits, -1, method="squeezellm", **changes)


def quantized(weight=WEIGHT, fisher=FISHER, kept=None, **changes):
    return quantize_matrix("w", weight, entry(**changes), kept, Statistics(fisher=fisher))


def loss(weight, image, fisher):
    return float((fisher.double() * (weight.double() - image.double()).square()).sum())


def least_loss(x, f, k):
    """Over all ways to cut the sorted numbers into k runs."""
    order = np.argsort(x, kind="stable")
    x, f = x[order].astype(np.float64), f[order].astype(np.float64)

    def cost(run):
        return (f[run] * (x[run] - np.average(x[run], weights=f[run])) ** 2).sum()

    cuts = itertools.combinations(range(1, len(x)), min(k, len(x)) - 1)
    return min(sum(cost(slice(a, b)) for a, b in itertools.pairwise((0, *c, len(x)))) for c in cuts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(5, 11), st.integers(0, 2**32 - 1))
def test_no_other_tables_are_better(bits, cols, seed):
    rng = np.random.default_rng(seed)
    w, f = rng.standard_normal((3, cols)).astype(np.float32), rng.random((3, cols)).astype(np.float32) + 0.01
    matrix = quantized(torch.tensor(w), torch.tensor(f), bits=bits)
    image = matrix.dequantize().numpy()
    for row in range(3):
        # Tables of float16 cost a rounding: at most half of a last place of each centroid, in the square.
        rounding = 2 * (np.abs(w[row]).max() * 2.0**-11) * np.sqrt(f[row].sum())
        least = least_loss(w[row], f[row], 1 << bits)
        assert np.sqrt((f[row] * (w[row] - image[row]) ** 2).sum()) <= np.sqrt(least) + rounding


def test_oracles():
    # Two clusters of 0, 1, 2 and 10, 11, 12; with one weight doubled.
    x = torch.tensor([[0.0, 1, 2, 10, 11, 12]])
    plain = quantized(x, torch.ones(1, 6), bits=1)
    assert plain.dense.table.tolist() == [[1, 11]]
    assert loss(x, plain.dequantize(), torch.ones(1, 6)) == 4
    doubled = torch.tensor([[1.0, 1, 2, 1, 1, 1]])
    weighted = quantized(x, doubled, bits=1)
    assert weighted.dense.table.tolist() == [[1.25, 11]]
    assert loss(x, weighted.dequantize(), doubled) == 4.75


def test_weights_that_matter_are_better_kept():
    plain = quantized(fisher=torch.ones_like(FISHER))
    weighted = quantized()
    assert loss(WEIGHT, weighted.dequantize(), FISHER) < 0.7 * loss(WEIGHT, plain.dequantize(), FISHER)
    rtn = quantize_matrix("w", WEIGHT, PlanEntry(3, -1))
    assert loss(WEIGHT, plain.dequantize(), torch.ones_like(FISHER)) < loss(
        WEIGHT, rtn.dequantize(), torch.ones_like(FISHER)
    )


def test_the_scale_of_the_information_does_not_matter():
    a, b = quantized(), quantized(fisher=FISHER * 2.0**30)
    assert torch.equal(a.dense.table, b.dense.table)
    assert torch.equal(a.dense.codes, b.dense.codes)


def test_a_weight_of_twice_the_information_counts_as_two():
    x, f = WEIGHT[:, :40].contiguous(), FISHER[:, :40].contiguous()
    twice = torch.cat([x, x[:, :5]], 1)
    doubled = f.clone()
    doubled[:, :5] *= 2
    a, b = quantized(x, doubled), quantized(twice, torch.cat([f, f[:, :5]], 1))
    assert torch.equal(a.dense.table, b.dense.table)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_counted_and_every_code_is_that_of_the_nearest_entry(bits):
    matrix = quantized(bits=bits)
    table = matrix.dense.table
    assert table.dtype == torch.float16
    assert table.shape == (24, 1 << bits)
    assert matrix.nbytes == 24 * (bits * 96 // 8) + 2 * table.numel()
    distances = (WEIGHT[:, :, None].double() - table[:, None, :].double()).abs()
    assert torch.equal(matrix.dense.unpack().long(), distances.argmin(-1))


def test_tables_that_float16_cannot_hold_are_wide():
    assert quantized(WEIGHT * 1e8).dense.table.dtype == torch.float32
    assert quantized(WEIGHT * 1e-5).dense.table.dtype == torch.float32
    with_zeros = WEIGHT.clone()
    with_zeros[3] = 0
    assert quantized(with_zeros).dense.table.dtype == torch.float16
    assert not quantized(with_zeros).dequantize()[3].any()


def test_rows_without_information_count_all_weights_alike():
    fisher = FISHER.clone()
    fisher[5] = 0
    matrix = quantized(fisher=fisher)
    alike, _ = ops.kmeans_1d(WEIGHT[5], 8)
    assert torch.equal(matrix.dense.table[5], alike.half())


def test_kept_weights_are_left_out_of_the_fit():
    weight, fisher = WEIGHT.clone(), FISHER.clone()
    kept = torch.tensor([0, 3, 96, 97, 24 * 96 - 1])
    weight.view(-1)[kept] = 5.0
    fisher.view(-1)[kept] = 1.0
    fisher[2] = 0
    fisher[2, 7], weight[2, 7] = 1.0, 3.0  # nothing else is known of this row
    kept = torch.cat([kept, torch.tensor([2 * 96 + 7])]).sort().values
    matrix = quantized(weight, fisher, kept)
    assert torch.equal(matrix.outliers.positions(), kept)
    assert torch.equal(matrix.dequantize().view(-1)[kept], weight.view(-1)[kept])
    assert float(matrix.dense.table.abs().max()) < 1
    masked = fisher.clone()
    masked.view(-1)[kept] = 0
    masked[2] = 1
    masked[2, 7] = 0
    centroids, _ = ops.kmeans_1d(weight, 8, masked)
    assert torch.equal(matrix.dense.table, centroids.half())


def test_a_row_that_is_kept_whole():
    matrix = quantized(kept=torch.arange(96, 192))
    assert torch.equal(matrix.dequantize()[1], WEIGHT[1])


def test_sensitive_and_large_weights_are_kept_together():
    matrix = quantized(outlier_fraction=0.01, options={"sensitive": 0.005})
    places = set(matrix.outliers.positions().tolist())
    sensitive = FISHER.flatten().topk(12).indices
    rest = WEIGHT.abs().flatten().index_fill(0, sensitive, -1.0)
    assert places == set(sensitive.tolist()) | set(rest.topk(23).indices.tolist())
    assert len(places) == 35
    shape = WEIGHT.shape
    for one in ({"outlier_fraction": 0.01}, {"options": {"sensitive": 0.005}}):
        assert stored_bytes(*shape, entry(**one), "float32") == quantized(**one).nbytes
    both = {"outlier_fraction": 0.01, "options": {"sensitive": 0.005}}
    assert stored_bytes(*shape, entry(**both), "float32") == matrix.nbytes
    without = quantized()
    assert loss(WEIGHT, matrix.dequantize(), FISHER) < loss(WEIGHT, without.dequantize(), FISHER)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.0045, 0.05])
def test_a_share_of_outliers_spreads_by_one_reach(share):
    generator = torch.Generator().manual_seed(3)
    weights = {
        "normal": torch.randn(200, 300, generator=generator),
        "small": torch.randn(100, 100, generator=generator) * 1e-3,
        "tails": torch.randn(150, 200, generator=generator) ** 3,
        "constant": torch.ones(30, 30),
    }
    shares = outlier_shares(weights, share)
    total = sum(w.numel() for w in weights.values())
    counts = {name: round(shares[name] * w.numel()) for name, w in weights.items()}
    assert all(counts[name] == shares[name] * weights[name].numel() for name in weights)
    assert share * total - 2 <= sum(counts.values()) <= round(share * total)
    assert counts["constant"] == 0
    if share == 0.0045:
        assert shares["tails"] > 3 * max(shares["normal"], 1e-9)
    # Some one reach explains all counts.
    reaches = []
    for name, weight in weights.items():
        low, high = np.percentile(weight.numpy(), [25, 75])
        magnitudes = weight.abs().flatten().sort(descending=True).values.double()
        if counts[name] and high > low:
            reach = [min((m + low), (m - high)) / (high - low) for m in magnitudes[counts[name] - 1 : counts[name] + 1]]
            reaches.append(reach)
    assert max((r[1] for r in reaches), default=0) <= min((r[0] for r in reaches), default=0) + 1e-4


def test_a_normal_matrix_has_the_outliers_that_its_distribution_says():
    weight = {"w": torch.randn(2000, 2000, generator=torch.Generator().manual_seed(0))}
    for reach in (1.5, 1.8):
        expected = 2 * norm.sf(norm.ppf(0.75) * (1 + 2 * reach))
        found = outlier_shares(weight, expected)["w"]
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_plan_has_the_share_of_each_matrix():
    model = tiny_model("llama")
    linears, plan = plan_for(model, Request(bits=3, method="squeezellm", outlier_fraction=0.02))
    shares = outlier_shares({linear.name: linear.weight for linear in linears}, 0.02)
    assert {name: entry.outlier_fraction for name, entry in plan} == shares
    assert len(set(shares.values())) > 3
    assert all(entry.group_size == -1 for _, entry in plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sym": True}, "sym must be false with squeezellm"),
        ({"meta_bits": 8}, "meta_bits must be null with squeezellm, which has no scales: got 8"),
        ({"options": {"sensitive": 1.5}}, "option sensitive of squeezellm must be a fraction from 0 to 1: got 1.5"),
        ({"options": {"share": 0.1}}, "options of squeezellm must be one of sensitive: got 'share'"),
    ],
)
def test_settings_it_has_not_are_refused(changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        entry(**changes)


def test_groups_are_refused():
    with pytest.raises(InvalidArgumentError, match="group_size of squeezellm must be -1: got 64"):
        PlanEntry(3, 64, method="squeezellm")


def test_bad_information_is_named():
    with pytest.raises(InvalidArgumentError, match="w: .kmeans. weights must be finite and not negative"):
        quantized(fisher=-FISHER)
    with pytest.raises(
        InvalidArgumentError, match="w: method squeezellm needs calibration text, to compute the fisher"
    ):
        quantize_matrix("w", WEIGHT, entry())


def test_a_model_goes_through_a_checkpoint(tmp_path):
    model = qtr.quantize(
        sharp_model(),
        bits=3,
        method="squeezellm",
        outlier_fraction=0.01,
        sensitive=0.002,
        calibration=TOKENS,
        nsamples=None,
        progress=False,
    )
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    contents = checkpoint.inspect(tmp_path / "out")
    assert all(m["codebook"] == "rows" and m["outliers"] > 0 for m in contents.modules.values())
    layers = quantized_layers(loaded)
    stored = sum(t.numel() * t.element_size() for layer in layers.values() for t in layer.stored().values())
    assert contents.bytes == stored


def test_it_is_better_by_what_the_text_says():
    losses = {}
    for method, group_size in (("squeezellm", 64), ("rtn", -1)):
        model = qtr.quantize(
            sharp_model(),
            bits=3,
            group_size=group_size,
            method=method,
            calibration=TOKENS if method == "squeezellm" else None,
            nsamples=None,
            progress=False,
        )
        with torch.no_grad():
            losses[method] = float(loss_of(model))
    with torch.no_grad():
        before = float(loss_of(sharp_model()))
    assert losses["squeezellm"] - before < 0.5 * (losses["rtn"] - before)


def test_requant_keeps_weights_beside_tables_that_are_fitted_without_them():
    model = sharp_model()
    original = {linear.name: linear.weight.clone() for linear in models.find_linears(model)}
    _, record = qtr.requant(
        model,
        TOKENS,
        bits=2,
        method="squeezellm",
        outlier_fraction=0.01,
        significant_fraction=0.005,
        nodes=2,
        batch_size=4,
        progress=False,
    )
    total = sum(w.numel() for w in original.values())
    assert (record.outliers, record.significant) == (round(0.01 * total), round(0.005 * total))
    outliers_of = {matrix.name: matrix.outliers for matrix in record.matrices}
    for name, layer in quantized_layers(model).items():
        outliers = layer.matrix.outliers
        ordered = original[name].abs().flatten().sort(descending=True).values
        largest_fitted = float(ordered[outliers_of[name]])
        assert float(layer.matrix.dense.table.abs().max()) <= largest_fitted * (1 + 2**-10)
        if outliers is not None:
            places = outliers.positions()
            assert torch.equal(layer.dequantize().flatten()[places], original[name].flatten()[places])


def test_the_calibration_text_is_as_long_as_that_of_the_authors():
    def of(*solvers, nsamples="auto"):
        entries = {name: PlanEntry(3, -1, method=name) for name in solvers}
        return text_settings(qtr.Plan(entries), nsamples)

    assert of("squeezellm") == {"nsamples": 100, "longest": 512}
    assert of("awq") == {"nsamples": 128, "longest": 512}
    assert of("gptq") == of("qtip") == {"nsamples": 128, "longest": 2048}
    assert of("squeezellm", "gptq") == {"nsamples": 128, "longest": 2048}
    assert of("squeezellm", nsamples=7)["nsamples"] == 7
    assert of("squeezellm", nsamples=None)["nsamples"] is None
    with pytest.raises(InvalidArgumentError, match="nsamples must be an integer, auto or None: got 'all'"):
        of("squeezellm", nsamples="all")


def test_so_many_windows_are_drawn(monkeypatch):
    from quantrature import text

    seen = {}

    def noted(*args, **named):
        seen.update(named)
        return TOKENS

    monkeypatch.setattr(text, "token_windows", noted)
    qtr.quantize(tiny_model("llama"), bits=3, method="squeezellm", calibration=TOKENS)
    assert (seen["nsamples"], seen["longest"], seen["seqlen"]) == (100, 512, None)
