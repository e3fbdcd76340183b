import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from pairwise import pairwise
from quantrature import InvalidArgumentError, ops

REFERENCE_LENGTHS = (1, 7, 63, 64, 255, 256, 257, 512, 700, 1111)


def matrix(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)


def exact_and_bound(q, x, outliers=None, activations="float32"):
    """The product in float64, and what matvec.hpp lets the result be off by."""
    rows, cols = q.shape
    group = cols if q.group_size == -1 else q.group_size

    def spread(values):
        plain = values.dequantize("float32") if isinstance(values, ops.QuantizedTensor) else values
        return np.repeat(np.asarray(plain, np.float64).reshape(rows, -1), group, axis=1)[:, :cols]

    codes = np.asarray(q.unpack(), np.float64)
    scale = spread(q.scale)
    zero = np.full_like(scale, 0.5 if q.bits == 1 else 2.0 ** (q.bits - 1)) if q.zero is None else spread(q.zero)
    x = np.asarray(x, np.float64)
    runs = np.maximum.reduceat(np.abs(x), np.arange(0, cols, 64), axis=-1)
    largest = np.repeat(runs, 64, axis=-1)[..., :cols]
    values, sizes = (codes - zero) * scale, (codes + np.abs(zero)) * np.abs(scale)
    fused = 2.0**-23 * (cols / 8 + 32)
    bound = 2.0**-22 * (largest @ (codes * np.abs(scale)).T) + 2.0**-109 * np.abs(scale).sum(1)
    if activations == "int8":
        bound += (largest / 254) @ ((1 + 2.0**-16) * np.abs(values) + fused * sizes).T
    if outliers is not None:
        flat = np.asarray(outliers.positions())
        kept = np.asarray(outliers.values.float() if hasattr(outliers.values, "float") else outliers.values, np.float64)
        sizes.reshape(-1)[flat] += np.abs(kept - values.reshape(-1)[flat])
        values.reshape(-1)[flat] = kept
    return x @ values.T, bound + fused * (np.abs(x) @ sizes.T)


def check(y, q, x, outliers=None, activations="float32"):
    expected, bound = exact_and_bound(q, x, outliers, activations)
    y = np.asarray(y)
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    assert (np.abs(y - expected) <= bound).all(), np.max(np.abs(y - expected) / bound)


@pytest.mark.parametrize(
    ("bits", "cols", "group_size", "sym"),
    pairwise(range(1, 9), REFERENCE_LENGTHS, [-1, 1, 12, 32, 64, 128], [False, True]),
)
def test_is_the_product_of_the_dequantized_matrix(bits, cols, group_size, sym):
    q = ops.quantize(matrix(9, cols), bits, group_size, sym=sym)
    vectors = matrix(6, cols, 1)
    check(ops.matvec(q, vectors[0]), q, vectors[0])
    check(ops.matvec(q, vectors), q, vectors)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("cols", [512, 700])
