import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from quantrature import InvalidArgumentError, ops
from quantrature.ops import GGUF_TYPES, gguf_dequantize, gguf_quantize

NAMES = list(GGUF_TYPES)
RELATIVE_ERROR = {
    "Q2_K": 0.085,
    "Q3_K": 0.026,
    "Q4_K": 0.0062,
    "Q5_K": 0.0016,
    "Q6_K": 0.00042,
    "Q4_0": 0.0072,
    "Q4_1": 0.0058,
    "Q5_0": 0.0018,
    "Q5_1": 0.0015,
    "Q8_0": 0.00003,
    "IQ4_NL": 0.0060,
}
"""Squared error over the sum of squares, for normal weights, rounded up from what the fit reaches."""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_error(w, values, weights=1.0):
    return float((np.asarray(weights, np.float64) * (w.astype(np.float64) - values) ** 2).sum())


def test_types_are_those_of_the_format():
    gguf = pytest.importorskip("gguf")
    for name, of in GGUF_TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert of == (name, int(theirs), *gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3))
def test_values_are_those_of_the_package_gguf(name, seed, rows, blocks):
    quants = pytest.importorskip("gguf").quants
    of = GGUF_TYPES[name]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * of.block_bytes), np.uint8)
    with np.errstate(all="ignore"):  # scales of random bits may be infinite
        theirs = quants.dequantize(data, of.number)
    mine = gguf_dequantize(data, name, blocks * of.block_size)
    np.testing.assert_array_equal(mine, theirs)
    there = ~np.isnan(theirs)
    np.testing.assert_array_equal(mine.view(np.uint32)[there], theirs.view(np.uint32)[there])


@pytest.mark.parametrize("name", NAMES)
def test_fits_normal_weights_well(name):
    w = normal(16, 512)
    values = gguf_dequantize(gguf_quantize(w, name), name, 512)
    assert squared_error(w, values) < RELATIVE_ERROR[name] * squared_error(w, 0)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_is_better_than_the_package_gguf_quantizes(name):
    quants = pytest.importorskip("gguf").quants
    w = normal(16, 512)
    theirs = quants.dequantize(quants.quantize(w, GGUF_TYPES[name].number), GGUF_TYPES[name].number)
    mine = gguf_dequantize(gguf_quantize(w, name), name, 512)
    assert squared_error(w, mine) < 0.95 * squared_error(w, theirs)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_weights_say_where_errors_count(name, each):
    w = normal(8, 512)
    weights = np.exp(normal(*((8, 512) if each else (512,)), seed=1))
    plain, weighted = (gguf_dequantize(gguf_quantize(w, name, of), name, 512) for of in (None, weights))
    assert squared_error(w, weighted, weights) < squared_error(w, plain, weights)
    assert squared_error(w, weighted) > squared_error(w, plain)
    if not each:
        spread = np.ascontiguousarray(np.broadcast_to(weights, w.shape))
        np.testing.assert_array_equal(gguf_quantize(w, name, weights), gguf_quantize(w, name, spread))


def test_equal_weights_change_nothing():
    w = normal(4, 256)
    for name in NAMES:
        np.testing.assert_array_equal(gguf_quantize(w, name, np.full(256, 8, np.float32)), gguf_quantize(w, name))


@pytest.mark.parametrize("name", NAMES)
def test_where_no_element_has_weight_all_count_alike(name):
    w = normal(16, 512)
    plain = gguf_dequantize(gguf_quantize(w, name), name, 512)
    for columns in (slice(0, 256), slice(256, 288)):  # blocks of 256 and of 32
        weights = np.ones(512, np.float32)
        weights[columns] = 0
        weighted = gguf_dequantize(gguf_quantize(w, name, weights), name, 512)
        assert squared_error(w[:, columns], weighted[:, columns]) < 1.2 * squared_error(
            w[:, columns], plain[:, columns]
        )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=40),
    st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=40),
)
def test_any_finite_numbers_and_weights_give_finite_values(name, numbers, weights):
    w, of = np.resize(np.array([numbers], np.float32), (1, 256)), np.resize(np.array(weights, np.float32), 256)
    of[0] = max(of[0], np.float32(1))
    values = gguf_dequantize(gguf_quantize(w, name, of), name, 256)
    assert np.isfinite(values).all()
    assert squared_error(w, values) <= 256 * 4 * 65504.0**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened(dtype):
    w = torch.from_numpy(normal(4, 256)).to(dtype)
    for name in NAMES:
        assert torch.equal(gguf_quantize(w, name), gguf_quantize(w.float(), name))


