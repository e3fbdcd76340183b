import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pairwise import pairwise
from quantrature import InvalidArgumentError, ops

EACH = ([True, False], [True, False], ["numpy", "torch"])


@pytest.mark.parametrize(
    ("shape", "axis", "fisher", "bias", "library"),
    [
        *pairwise([(7, 64), (130, 257), (300, 33)], [None, 0, 1], *EACH),
        *pairwise([(1, 5)], [None, 1], *EACH),  # one number alone has no kurtosis
    ],
    indirect=["library"],
)
def test_kurtosis_is_scipys(shape, axis, fisher, bias, library):
    x = (np.random.default_rng(0).standard_t(4, shape) * 0.02 + 5).astype(np.float32)
    expected = scipy.stats.kurtosis(x.astype(np.float64), axis=axis, fisher=fisher, bias=bias)
    np.testing.assert_allclose(ops.kurtosis(library(x), axis, fisher, bias), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(dtype):
    x = torch.randn(40, 100).to(dtype)
    assert ops.kurtosis(x) == ops.kurtosis(x.float())
    np.testing.assert_array_equal(ops.moments(x, axis=0).table, ops.moments(x.float(), axis=0).table)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=80), elements=st.floats(-1e3, 1e3, width=32)
    )
)
def test_moments_of_anything(x):
    wide = x.astype(np.float64)
    m = ops.moments(x, axis=1)
    scale = np.abs(wide).max() + 1e-300
    np.testing.assert_allclose(m.mean, wide.mean(axis=1), atol=1e-14 * scale)
    np.testing.assert_allclose(m.variance, wide.var(axis=1), atol=1e-14 * scale**2)
    np.testing.assert_array_equal(m.minimum, x.min(axis=1))
    np.testing.assert_array_equal(m.maximum, x.max(axis=1))


def test_every_target_gives_the_same_bits(every_target):
    x = np.random.default_rng(1).normal(3, 1, (50, 5000)).astype(np.float32)
    tables = [
        [ops.moments(x, axis, group).table for axis, group in [(None, None), (0, None), (1, 48)]]
        for _ in every_target()
    ]
    for table in tables[1:]:
        for a, b in zip(tables[0], table, strict=True):
            np.testing.assert_array_equal(a, b)


def test_shapes_of_groups():
    x = np.ones((10, 100), np.float32)
    assert ops.moments(x).count == 1000
    assert ops.moments(x, axis=1).count.shape == (10,)
    assert ops.moments(x, axis=1, group_size=32).count.tolist() == [[32, 32, 32, 4]] * 10
    assert ops.moments(x, axis=0, group_size=4).count.shape == (3, 100)
    assert ops.moments(x[0], axis=0).count.shape == ()
    assert ops.moments(x[0], axis=0, group_size=30).count.tolist() == [30, 30, 30, 10]


def test_merge_is_the_union():
    x = np.random.default_rng(2).normal(size=(3, 1000)).astype(np.float32)
    parts = ops.moments(np.ascontiguousarray(x[:, :400]), 1).merge(ops.moments(np.ascontiguousarray(x[:, 400:]), 1))
    np.testing.assert_allclose(parts.kurtosis(), ops.kurtosis(x, 1), rtol=1e-12)
    with pytest.raises(InvalidArgumentError, match=r"\[moments\] merge needs equal shapes"):
        parts.merge(ops.moments(x))


def test_a_constant_has_no_kurtosis():
    assert np.isnan(ops.kurtosis(np.full((4, 4), 2.5, np.float32)))


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        ([1.0], {}, "x must be a NumPy array or a torch tensor: got builtins.list"),
        (np.ones(3), {}, "x must be float32 or float16 or bfloat16: got dtype=float64"),
        (np.ones((4, 4), np.float32)[:, ::2], {}, "x must be contiguous"),
        (np.ones((4, 4), np.float32).T[:, :2], {}, "x must be contiguous"),
        (np.ones((2, 2, 2), np.float32), {}, "x must have 1 or 2 dimensions: got 3"),
        (np.ones((0, 4), np.float32), {}, "x must not be empty"),
        (np.ones((4, 4), np.float32), {"axis": 2}, "axis must be None, 0 or 1"),
        (np.ones(4, np.float32), {"axis": 1}, "axis must be None, 0 or 1 and exist in x"),
        (np.ones((4, 4), np.float32), {"axis": 1, "group_size": 0}, "group_size must be at least 1"),
        (np.ones((4, 4), np.float32), {"group_size": 2}, "goes with an axis"),
    ],
)
def test_bad_input_is_named(x, arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.moments(x, **arguments)


def test_read_only_arrays_and_gradients_are_fine():
    x = np.random.default_rng(3).normal(size=100).astype(np.float32)
    x.flags.writeable = False
    assert ops.kurtosis(torch.tensor(x, requires_grad=True)) == ops.kurtosis(x)
