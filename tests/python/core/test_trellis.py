import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from quantrature import InvalidArgumentError, ops
from quantrature.ops import Trellis

# Of the tables of all 65,536 states, as others have computed them from the formulas of the paper.
MAD_DIGEST = "06b616de9eb33ffe563eafe819d7e2e4332a053c5115ba52444f3dd3c70f6dee"
INST_DIGEST = "ad88de2dcff5bb05fff2faec37cceceb43aa1c2e8203f9d81a6fbd6dd3393eea"
HYB_INDEX_DIGEST = "6bf8358fd0ffa7090e1c2c8ba5096ceea633035a041af9f123ae2ac13fd78729"
HYB_SIGN_DIGEST = "7a9f16db8ce6491eba34c45ba5c0b33750dff0578c618e39d8c6fcb6b4fa6710"

TRELLISES = [
    Trellis(bits, state_bits, code)
    for code in ("1mad", "3inst", "hyb")
    for bits, state_bits in ((1, 9), (2, 8), (3, 10), (4, 9), (2, 16))
]


def bits_of(stream, total):
    return np.unpackbits(stream)[:total]


def read(stream, cols, trellis, scale=1.0):
    """The weights of a stream, from the definition."""
    bits = bits_of(stream, cols * trellis.bits)
    values = trellis.values()
    rms = np.sqrt((values.astype(np.float64) ** 2).mean())
    around = np.concatenate([bits, bits])
    step = trellis.bits * trellis.step_weights
    powers = 1 << np.arange(trellis.state_bits)[::-1]
    states = [int(around[at : at + trellis.state_bits] @ powers) for at in range(0, len(bits), step)]
    return values[states].reshape(-1) * np.float32(np.float32(scale) / rms)


def test_codes_are_those_of_the_paper():
    mad = Trellis(2, 16, "1mad").values()
    assert hashlib.sha256(mad.astype("<i2").tobytes()).hexdigest() == MAD_DIGEST
    inst = Trellis(2, 16, "3inst").values()
    assert hashlib.sha256(inst.astype("<f2").tobytes()).hexdigest() == INST_DIGEST


def test_hyb_reads_the_table_as_the_paper_does():
    states = np.arange(1 << 16, dtype=np.uint32)
    h = states * (states + 1)
    index, sign = (h >> 6 & 511).astype("<u2"), (h >> 15 & 1).astype(np.uint8)
    assert hashlib.sha256(index.tobytes()).hexdigest() == HYB_INDEX_DIGEST
    assert hashlib.sha256(sign.tobytes()).hexdigest() == HYB_SIGN_DIGEST
    values = Trellis(2, 16, "hyb").values()
    table = np.zeros((512, 2), np.float32)
    table[index] = values * np.where(sign, -1, 1)[:, None] ** np.array([0, 1])
    np.testing.assert_array_equal(values, table[index] * np.where(sign[:, None] * [0, 1], -1, 1))
    i = np.arange(512)
    radius, angle = np.sqrt(-2 * np.log(1 - (i + 0.5) / 512)), np.pi * (np.sqrt(5) - 1) * i
    np.testing.assert_allclose(table, np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), atol=2e-3)


@pytest.mark.parametrize("trellis", TRELLISES, ids=str)
def test_streams_are_read_as_defined(trellis, library):
    rng = np.random.default_rng(0)
    for cols in (256, 40):
        codes = rng.integers(0, 256, (3, trellis.stream_bytes(cols)), dtype=np.uint8)
        got = ops.trellis_dequantize(library(codes), cols, trellis, 0.7)
        assert type(got) is type(library(codes))
        for row in range(3):
            np.testing.assert_array_equal(np.asarray(got)[row], read(codes[row], cols, trellis, 0.7))


def test_the_toy_of_the_paper_wraps_around():
    """Bits 001011, L = 2: the states are 0, 1, 2, 1, 3, 2."""
    trellis = Trellis(1, 2, "1mad")
    values = trellis.values()[:, 0]
    got = ops.trellis_dequantize(np.array([[0b00101100]], np.uint8), 6, trellis)
    rms = np.sqrt((values.astype(np.float64) ** 2).mean())
    np.testing.assert_array_equal(got[0], values[[0, 1, 2, 1, 3, 2]] * np.float32(1 / rms))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([Trellis(1, 3, "1mad"), Trellis(1, 4, "3inst"), Trellis(1, 3, "hyb"), Trellis(2, 4, "3inst")]),
)
def test_the_search_is_near_the_best_of_all_streams(seed, trellis):
    cols = 10 // trellis.bits // 2 * 2
    x = np.random.default_rng(seed).standard_normal(cols).astype(np.float32)
    total = cols * trellis.bits
    streams = np.array([np.packbits(bits) for bits in itertools.product((0, 1), repeat=total)])
    errors = ((ops.trellis_dequantize(streams, cols, trellis) - x) ** 2).sum(axis=1)
    codes = ops.trellis_quantize(x, trellis)
    found = ((ops.trellis_dequantize(codes, cols, trellis) - x) ** 2).sum()
    assert errors.min() - 1e-5 <= found
    # Of all streams that the seam it found leaves open it is the best.
    shared = trellis.state_bits - trellis.bits * trellis.step_weights
    seam = [int("".join(map(str, bits_of(s, total)[:shared])) or "0", 2) for s in streams]
    same = [i for i, s in enumerate(seam) if s == seam[int("".join(map(str, bits_of(codes[0], total))), 2)]]
    assert found <= errors[same].min() + 0.02


