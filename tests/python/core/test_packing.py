import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairwise import pairwise
from quantrature import InvalidArgumentError, ops

PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def packed_row(codes, bits):
    """The layout of packing.hpp, bit by bit in Python integers."""
    out, left = b"", bits
    for p in PLANES[bits]:
        left -= p
        for first in range(0, len(codes), 256 // p):
            block = [(int(c) >> left) % 2**p for c in codes[first : first + 256 // p]]
            numbers = -(-len(block) // 8)
            block += [0] * (8 * numbers - len(block))
            stream = sum(block[8 * k + lane] << p * (lane * numbers + k) for lane in range(8) for k in range(numbers))
            out += stream.to_bytes(numbers * p, "little")
    return np.frombuffer(out, np.uint8)


@pytest.mark.parametrize(
    ("bits", "cols", "library"),
    pairwise(range(1, 9), [1, 7, 8, 9, 31, 32, 33, 63, 64, 100, 128, 255, 256, 257, 700], ["numpy", "torch"]),
    indirect=["library"],
)
def test_the_layout_is_the_documented_one(bits, cols, every_target, library):
    codes = np.random.default_rng(bits * 1000 + cols).integers(0, 2**bits, (3, cols), dtype=np.uint8)
    expected = np.stack([packed_row(row, bits) for row in codes])
    assert expected.shape == (3, ops.row_bytes(cols, bits))
    for _ in every_target():
        packed = ops.pack(library(codes), bits)
        assert type(packed) is type(library(codes))
        np.testing.assert_array_equal(packed, expected)
        np.testing.assert_array_equal(ops.unpack(packed, bits, cols), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 2000), st.integers(0, 2**32))
def test_round_trip_of_anything(bits, rows, cols, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols), dtype=np.uint8)
    packed = ops.pack(codes, bits)
    assert packed.shape == (rows, bits * -(-cols // 8))
    np.testing.assert_array_equal(ops.unpack(packed, bits, cols), codes)


def test_a_vector_is_one_row():
    codes = np.arange(16, dtype=np.uint8)
    packed = ops.pack(codes, 4)
    assert packed.shape == (1, 8)
    np.testing.assert_array_equal(ops.unpack(packed[0], 4, 16), codes[None])


def test_results_go_where_the_caller_says(library):
    codes = library(np.arange(80, dtype=np.uint8).reshape(2, 40) % 8)
    packed, plain = library(np.zeros((2, 15), np.uint8)), library(np.zeros((2, 40), np.uint8))
    assert ops.pack(codes, 3, out=packed) is packed
    np.testing.assert_array_equal(packed, ops.pack(codes, 3))
    assert ops.unpack(packed, 3, 40, out=plain) is plain
    np.testing.assert_array_equal(plain, codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: ops.pack(c, 0), r"\[pack\] bits must be 1 to 8: got bits=0"),
        (lambda c: ops.pack(c, 9), r"\[pack\] bits must be 1 to 8: got bits=9"),
        (lambda c: ops.pack(c, 2), r"\[pack\] codes must fit into bits: got code=4, row=1, col=0, bits=2"),
        (lambda c: ops.pack(c.astype(np.int32), 4), r"\[pack\] codes must be uint8: got dtype=int32"),
        (lambda c: ops.pack(c[:, ::2], 4), r"\[pack\] codes must be contiguous"),
        (lambda c: ops.pack(c[:0], 4), r"\[pack\] codes must not be empty"),
        (lambda c: ops.unpack(c, 4, 9), r"\[unpack\] packed must have 8 bytes per row for cols=9 and bits=4: got 4"),
        (lambda c: ops.unpack(c, 4, 0), r"\[unpack\] cols must be at least 1: got cols=0"),
        (lambda c: ops.unpack(c, -1, 8), r"\[unpack\] bits must be 1 to 8: got bits=-1"),
        (lambda c: ops.pack(c, 4, out=c[:1]), r"\[pack\] out must have shape=\(2, 4\): got \(1, 4\)"),
        (lambda c: ops.unpack(c, 4, 8, out=c), r"\[unpack\] out must have shape=\(2, 8\): got \(2, 4\)"),
        (lambda c: ops.pack(c, 8, out=c.astype(np.int8)), r"\[pack\] out must be uint8: got dtype=int8"),
        (lambda c: ops.row_bytes(0, 1), r"\[row_bytes\] cols must be at least 1: got cols=0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(np.arange(8, dtype=np.uint8).reshape(2, 4))