def test_arrays_are_of_the_library_that_was_given(library):
    w = library(normal(4, 512))
    data = gguf_quantize(w, "Q4_K")
    values = gguf_dequantize(data, "Q4_K", 512)
    assert type(data) is type(values) is type(w)
    assert tuple(data.shape) == (4, 288)
    assert tuple(values.shape) == (4, 512)
    np.testing.assert_array_equal(np.asarray(data), np.asarray(gguf_quantize(w, 12)))
    np.testing.assert_array_equal(np.asarray(values), np.asarray(gguf_dequantize(data, 12, 512)))


def test_nothing_depends_on_threads_or_rows_beside():
    w = normal(9, 512)
    before = quantrature.num_threads()
    results = []
    for threads in (1, 3):
        quantrature.set_num_threads(threads)
        results.append([gguf_quantize(w, name) for name in NAMES])
    quantrature.set_num_threads(before)
    for name, one, other in zip(NAMES, *results, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[4:5], gguf_quantize(w[4:5], name))


W = normal(2, 512)
ONES = np.ones(512, np.float32)
DATA = np.zeros((2, 288), np.uint8)


def with_value(x, place, value):
    x = x.copy()
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, "Q4_X"), r"\[gguf\] type must be one of Q4_0, Q4_1, .*, Q6_K: got type='Q4_X'"),
        ((W, 1), r"\[gguf\] type must be one of .*: got type=1"),
        ((W[0], "Q4_K"), r"\[gguf\] w must have 2 dimensions: got 1"),
        ((W.astype(np.float64), "Q4_K"), r"\[gguf\] w must be float32 or float16 or bfloat16: got dtype=float64"),
        (
            (normal(2, 576), "Q4_K"),
            r"\[gguf\] a matrix of type Q4_K must have columns in blocks of 256; choose another type \(Q4_0, Q4_1, "
            r"Q5_0, Q5_1, Q8_0, IQ4_NL\): got cols=576",
        ),
        ((normal(2, 100), "Q4_0"), r"\[gguf\] a matrix of type Q4_0 must have columns in blocks of 32: got cols=100"),
        ((with_value(W, (1, 7), np.nan), "Q4_K"), r"\[gguf\] w must be finite: got value=nan, row=1, col=7"),
        ((with_value(W, (0, 300), 7e4), "Q4_K"), r"\[gguf\] w must lie within -65504 and 65504, .*row=0, col=300"),
        ((W, "Q4_K", ONES[:256]), r"\[gguf\] weights must have one element per column or the shape of w: got shape="),
        ((W, "Q4_K", ONES.reshape(1, -1)), r"\[gguf\] weights must have one element per column or the shape of w"),
        ((W, "Q4_K", ONES.astype(np.float16)), r"\[gguf\] weights must be float32: got dtype=float16"),
        ((W, "Q4_K", torch.ones(512)), r"\[gguf\] weights must be of the library of w: got torch"),
        ((W, "Q4_K", 0 * ONES), r"\[gguf\] weights must not all be 0"),
        (
            (W, "Q4_K", with_value(ONES, 9, -1)),
            r"\[gguf\] weights must be finite and not negative: got weight=-1, row=0, col=9",
        ),
        ((W, "Q4_K", with_value(ONES, 9, np.nan)), r"weights must be finite and not negative: got weight=nan"),
    ],
)
def test_bad_weights_are_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        gguf_quantize(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DATA, "Q9_K", 512), r"\[gguf\] type must be one of Q4_0, .*: got type='Q9_K'"),
        ((DATA, "Q4_K", 500), r"must have columns in blocks of 256: got cols=500"),
        ((DATA, "Q4_K", 0), r"must have columns in blocks of 256: got cols=0"),
        (
            (DATA, "Q4_K", 256),
            r"\[gguf\] data must have the bytes of a row of 256 columns: got bytes=288, expected=144",
        ),
        ((DATA.astype(np.int8), "Q4_K", 512), r"\[gguf\] data must be uint8: got dtype=int8"),
        ((DATA[0], "Q4_K", 512), r"\[gguf\] data must have 2 dimensions: got 1"),
    ],
)
def test_bad_data_are_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        gguf_dequantize(*arguments)


def test_the_ops_lie_beside_the_others():
    assert ops.gguf_quantize is gguf_quantize