def test_errors_of_normal_numbers_are_those_of_the_paper():
    x = np.random.default_rng(0).standard_normal((60, 256)).astype(np.float32)
    x /= np.sqrt((x**2).mean())
    for trellis, expected in (
        (Trellis(2, 12, "3inst"), 0.0735),
        (Trellis(2, 12, "1mad"), 0.0740),
        (Trellis(2, 10, "1mad"), 0.0785),
    ):
        y = ops.trellis_dequantize(ops.trellis_quantize(x, trellis), 256, trellis)
        assert ((x - y) ** 2).mean() == pytest.approx(expected, abs=0.0015)


def test_scale_and_dtype_go_with_the_numbers():
    trellis = Trellis(2, 8)
    x = torch.randn(4, 64)
    codes = ops.trellis_quantize(x, trellis)
    assert torch.equal(ops.trellis_quantize(x * 4, trellis, 4.0), codes)
    assert torch.equal(ops.trellis_dequantize(codes, 64, trellis, 4.0), ops.trellis_dequantize(codes, 64, trellis) * 4)
    half = x.to(torch.bfloat16)
    assert torch.equal(ops.trellis_quantize(half, trellis), ops.trellis_quantize(half.float(), trellis))
    narrow = ops.trellis_dequantize(codes, 64, trellis, dtype="float16")
    assert torch.equal(narrow, ops.trellis_dequantize(codes, 64, trellis).half())


def test_nothing_depends_on_threads():
    trellis = Trellis(2, 9, "hyb")
    x = np.random.default_rng(0).standard_normal((30, 256)).astype(np.float32)
    before = quantrature.num_threads()
    results = []
    for threads in (1, 3):
        quantrature.set_num_threads(threads)
        results.append(ops.trellis_quantize(x, trellis))
    quantrature.set_num_threads(before)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("trellis", TRELLISES, ids=str)
def test_products_are_those_of_the_tiles(trellis, library):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3 * 5, trellis.stream_bytes(256)), dtype=np.uint8)
    tiles = ops.trellis_dequantize(codes, 256, trellis, 0.5).reshape(3, 5, 16, 16)
    w = tiles.transpose(0, 2, 1, 3).reshape(48, 80).astype(np.float64)
    x = rng.standard_normal((9, 80)).astype(np.float32)
    got = ops.trellis_matvec(library(codes), (48, 80), library(x), trellis, 0.5)
    np.testing.assert_allclose(got, x @ w.T, atol=1e-4)
    np.testing.assert_array_equal(ops.trellis_matvec(codes, (48, 80), x[0], trellis, 0.5), np.asarray(got)[0])


T = Trellis(2, 8)
X = np.ones((2, 16), np.float32)
CODES = np.zeros((2, 4), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Trellis(2, 8, "4mad"), r"\[trellis\] code must be 1mad, 3inst or hyb: got code='4mad'"),
        (lambda: Trellis(5), r"\[trellis\] bits must be 1 to 4: got bits=5"),
        (lambda: Trellis(4, 7, "hyb"), r"\[trellis\] state_bits must be 8 to 16: got state_bits=7"),
        (lambda: Trellis(2, 17), r"\[trellis\] state_bits must be 2 to 16: got state_bits=17"),
        (lambda: ops.trellis_quantize(X[:, :3].copy(), T), r"at least 8 bits: got 3 weights of 2 bits"),
        (lambda: ops.trellis_quantize(X * np.inf, T), r"x must be finite: got value=inf, row=0, column=0"),
        (lambda: ops.trellis_quantize(X, T, -1.0), r"scale must be positive: got scale=-1"),
        (lambda: ops.trellis_quantize(X.astype(np.float64), T), r"x must be float32"),
        (lambda: ops.trellis_dequantize(CODES, 12, T), r"codes must have 3 bytes per sequence: got 4"),
        (lambda: ops.trellis_dequantize(CODES, 16, T, np.inf), r"scale must be finite"),
        (lambda: ops.trellis_dequantize(CODES, 16, T, out=X[:1]), r"out must have a row for each stream"),
        (lambda: ops.trellis_matvec(np.zeros((1, 64), np.uint8), (16, 8), X[0], T), r"must be multiples of 16"),
        (
            lambda: ops.trellis_matvec(np.zeros((1, 64), np.uint8), (16, 16), X, T, out=X[:1]),
            r"out must have a number for",
        ),
        (lambda: ops.trellis_matvec(np.zeros((2, 64), np.uint8), (16, 16), X, T), r"codes must hold a stream for each"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