def test_outliers_replace_the_values_of_the_grid(cols, scale_dtype, library):
    w, x = library(matrix(20, cols)), library(matrix(1, cols, 1)[0])
    _, outliers = ops.extract_outliers(w, fraction=0.05)
    q = ops.quantize(w, 3, 64, exclude=outliers, scale_dtype=scale_dtype)
    y = ops.matvec(q, x, outliers)
    assert type(y) is type(x)
    check(y, q, x, outliers)
    dense = outliers.add_to(q.dequantize("float32"))
    np.testing.assert_allclose(y, np.asarray(dense, np.float64) @ np.asarray(x, np.float64), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(ops.PackedMatrix.of(q, outliers).matvec(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened(dtype):
    w = torch.from_numpy(matrix(30, 600)).to(dtype)
    _, outliers = ops.extract_outliers(w, fraction=0.01)
    q = ops.quantize(w, 4, 64, exclude=outliers)
    x = torch.from_numpy(matrix(3, 600, 1)).to(dtype)
    y = ops.matvec(q, x, outliers)
    assert y.dtype == torch.float32
    assert torch.equal(y, ops.matvec(q, x.float(), outliers))
    check(y, q, x.float(), outliers)


def test_quantized_scales_are_decoded_first():
    w, x = matrix(40, 512), matrix(1, 512, 1)[0]
    q = ops.quantize(w, 4, 64, meta_bits=8)
    assert isinstance(q.scale, ops.QuantizedTensor)
    check(ops.matvec(q, x), q, x)


def test_many_columns_have_wide_positions():
    w, x = matrix(3, 70_001), matrix(1, 70_001, 1)[0]
    _, outliers = ops.extract_outliers(w, fraction=0.01)
    q = ops.quantize(w, 2, 64, exclude=outliers)
    check(ops.matvec(q, x, outliers), q, x, outliers)


def test_tiny_and_huge_vectors():
    w = matrix(16, 512)
    for bits in (1, 3, 4, 8):
        q = ops.quantize(w, bits, 64)
        for size in (1e-42, 1e-30, 1e30):
            x = (matrix(1, 512, 1)[0] * np.float32(size)).astype(np.float32)
            check(ops.matvec(q, x), q, x)


def test_nothing_depends_on_threads_or_on_other_vectors(every_target):
    w, x = matrix(333, 1000), matrix(7, 1000, 1)
    _, outliers = ops.extract_outliers(w, fraction=0.01)
    before = quantrature.num_threads()
    for bits in (3, 4):
        packed = ops.PackedMatrix.of(ops.quantize(w, bits, 64), outliers)
        for _ in every_target():
            expected = packed.matvec(x)
            for threads in (1, 2, 3):
                quantrature.set_num_threads(threads)
                np.testing.assert_array_equal(packed.matvec(x), expected)
                np.testing.assert_array_equal(packed.matvec(x[5]), expected[5])
    quantrature.set_num_threads(before)


def test_every_target_is_within_the_bound(every_target):
    w, x = matrix(11, 1111), matrix(5, 1111, 1)
    _, outliers = ops.extract_outliers(w, fraction=0.02)
    for _ in every_target():
        for bits in range(1, 9):
            for group_size in (32, 64, 70, 96, -1):
                q = ops.quantize(w, bits, group_size)
                for activations in ("float32", "int8"):
                    y = ops.matvec(q, x, outliers, activations=activations)
                    check(y, q, x, outliers, activations)


def test_int8_rounds_each_run_to_127ths_of_its_largest(every_target):
    x = matrix(1, 700, 3)[0]
    q = ops.quantize(np.vstack([np.eye(1, 700, 37), np.eye(1, 700, 660)]).astype(np.float32), 4, -1)
    dense = np.asarray(q.dequantize(), np.float64)
    largest = np.repeat(np.maximum.reduceat(np.abs(x), np.arange(0, 700, 64)), 64)[:700]
    rounded = np.rint(x / largest * 127) * largest / 127
    for _ in every_target():
        np.testing.assert_allclose(ops.matvec(q, x, activations="int8"), dense @ rounded, rtol=1e-5)
    assert not np.allclose(dense @ rounded, dense @ x, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul_is_a_linear_layer(dtype, n):
    w = torch.from_numpy(matrix(37, 600)).to(dtype)
    _, outliers = ops.extract_outliers(w, fraction=0.01)
    packed = ops.PackedMatrix.of(ops.quantize(w, 3, 64, exclude=outliers), outliers)
    x = torch.from_numpy(matrix(n, 600, 1)).to(dtype)
    y = packed.matmul(x)
    assert y.dtype == dtype
    wide = packed.matvec(x)
    check(wide, packed.dense, x.float(), outliers)
    assert torch.equal(y, wide.to(dtype))
    for i in {0, n // 2, n - 1}:
        assert torch.equal(packed.matmul(x[i]), y[i])


def test_matmul_takes_any_number_of_leading_dimensions(library):
    packed = ops.PackedMatrix.of(ops.quantize(matrix(20, 300), 4, 64))
    x = matrix(24, 300, 1)
    y = packed.matmul(library(x.reshape(2, 3, 4, 300)))
    assert tuple(y.shape) == (2, 3, 4, 20)
    np.testing.assert_array_equal(y, packed.matmul(x).reshape(2, 3, 4, 20))
    empty = packed.matmul(library(x[:0]))
    assert tuple(empty.shape) == (0, 20)
    assert type(empty) is type(y)


def test_matmul_writes_where_it_is_told():
    packed = ops.PackedMatrix.of(ops.quantize(matrix(20, 300), 4, 64))
    x = torch.from_numpy(matrix(3, 300, 1)).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((3, 20), torch.nan, dtype=dtype)
        assert packed.matmul(x, out) is out
        assert torch.equal(out, packed.matvec(x).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 12), st.integers(1, 900), st.sampled_from([-1, 3, 16, 32, 64, 96, 192]),
    st.integers(1, 20), st.sampled_from(["float32", "int8"]), st.integers(0, 10**6)
)  # fmt: skip
def test_whatever_the_shape(bits, rows, cols, group_size, n, activations, seed):
    w, x = matrix(rows, cols, seed), matrix(n, cols, seed + 1)
    _, outliers = ops.extract_outliers(w, fraction=0.03)
    q = ops.quantize(w, bits, group_size, exclude=outliers)
    check(ops.matvec(q, x, outliers, activations=activations), q, x, outliers, activations)


def test_the_result_goes_where_it_is_wanted():
    w, x = matrix(20, 300), matrix(2, 300, 1)
    q = ops.quantize(w, 4, 64)
    out = np.full((2, 20), np.nan, np.float32)
    assert ops.matvec(q, x, out=out) is out
    np.testing.assert_array_equal(out, ops.matvec(q, x))


def check_codebook(y, q, x, outliers=None, activations="float32"):
    """Within what matvec.hpp allows for codes of a codebook, of the product of the dequantized matrix in float64."""
    cols = q.shape[1]
    x = np.asarray(x, np.float64)
    values = np.asarray(q.dequantize("float32"), np.float64)
    sizes = np.abs(values)
    bound = 0.0
    if activations == "int8":
        largest = np.repeat(np.maximum.reduceat(np.abs(x), np.arange(0, cols, 64), axis=-1), 64, axis=-1)[..., :cols]
        bound = ((1 + 2.0**-16) / 254 * largest + 2.0**-110) @ sizes.T
    if outliers is not None:
        dense = np.asarray(outliers.add_to(q.dequantize("float32")), np.float64)
        values, sizes = dense, sizes + np.abs(dense - values)
    assert y.dtype == np.float32
    bound = bound + 2.0**-23 * (cols / 8 + 32) * (np.abs(x) @ sizes.T)
    assert (np.abs(np.asarray(y) - x @ values.T) <= bound).all()


def tables(rows, bits, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 1 << bits)).astype(np.float32)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("group_size", [-1, 32, 50, 64, 128])
def test_codebooks_with_names(codebook, group_size, library):
    w, x = library(matrix(20, 700)), library(matrix(3, 700, 1))
    rest, outliers = ops.extract_outliers(w, fraction=0.02)
    for meta_bits in (None, 8):
        q = ops.quantize(rest, 4, group_size, codebook=codebook, exclude=outliers, meta_bits=meta_bits)
        packed = ops.PackedMatrix.of(q, outliers)
        assert type(packed.matvec(x)) is type(x)
        check_codebook(np.asarray(packed.matvec(x)), q, x, outliers)
        check_codebook(np.asarray(ops.matvec(q, x)), q, x)


@pytest.mark.parametrize("bits", range(1, 9))
def test_learned_codebooks(bits, every_target):
    w, x = matrix(11, 1111), matrix(5, 1111, 1)
    _, outliers = ops.extract_outliers(w, fraction=0.02)
    of_rows, shared = tables(11, bits), tables(1, bits)[0]
    for table, group_size in ((of_rows, None), (of_rows.astype(np.float16), 32), (shared, 70), (shared, -1)):
        q = ops.quantize(w, bits, group_size, codebook=table)
        packed = ops.PackedMatrix.of(q, outliers)
        for _ in every_target():
            for activations in ("float32", "int8"):
                check_codebook(packed.matvec(x, activations=activations), q, x, outliers, activations)
            np.testing.assert_array_equal(packed.matvec(x)[3], packed.matvec(x[3]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 12), st.integers(1, 900), st.sampled_from([None, -1, 3, 32, 64, 96, 192]),
    st.booleans(), st.integers(1, 20), st.sampled_from(["float32", "int8"]), st.integers(0, 10**6)
)  # fmt: skip
def test_codebooks_whatever_the_shape(bits, rows, cols, group_size, per_row, n, activations, seed):
    w, x = matrix(rows, cols, seed), matrix(n, cols, seed + 1)
    _, outliers = ops.extract_outliers(w, fraction=0.03)
    table = tables(rows, bits, seed)
    q = ops.quantize(w, bits, group_size, codebook=table if per_row else table[0], exclude=outliers)
    check_codebook(ops.matvec(q, x, outliers, activations=activations), q, x, outliers, activations)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codebooks_make_linear_layers(dtype):
    w = torch.from_numpy(matrix(37, 600)).to(dtype)
    _, outliers = ops.extract_outliers(w, fraction=0.01)
    packed = ops.PackedMatrix.of(ops.quantize(w, 4, 64, codebook="nf4", exclude=outliers), outliers)
    x = torch.from_numpy(matrix(19, 600, 1)).to(dtype)
    y = packed.matmul(x)
    assert y.dtype == dtype
    check_codebook(packed.matvec(x).numpy(), packed.dense, x.float(), outliers)
    assert torch.equal(y, packed.matvec(x).to(dtype))


def test_copies_and_pickles_of_a_prepared_matrix_multiply():
    _, outliers = ops.extract_outliers(matrix(20, 300), fraction=0.03)
    packed = ops.PackedMatrix.of(ops.quantize(matrix(20, 300), 4, 64), outliers)
    x = matrix(3, 300, 1)
    y = packed.matvec(x)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        np.testing.assert_array_equal(twin.matvec(x), y)
        twin.dense.scale[...] = 0
        twin.residuals.values[...] = 0
        assert not twin.matvec(x).any()
    np.testing.assert_array_equal(packed.matvec(x), y)


def test_a_negating_view_is_refused():
    one = torch.complex(torch.ones(1), torch.ones(1)).conj().imag  # contiguous, since it is one number
    q = ops.quantize(np.ones((2, 1), np.float32), 4, -1)
    with pytest.raises(InvalidArgumentError, match=r"\[matvec\] x must not be the imaginary part .* x.resolve_neg\(\)"):
        ops.matvec(q, one)


W = matrix(4, 64)
Q = ops.quantize(W, 4, 32)
X = np.ones(64, np.float32)
OUTLIERS = ops.extract_outliers(W, count=3)[1]
OTHERS = ops.extract_outliers(matrix(4, 65), count=3)[1]
FIXED = np.zeros(4, np.float32)
FIXED.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ops.quantize(W, 4, 4, axis=0), X), r"\[matvec\] q must be a matrix .* axis 1: got shape=\(4, 64\), axis=0"),
        ((ops.quantize(W[0], 4, 32), X), r"\[matvec\] q must be a matrix .*: got shape=\(64,\), axis=1"),
        ((ops.quantize(W[0], 4, codebook="nf4"), X), r"\[matvec\] q must be a matrix .*: got shape=\(64,\), axis=1"),
        ((W, X), r"\[matvec\] q must be a QuantizedTensor, a CodebookTensor or a PackedMatrix: got numpy.ndarray"),
        ((Q, X[:63].copy()), r"\[matvec\] x must have as many numbers as q has columns: got shape=\(63,\), cols=64"),
        ((Q, X.astype(np.float64)), r"\[matvec\] x must be float32 or float16 or bfloat16: got dtype=float64"),
        ((Q, np.ones((2, 128), np.float32)[:, ::2]), r"\[matvec\] x must be contiguous"),
        ((Q, X, OTHERS), r"\[matvec\] outliers must have the shape of q: got shape=\(4, 65\), expected=\(4, 64\)"),
        ((ops.PackedMatrix.of(Q), X, OUTLIERS), r"\[matvec\] outliers must be None if q is a PackedMatrix"),
        ((Q, X, None, np.zeros(5, np.float32)), r"\[matvec\] out must have a number .*: got shape=\(5,\)"),
        ((Q, X, None, np.zeros(4, np.float16)), r"\[matvec\] out must be float32: got dtype=float16"),
        ((Q, X, None, FIXED), r"\[matvec\] out must be writable"),
        ((Q, X, None, None, "int4"), r"\[matvec\] activations must be float32 or int8: got activations='int4'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.matvec(*arguments)
