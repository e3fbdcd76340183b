"""GPTQ's error feedback and the Hessian it goes by, against plain torch, identities and worked examples."""

import logging
import math

import numpy as np
import pytest
import torch

import quantrature as qtr
from quantrature import InvalidArgumentError, PlanEntry, ops
from quantrature.methods import Statistics, quantize_matrix


def layer(rows, cols, tokens=400, seed=0):
    """Weights and the Hessian of inputs whose channels differ in size and go together."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=g)
    mixed = torch.eye(cols) + 0.4 * torch.randn(cols, cols, generator=g) / math.sqrt(cols)
    x = torch.randn(tokens, cols, generator=g) @ mixed * torch.randn(cols, generator=g).exp()
    return weight, (x.mT @ x / tokens).contiguous()


def plain(weight, hessian, grid, damp=0.01, ordered=True, kept=None):
    """GPTQ as the paper has it: the Cholesky factor of the inverse Hessian, errors pushed to later columns."""
    cols = weight.shape[1]
    scale, zero = (x.double().repeat_interleave(-(-cols // x.shape[1]), 1)[:, :cols] for x in (grid.scale, grid.zero))
    order = torch.argsort(hessian.diag(), descending=True, stable=True) if ordered else torch.arange(cols)
    h = hessian.double()[order][:, order]
    h = h + damp * h.diag().mean() * torch.eye(cols, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, codes, loss = weight.double()[:, order].clone(), torch.zeros_like(weight, dtype=torch.uint8), 0.0
    for k, column in enumerate(order.tolist()):
        s, z = scale[:, column], zero[:, column]
        code = (w[:, k] / s + z).round().clamp(0, 2**grid.bits - 1)
        value = (code - z) * s
        if kept is not None:
            value = torch.where(kept[:, column], weight[:, column].double(), value)
        error = (w[:, k] - value) / u[k, k]
        loss += float(error.square().sum())
        w[:, k:] -= error[:, None] * u[k, k:]
        codes[:, column] = code.to(torch.uint8)
    return codes, loss


def loss_of(weight, image, hessian):
    apart = (weight - image).double()
    return float(torch.einsum("ri,ij,rj->", apart, hessian.double(), apart))


def test_the_worked_example_of_two_columns():
    weight = torch.tensor([[0.6, 0.6]])
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    grid = ops.quantize(torch.tensor([[0.0, 3.0]]), 2, -1)  # the integers
    found, feedback = ops.gptq(weight, hessian, grid, damp_percent=0.0, desc_act=False)
    assert found.unpack().tolist() == [[1, 0]]
    assert feedback.loss == pytest.approx(0.56, rel=1e-6)
    assert feedback.dead == 0


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, -1), (4, 32), (8, 7)])
def test_equals_plain_torch(bits, group, ordered):
    weight, hessian = layer(70, 96)
    grid = ops.quantize(weight, bits, group, scale_dtype="float32")
    found, feedback = ops.gptq(weight, hessian, grid, desc_act=ordered)
    group = weight.shape[1] if group == -1 else group
    full = ops.quantize(weight, bits, group, scale_dtype="float32")
    index = torch.arange(96) // group
    wide = type(full)(full.codes, full.scale[:, index], full.zero[:, index], bits, 1, 1, False, full.shape, full.dtype)
    codes, loss = plain(weight, hessian, wide, ordered=ordered)
    # A number that float32 and float64 round apart changes the rest of its row.
    rows = (found.unpack() == codes).all(dim=1)
    assert rows.float().mean() > 0.9
    assert feedback.loss == pytest.approx(loss, rel=2e-3)
    nearest = loss_of(weight, full.dequantize(), hessian)
    assert loss_of(weight, found.dequantize(), hessian) < 0.9 * nearest


def plain_fitted(weight, hessian, bits, group, ordered, sym=False, kept=None, damp=0.01):
    """The same with grids that are found group after group, from the weights as they are by then."""
    cols = weight.shape[1]
    diagonal = hessian.diag()
    order = torch.arange(cols)
    if ordered:
        largest = torch.stack([part.max() for part in diagonal.split(group)])
        parts = order.split(group)
        order = torch.cat(
            [
                parts[g][diagonal[parts[g]].argsort(descending=True, stable=True)]
                for g in largest.argsort(descending=True, stable=True).tolist()
            ]
        )
    h = hessian.double()[order][:, order]
    h = h + damp * h.diag().mean() * torch.eye(cols, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, codes = weight.double()[:, order].clone(), torch.zeros_like(weight, dtype=torch.uint8)
    scales, zeros = {}, {}
    for k, column in enumerate(order.tolist()):
        g = column // group
        if g not in scales:
            now = w[:, k : k + int((order // group == g).sum())].clone()
            if kept is not None:
                now[kept[:, order[k : k + now.shape[1]]]] = math.nan
            low, high = now.nan_to_num(nan=1e9).amin(1), now.nan_to_num(nan=-1e9).amax(1)
            if sym:
                m = torch.maximum(low.abs(), high.abs())
                scales[g], zeros[g] = 2 * m / (2**bits - 1), torch.full_like(m, 2 ** (bits - 1))
            else:
                scales[g] = (high - low) / (2**bits - 1)
                zeros[g] = -low / scales[g]
            scales[g], zeros[g] = scales[g].half().double(), zeros[g].half().double()
        code = (w[:, k] / scales[g] + zeros[g]).round().clamp(0, 2**bits - 1)
        value = (code - zeros[g]) * scales[g]
        if kept is not None:
            value = torch.where(kept[:, column], weight[:, column].double(), value)
        error = (w[:, k] - value) / u[k, k]
        w[:, k:] -= error[:, None] * u[k, k:]
        codes[:, column] = code.to(torch.uint8)
    groups = sorted(scales)
    return codes, torch.stack([scales[g] for g in groups], 1), torch.stack([zeros[g] for g in groups], 1)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, -1), (4, 32), (3, 12), (2, 7)])
def test_grids_found_on_the_way_equal_plain_torch(bits, group, sym, ordered):
    weight, hessian = layer(70, 90)
    found, feedback = ops.gptq(weight, hessian, bits=bits, group_size=group, sym=sym, desc_act=ordered)
    assert (found.bits, found.group_size, found.sym, found.scale.dtype) == (bits, group, sym, torch.float16)
    codes, scale, zero = plain_fitted(weight, hessian, bits, 90 if group == -1 else group, ordered, sym)
    rows = (found.unpack() == codes).all(dim=1)
    assert rows.float().mean() > 0.85
    torch.testing.assert_close(found.scale.double()[rows], scale[rows], rtol=2e-3, atol=0)
    if not sym:
        torch.testing.assert_close(found.zero.double()[rows], zero[rows], rtol=2e-3, atol=2e-3)
    damped = hessian + 0.01 * hessian.diag().mean() * torch.eye(90)
    assert feedback.loss == pytest.approx(loss_of(weight, found.dequantize("float32"), damped), rel=1e-3)


@pytest.mark.parametrize("ordered", [False, True])
def test_weights_that_are_kept_take_no_part_in_grids_found_on_the_way(ordered):
    weight, hessian = layer(64, 64)
    weight[3, 5] = 30.0
    _, outliers = ops.extract_outliers(weight, fraction=0.02)
    kept = torch.zeros(64, 64, dtype=torch.bool)
    kept.view(-1)[outliers.positions()] = True
    found, feedback = ops.gptq(weight, hessian, bits=3, group_size=32, desc_act=ordered, exclude=outliers)
    codes, scale, _ = plain_fitted(weight, hessian, 3, 32, ordered, kept=kept)
    rows = ((found.unpack() == codes) | kept).all(dim=1)
    assert rows.float().mean() > 0.9
    torch.testing.assert_close(found.scale.double()[rows], scale[rows], rtol=2e-3, atol=0)
    image = torch.where(kept, weight, found.dequantize())
    damped = hessian + 0.01 * hessian.diag().mean() * torch.eye(64)
    assert feedback.loss == pytest.approx(loss_of(weight, image, damped), rel=1e-3)


def test_with_a_diagonal_hessian_grids_found_on_the_way_are_those_of_the_weights():
    weight, _ = layer(33, 50)
    hessian = torch.diag(torch.rand(50, generator=torch.Generator().manual_seed(1)) + 0.1)
    for solver in ("minmax", "mse"):
        grid = ops.quantize(weight, 4, 16, solver=solver)
        for ordered in (False, True):
            found, _ = ops.gptq(weight, hessian, bits=4, group_size=16, solver=solver, desc_act=ordered)
            assert torch.equal(found.scale, grid.scale)
            assert torch.equal(found.zero, grid.zero)
            assert (found.unpack() == grid.unpack()).float().mean() > 0.99


def test_grids_found_on_the_way_take_float32_where_float16_is_too_narrow():
    weight, hessian = layer(8, 32)
    found, _ = ops.gptq(weight * 1e-7, hessian, bits=4, group_size=16)
    assert found.scale.dtype == torch.float32
    one, _ = ops.gptq(weight, hessian, bits=4, group_size=16)
    assert (found.unpack() == one.unpack()).float().mean() > 0.9


def test_a_grid_is_given_or_found():
    weight, hessian = layer(8, 32)
    with pytest.raises(InvalidArgumentError, match="give either grid or bits"):
        ops.gptq(weight, hessian)
    with pytest.raises(InvalidArgumentError, match="give either grid or bits"):
        ops.gptq(weight, hessian, ops.quantize(weight, 3, 16), bits=3)
    with pytest.raises(InvalidArgumentError, match="solver must be minmax or mse"):
        ops.gptq(weight, hessian, bits=3, solver="hqq")
    with pytest.raises(InvalidArgumentError, match="range of a group must be finite"):
        ops.gptq(torch.full((2, 32), 3e38) * torch.tensor([1.0, -1.0]).repeat(16), hessian, bits=3, group_size=16)


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_method_has_both_kinds_of_groups(desc_act):
    weight, hessian = layer(24, 64)
    options = {"static_groups": False, "desc_act": desc_act}
    found = quantize_matrix(
        "w", weight, PlanEntry(3, 16, method="gptq", options=options), None, Statistics(hessian=hessian)
    )
    expected, _ = ops.gptq(weight, hessian, bits=3, group_size=16, desc_act=desc_act)
    assert torch.equal(found.dense.codes, expected.codes)
    assert torch.equal(found.dense.scale, expected.scale)
    static = quantize_matrix("w", weight, PlanEntry(3, 16, method="gptq"), None, Statistics(hessian=hessian))
    assert not torch.equal(static.dense.scale, expected.scale)


def test_what_needs_all_groups_at_once_goes_with_static_ones():
    with pytest.raises(InvalidArgumentError, match="grid of gptq must be minmax or mse without static_groups"):
        PlanEntry(3, 16, method="gptq", options={"static_groups": False, "grid": "hqq"})
    with pytest.raises(InvalidArgumentError, match="meta_bits of gptq must be null without static_groups"):
        PlanEntry(3, 16, method="gptq", meta_bits=8, options={"static_groups": False})


def test_the_loss_is_that_of_the_damped_hessian():
    weight, hessian = layer(40, 64)
    found, feedback = ops.gptq(weight, hessian, ops.quantize(weight, 3, 32), damp_percent=0.05)
    damped = hessian + 0.05 * hessian.diag().mean() * torch.eye(64)
    assert feedback.loss == pytest.approx(loss_of(weight, found.dequantize(), damped), rel=1e-4)
    assert feedback.damp_percent == 0.05


def test_a_diagonal_hessian_rounds_to_nearest():
    weight, _ = layer(33, 50)
    grid = ops.quantize(weight, 4, 16, scale_dtype="float32")
    hessian = torch.diag(torch.rand(50, generator=torch.Generator().manual_seed(1)) + 0.1)
    for ordered in (False, True):
        found, _ = ops.gptq(weight, hessian, grid, desc_act=ordered)
        assert (found.unpack() == grid.unpack()).float().mean() > 0.999  # 1 / (1 / inv) is not always inv


def test_kept_weights_are_without_error_and_helped_by_the_others():
    weight, hessian = layer(64, 64)
    weight[3, 5] = 30.0
    _, outliers = ops.extract_outliers(weight, fraction=0.02)
    kept = torch.zeros(64, 64, dtype=torch.bool)
    kept.view(-1)[outliers.positions()] = True
    grid = ops.quantize(weight, 3, 32, exclude=outliers, scale_dtype="float32")
    found, feedback = ops.gptq(weight, hessian, grid, exclude=outliers)
    image = torch.where(kept, weight, found.dequantize())
    damped = hessian + 0.01 * hessian.diag().mean() * torch.eye(64)
    assert feedback.loss == pytest.approx(loss_of(weight, image, damped), rel=1e-3)
    index = torch.arange(64) // 32
    wide = type(grid)(grid.codes, grid.scale[:, index], grid.zero[:, index], 3, 1, 1, False, grid.shape, grid.dtype)
    codes, _ = plain(weight, hessian, wide, kept=kept)
    rows = ((found.unpack() == codes) | kept).all(dim=1)
    assert rows.float().mean() > 0.9
    without, _ = ops.gptq(weight, hessian, grid)
    assert feedback.loss < loss_of(weight, torch.where(kept, weight, without.dequantize()), damped)


def test_dead_columns_get_the_nearest_code_and_pass_nothing_on():
    weight, hessian = layer(20, 40)
    alive = torch.ones(40)
    alive[[4, 17]] = 0
    hessian = hessian * alive[:, None] * alive
    grid = ops.quantize(weight, 3, 40, scale_dtype="float32")
    found, feedback = ops.gptq(weight, hessian, grid)
    assert feedback.dead == 2
    assert torch.equal(found.unpack()[:, [4, 17]], grid.unpack()[:, [4, 17]])
    other = weight.clone()
    other[:, 4] = 0.3
    again, _ = ops.gptq(other, hessian, grid)
    rest = [i for i in range(40) if i != 4]
    assert torch.equal(again.unpack()[:, rest], found.unpack()[:, rest])


def test_damping_is_raised_until_there_is_a_factor():
    weight, _ = layer(8, 24)
    vector = torch.randn(24, generator=torch.Generator().manual_seed(2))
    indefinite = torch.outer(vector, vector)
    indefinite[0, 1] = indefinite[1, 0] = indefinite[0, 1] + 0.15 * indefinite.diag().mean()
    grid = ops.quantize(weight, 4, -1)
    _, feedback = ops.gptq(weight, indefinite, grid)
    assert 0.01 < feedback.damp_percent <= 1
    assert not feedback.failed
    hopeless = torch.eye(24)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    found, feedback = ops.gptq(weight, hopeless, ops.quantize(weight, 4, -1, scale_dtype="float32"))
    assert feedback.failed
    assert (found.unpack() == grid.unpack()).float().mean() > 0.99


def test_matrices_are_named_when_damping_is_raised_or_of_no_use(caplog):
    weight, _ = layer(8, 24)
    hopeless = torch.eye(24)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    with caplog.at_level(logging.WARNING):
        quantize_matrix("layers.3.o", weight, PlanEntry(4, 24, method="gptq"), statistics=Statistics(hessian=hopeless))
    assert "layers.3.o: the Hessian is not positive definite with any damping" in caplog.text


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    weight, hessian = layer(200, 136, seed=4)
    grid = ops.quantize(weight, 3, 64)
    before = qtr.num_threads()
    expected, feedback = ops.gptq(weight, hessian, grid)
    try:
        qtr.set_num_threads(threads)
        found, again = ops.gptq(weight, hessian, grid)
        total = ops.hessian_accumulate(torch.zeros(136, 136), weight)
    finally:
        qtr.set_num_threads(before)
    assert torch.equal(found.codes, expected.codes)
    assert again == feedback
    assert torch.equal(total, ops.hessian_accumulate(torch.zeros(136, 136), weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "cols"), [(1, 1), (3, 33), (256, 32), (700, 75)])
def test_hessian_is_the_sum_of_outer_products(tokens, cols, dtype):
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = torch.zeros(cols, cols)
    assert ops.hessian_accumulate(total, x) is total
    ops.hessian_accumulate(total, x)
    exact = 2 * x.double().mT @ x.double()
    bound = 2 * x.double().abs().mT @ x.double().abs() * (256 + 8) * 2.0**-24
    assert ((total - exact).abs() <= bound).all()
    assert torch.equal(total, total.mT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hessian": torch.eye(5)},
            r"\[gptq\] hessian must have a row and a column for each column of w: got shape=\(5, 5\)",
        ),
        ({"hessian": -torch.eye(4)}, r"\[gptq\] hessian must not be negative on its diagonal: got value=-1, row=0"),
        ({"hessian": torch.full((4, 4), math.nan)}, r"\[gptq\] hessian must be finite: got value=.*nan, row=0, col=0"),
        ({"w": torch.full((2, 4), math.inf)}, r"\[gptq\] w must be finite: got value=inf, row=0, col=0"),
        ({"damp_percent": -1.0}, r"\[gptq\] damp must be finite and not negative: got damp=-1"),
        ({"w": torch.ones(3, 4)}, r"\[gptq\] grid must be one of the shape of w on axis 1: got shape=\(2, 4\), axis=1"),
        ({"exclude": 3}, r"\[gptq\] exclude must have row_offsets and columns: got builtins.int"),
    ],
)
def test_refusals(change, message):
    weight = torch.arange(8.0).view(2, 4)
    given = {"w": weight, "hessian": torch.eye(4), "grid": ops.quantize(weight, 4, -1)} | change
    w, hessian, grid = (given.pop(name) for name in ("w", "hessian", "grid"))
    with pytest.raises(InvalidArgumentError, match=message):
        ops.gptq(w, hessian, grid, **given)


@pytest.mark.parametrize(
    ("total", "x", "message"),
    [
        (np.zeros((3, 3), np.float32), np.ones((2, 4), np.float32), "sum must have a row and a column for each column"),
        (np.zeros((3, 3)), np.ones((2, 3), np.float32), "total must be float32"),
        (np.zeros((3, 3), np.float32), np.ones(3, np.float32), "x must have 2 dimensions"),
    ],
)
def test_hessian_refusals(total, x, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.hessian_accumulate(total, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "odd"}, "option grid of gptq must be minmax, mse or, without sym, hqq: got 'odd'"),
        ({"damp_percent": 2.0}, "option damp_percent of gptq must be a fraction between 0 and 1: got 2.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PlanEntry(4, 64, method="gptq", options=options)
