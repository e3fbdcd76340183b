import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft
from scipy.linalg import hadamard as sylvester

import quantrature
from quantrature import InvalidArgumentError, ops


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 512])
def test_powers_of_two_are_scipys(n):
    got = ops.hadamard(np.eye(n, dtype=np.float32))
    np.testing.assert_array_equal(got, (sylvester(n) / np.sqrt(n)).astype(np.float32))


@pytest.mark.parametrize(
    ("n", "order"), [(12, 12), (20, 20), (28, 28), (36, 36), (44, 44), (60, 60), (76, 76), (96, 12), (148, 148)]
)
def test_paleys_matrices_are_hadamard_matrices(n, order):
    assert ops.hadamard_order(n) == order
    a = ops.hadamard(np.eye(n, dtype=np.float32)).astype(np.float64) * np.sqrt(n)
    np.testing.assert_allclose(np.abs(a), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.rint(a) @ np.rint(a).T, n * np.eye(n))


@pytest.mark.parametrize("n", [3, 10, 43, 172, 344])
def test_other_sizes_take_the_cosine_transform(n):
    order = ops.hadamard_order(n)
    x = np.random.default_rng(n).standard_normal((4, n)).astype(np.float32)
    blocks = fft.dct(x.astype(np.float64).reshape(4, order, n // order), norm="ortho", axis=1)
    expected = blocks @ sylvester(n // order) / np.sqrt(n // order)
    np.testing.assert_allclose(ops.hadamard(x), expected.reshape(4, n), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 2**64 - 1))
def test_lengths_stay_and_the_inverse_takes_it_back(n, rows, seed):
    x = np.random.default_rng(n).standard_normal((rows, n)).astype(np.float32)
    signs = ops.random_signs(n, seed)
    y = ops.hadamard(x, signs)
    np.testing.assert_allclose((y**2).sum(axis=1), (x**2).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(ops.hadamard(y, signs, inverse=True), x, atol=2e-5)


def test_signs_come_before_the_transform(library):
    x = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    signs = ops.random_signs(24, 5)
    minus = np.unpackbits(signs, bitorder="little")[:24].astype(bool)
    expected = ops.hadamard(np.where(minus, -x, x))
    got = ops.hadamard(library(x), library(signs))
    assert type(got) is type(library(x))
    np.testing.assert_array_equal(got, expected)


def test_signs_are_fair_and_differ():
    one, other = (np.unpackbits(ops.random_signs(1 << 16, seed)) for seed in (1, 2))
    assert abs(one.mean() - 0.5) < 0.01
    assert abs((one == other).mean() - 0.5) < 0.01
    np.testing.assert_array_equal(ops.random_signs(1000, 1), ops.random_signs(1 << 16, 1)[:125])


def test_an_outlier_is_spread():
    x = np.zeros((1, 768), np.float32)
    x[0, 100] = 1000
    assert np.abs(ops.hadamard(x)).max() == pytest.approx(1000 / np.sqrt(768))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_rounded(dtype):
    x = torch.randn(3, 96).to(dtype)
    assert torch.equal(ops.hadamard(x), ops.hadamard(x.float()).to(dtype))


def test_in_place_and_on_any_number_of_threads():
    x = np.random.default_rng(0).standard_normal((300, 320)).astype(np.float32)
    before = quantrature.num_threads()
    results = []
    for threads in (1, 3):
        quantrature.set_num_threads(threads)
        y = x.copy()
        assert ops.hadamard(y, out=y) is y
        results.append(y)
    quantrature.set_num_threads(before)
    np.testing.assert_array_equal(*results)


X = np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.hadamard(X.astype(np.float64)), r"\[hadamard\] x must be float32"),
        (lambda: ops.hadamard(X[:, ::2]), r"\[hadamard\] x must be contiguous"),
        (
            lambda: ops.hadamard(X, np.zeros(2, np.uint8)),
            r"signs must have a bit for each column: got 2 bytes for cols=8",
        ),
        (lambda: ops.hadamard(X, out=np.ones((2, 4), np.float32)), r"out must have the shape of x: got shape=\(2, 4\)"),
        (lambda: ops.hadamard(np.ones(2053, np.float32)), r"must not have so large an odd factor: got cols=2053"),
        (lambda: ops.hadamard_order(0), r"\[hadamard\] n must be at least 1: got n=0"),
        (lambda: ops.random_signs(0, 1), r"\[random_signs\] count must be at least 1: got count=0"),
        (lambda: ops.random_signs(8, -1), r"\[random_signs\] seed must be 0 to 2\*\*64 - 1: got seed=-1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
