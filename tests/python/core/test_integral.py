import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import quantrature
from quantrature import InvalidArgumentError, ops


def draw(seed, shape=(37, 301)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_accumulate_adds_in_place(library):
    acc, grad = draw(0), draw(1)
    expected = acc + np.float32(0.3) * grad
    mine = library(acc.copy())
    assert ops.pqi_accumulate(mine, library(grad), 0.3) is None
    np.testing.assert_array_equal(np.asarray(mine), expected)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_adding_up_notes_gradients_that_are_not_finite(library, wrong):
    grad, acc = np.full((3, 70000), 3e38, np.float32), np.full((3, 70000), np.inf, np.float32)
    flags = library(np.zeros(2, np.int32))
    ops.pqi_accumulate(library(acc), library(grad), 1.0, flags[:1])
    assert flags.tolist() == [0, 0]
    grad[2, 69000] = wrong
    ops.pqi_accumulate(library(acc), library(grad), 1.0, flags[1:])
    ops.pqi_accumulate(library(acc), library(np.zeros_like(grad)), 1.0, flags[1:])
    assert flags.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(dtype):
    grad, w, image = (torch.from_numpy(draw(i)).to(dtype) for i in range(3))
    a, b = torch.zeros(37, 301), torch.zeros(37, 301)
    ops.pqi_accumulate(a, grad, 0.1)
    ops.pqi_accumulate(b, grad.float(), 0.1)
    assert torch.equal(a, b)
    assert ops.pqi_sum(a, w, image) == ops.pqi_sum(b, w.float(), image.float())
    assert torch.equal(ops.pqi_finalize(a, w, image), ops.pqi_finalize(b, w.float(), image.float()))
    assert torch.equal(ops.interpolate(w, image, 0.3), ops.interpolate(w.float(), image.float(), 0.3).to(dtype))


FLOATS = st.floats(-(2**60), 2**60, width=32)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(*[hnp.arrays(np.float32, n, elements=FLOATS)] * 3)),
    st.floats(-4, 4),
)
def test_every_op_is_its_formula(arrays, t):
    acc, w, image = arrays
    moved = image - w
    np.testing.assert_array_equal(ops.pqi_finalize(acc.copy(), w, image), np.abs(moved * acc))
    np.testing.assert_array_equal(ops.pqi_finalize(acc.copy(), w, image, signed=True), moved * acc)
    shares = (image.astype(np.float64) - w) * acc
    assert abs(ops.pqi_sum(acc, w, image) - math.fsum(shares)) <= 1e-13 * math.fsum(np.abs(shares))
    expected = w if t == 0 else image if t == 1 else w + np.float32(t) * moved
    np.testing.assert_array_equal(ops.interpolate(w, image, t), expected)
    total = acc + np.float32(t) * image
    ops.pqi_accumulate(acc, image, t)
    np.testing.assert_array_equal(acc, total)


def test_accumulator_stays_within_its_bound():
    acc, exact, total = np.zeros(1000, np.float32), np.zeros(1000), np.zeros(1000)
    for i in range(300):
        grad = draw(i, 1000)
        ops.pqi_accumulate(acc, grad, 1 / 300)
        exact += grad.astype(np.float64) / 300
        total += np.abs(grad.astype(np.float64)) / 300
    u = 301 * 2.0**-24
    assert np.all(np.abs(acc - exact) <= u / (1 - u) * total)


def test_finalize_writes_where_it_is_told(library):
    acc, w, image = (library(draw(i)) for i in range(3))
    before = np.asarray(acc).copy()
    out = library(np.zeros((37, 301), np.float32))
    assert ops.pqi_finalize(acc, w, image, out=out) is out
    np.testing.assert_array_equal(np.asarray(acc), before)
    assert ops.pqi_finalize(acc, w, image) is acc
    np.testing.assert_array_equal(np.asarray(acc), np.asarray(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_interpolation_meets_both_ends_bit_for_bit(dtype):
    w, image = (torch.from_numpy(draw(i) * 100).to(dtype) for i in range(2))
    w[0, 0], image[0, 1] = -0.0, -0.0
    w[1, 0], image[1, 1] = torch.inf, torch.nan
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(ops.interpolate(w, image, 0.0).view(bits), w.view(bits))
    assert torch.equal(ops.interpolate(w, image, 1.0).view(bits), image.view(bits))


def test_interpolation_over_a_parameter():
    w, image = torch.nn.Parameter(torch.from_numpy(draw(0))), torch.from_numpy(draw(1))
    expected = w.detach() + 0.25 * (image - w.detach())
    assert ops.interpolate(w, image, 0.25, w) is w
    assert torch.equal(w.detach(), expected)


def test_every_target_and_thread_count_gives_the_same_bits(every_target):
    acc, w, image = (draw(i, (130, 3001)) for i in range(3))
    before = quantrature.num_threads()
    results = []
    for _ in every_target():
        for threads in (1, 2, 3, 4):
            quantrature.set_num_threads(threads)
            sums = acc.copy()
            ops.pqi_accumulate(sums, w, 0.7)
            results.append(
                (ops.pqi_sum(sums, w, image), ops.interpolate(w, image, 0.3), ops.pqi_finalize(sums, w, image))
            )
    quantrature.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a, b)


ONES = np.ones((4, 4), np.float32)
FIXED = np.ones((4, 4), np.float32)
FIXED.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pqi_accumulate(ONES, ONES[:2], 1.0), r"\[pqi_accumulate\] grad must have the shape .*\(2, 4\)"),
        (lambda: ops.pqi_accumulate(ONES.astype(np.float16), ONES, 1.0), "acc must be float32: got dtype=float16"),
        (lambda: ops.pqi_accumulate(ONES, ONES.astype(float), 1.0), "grad must be float32 or float16 or bfloat16"),
        (lambda: ops.pqi_accumulate(FIXED, ONES, 1.0), "acc must be writable: got a read-only array"),
        (lambda: ops.pqi_accumulate(ONES[:, ::2], ONES[:, :2], 1.0), "acc must be contiguous"),
        (lambda: ops.pqi_accumulate(ONES, ONES, 1.0, ONES[0]), "not_finite must be int32: got dtype=float32"),
        (
            lambda: ops.pqi_accumulate(ONES, ONES, 1.0, np.zeros(2, np.int32)),
            r"not_finite must have the shape .*\(2,\)",
        ),
        (lambda: ops.pqi_accumulate(ONES, ONES, float("nan")), "weight must be finite in float32: got weight=nan"),
        (lambda: ops.pqi_finalize(ONES, ONES[:2], ONES), r"\[pqi_finalize\] w must have the shape"),
        (lambda: ops.pqi_finalize(ONES, ONES, ONES[:2]), r"\[pqi_finalize\] w_quantized must have the shape"),
        (lambda: ops.pqi_finalize(FIXED, ONES, ONES), r"\[pqi_finalize\] acc must be writable"),
        (lambda: ops.pqi_finalize(ONES, ONES, ONES, out=FIXED), r"\[pqi_finalize\] out must be writable"),
        (lambda: ops.pqi_finalize(ONES, ONES, ONES, out=ONES[:2]), r"\[pqi_finalize\] out must have the shape"),
        (lambda: ops.pqi_sum(ONES, ONES, ONES[0]), r"\[pqi_sum\] w_quantized must have the shape"),
        (lambda: ops.pqi_sum(np.ones((0, 4), np.float32), ONES, ONES), r"\[pqi_sum\] acc must not be empty"),
        (lambda: ops.interpolate(ONES, ONES, 0.5, FIXED), r"\[interpolate\] out must be writable"),
        (lambda: ops.interpolate(ONES, ONES, 0.5, ONES[:2]), r"\[interpolate\] out must have the shape"),
        (lambda: ops.interpolate([1.0], ONES, 0.5), r"\[interpolate\] w must be a NumPy array or a torch tensor"),
        (lambda: ops.interpolate(ONES, ONES, float("inf")), r"\[interpolate\] t must be finite in float32: got t=inf"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
