import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from quantrature import InvalidArgumentError, ops


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def matrix(rows, cols, levels, dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(-levels, levels + 1, (rows, cols)) / levels
    return torch.from_numpy(np.where(x == 0, -0.0, x).astype(np.float32)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 300),
    st.sampled_from([1, 3, 10**9]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.floats(0, 1),
    st.sampled_from(["tensor", "row"]),
    st.integers(0, 1000),
)
def test_remainder_and_sparse_are_the_matrix(rows, cols, levels, dtype, fraction, per, seed):
    w = matrix(rows, cols, levels, dtype, seed)
    before = w.clone()
    remainder, sparse = ops.extract_outliers(w, fraction=fraction, per=per)
    assert torch.equal(bits(w), bits(before))
    whole = w.reshape(1, -1) if per == "tensor" else w
    count = round(fraction * whole.shape[1])
    order = np.argsort(-whole.abs().double().numpy(), axis=1, kind="stable")[:, :count]
    expected = np.sort((order + np.arange(len(whole))[:, None] * whole.shape[1]).ravel())
    np.testing.assert_array_equal(sparse.positions().numpy(), expected)
    assert sparse.nnz == expected.size
    assert sparse.values.dtype == dtype
    assert not remainder.view(-1)[sparse.positions()].view(bits(w).dtype).any()
    assert torch.equal(sparse.to_dense() + remainder, w)
    assert sparse.add_to(remainder) is remainder
    assert torch.equal(bits(remainder), bits(w))


def test_is_what_scipy_makes(library):
    import scipy.sparse

    w = np.random.default_rng(0).standard_normal((60, 500)).astype(np.float32)
    remainder, sparse = ops.extract_outliers(library(w), count=321)
    keep = np.abs(w) >= np.sort(np.abs(w).ravel())[-321]
    expected = scipy.sparse.csr_matrix(w * keep)
    np.testing.assert_array_equal(np.asarray(sparse.values), expected.data)
    np.testing.assert_array_equal(np.asarray(sparse.columns), expected.indices)
    np.testing.assert_array_equal(np.asarray(sparse.row_offsets), expected.indptr)
    np.testing.assert_array_equal(np.asarray(remainder), w * ~keep)
    np.testing.assert_array_equal(np.asarray(sparse.to_dense()), w * keep)
    assert type(sparse.columns) is type(library(w))
    assert sparse.shape == (60, 500)
    assert sparse.nbytes == 321 * 6 + 61 * 2


@pytest.mark.parametrize("cols", [65536, 65537])
def test_columns_are_as_narrow_as_they_can_be(cols):
    w = matrix(2, cols, 10**9)
    w[1, cols - 1] = 5
    remainder, sparse = ops.extract_outliers(w, fraction=0.01)
    assert sparse.columns.dtype == (torch.uint16 if cols == 65536 else torch.int32)
    assert int(sparse.columns[-1]) == cols - 1
    assert torch.equal(sparse.add_to(remainder), w)


@pytest.mark.parametrize(("count", "dtype"), [(65535, np.uint16), (65536, np.int32)])
def test_row_offsets_are_as_narrow_as_they_can_be(library, count, dtype):
    w = library(np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32))
    remainder, sparse = ops.extract_outliers(w, count=count)
    assert np.asarray(sparse.row_offsets).dtype == dtype
    assert sparse.core_row_offsets().dtype == np.int32
    assert int(sparse.row_offsets[-1]) == count
    np.testing.assert_array_equal(np.asarray(sparse.add_to(remainder)), np.asarray(w))


def test_given_indices_are_taken():
    w = matrix(4, 5, 10**9)
    w[0, 2] = torch.nan
    at = np.array([0, 2, 7, 19])
    remainder, sparse = ops.extract_outliers(w, indices=at)
    np.testing.assert_array_equal(sparse.positions(), at)
    assert torch.equal(bits(sparse.values), bits(w).view(-1)[torch.from_numpy(at)])
    assert sparse.row_offsets.tolist() == [0, 2, 3, 3, 4]
    assert torch.equal(bits(sparse.add_to(remainder)), bits(w))
    assert ops.extract_outliers(w, indices=torch.tensor([], dtype=torch.int64))[1].nnz == 0


def test_the_remainder_may_take_the_place_of_the_matrix():
    w = matrix(40, 500, 10**9)
    expected, _ = ops.extract_outliers(w, fraction=0.1)
    remainder, sparse = ops.extract_outliers(w, fraction=0.1, out=w)
    assert remainder is w
    assert torch.equal(w, expected)
    assert sparse.nnz == 2000


def test_a_vector_is_one_row():
    w = matrix(1, 50, 10**9)[0]
    remainder, sparse = ops.extract_outliers(w, count=3)
    assert remainder.shape == w.shape
    assert sparse.shape == (1, 50)
    assert torch.equal(sparse.add_to(remainder), w)


def test_values_are_rounded_to_what_they_are_put_into():
    w = matrix(8, 9, 10**9)
    _, sparse = ops.extract_outliers(w, count=72)
    assert torch.equal(sparse.add_to(torch.empty(8, 9, dtype=torch.bfloat16)), w.bfloat16())


def test_every_target_and_thread_count_gives_the_same(every_target):
    w = np.random.default_rng(1).standard_normal((300, 900)).astype(np.float32)
    before = quantrature.num_threads()
    results = []
    for _ in every_target():
        for threads in (1, 2, 3, 4):
            quantrature.set_num_threads(threads)
            for per in ("tensor", "row"):
                remainder, sparse = ops.extract_outliers(w, fraction=0.01, per=per)
                results.append((remainder, sparse.values, sparse.columns, sparse.row_offsets))
    quantrature.set_num_threads(before)
    for i, result in enumerate(results):
        for a, b in zip(results[i % 2], result, strict=True):
            np.testing.assert_array_equal(a, b)


ONES = np.ones((4, 4), np.float32)
FIXED = np.ones((4, 4), np.float32)
FIXED.flags.writeable = False
NAN = np.ones((4, 4), np.float32)
NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("w", "arguments", "message"),
    [
        (ONES, {"count": 17}, r"\[extract_outliers\] count must be from 0 to .* of w: got count=17, elements=16"),
        (ONES, {"count": -1}, "got count=-1"),
        (ONES, {"count": 5, "per": "row"}, "of a row: got count=5, elements=4"),
        (ONES, {"fraction": 1.5}, "fraction must be from 0 to 1: got fraction=1.5"),
        (ONES, {"fraction": float("nan")}, "fraction must be from 0 to 1"),
        (ONES, {}, "give exactly one of count, fraction and indices"),
        (ONES, {"count": 1, "fraction": 0.1}, "give exactly one of count, fraction and indices"),
        (ONES, {"count": 1, "per": "column"}, "per must be tensor, or row with count or fraction: got per='column'"),
        (ONES, {"indices": np.array([0]), "per": "row"}, "per must be tensor, or row with count or fraction"),
        (ONES, {"indices": np.array([0, 16])}, "indices must be within w: got index=16, position=1, elements=16"),
        (ONES, {"indices": np.array([-1])}, "indices must be within w: got index=-1"),
        (ONES, {"indices": np.array([3, 3])}, "indices must ascend, each given once: got index=3, position=1"),
        (ONES, {"indices": np.array([0], np.int32)}, "indices must be int64: got dtype=int32"),
        (ONES.astype(float), {"count": 1}, "w must be float32 or float16 or bfloat16: got dtype=float64"),
        (ONES[:, ::2], {"count": 1}, "w must be contiguous"),
        (np.ones((4, 0), np.float32), {"count": 0}, "w must not be empty"),
        (NAN, {"count": 1}, r"\[extract_outliers\] w must have no NaN: got row=2, column=1"),
        (NAN, {"count": 1, "per": "row"}, r"\[extract_outliers\] w must have no NaN: got row=2, column=1"),
        (ONES, {"count": 1, "out": FIXED}, "out must be writable"),
        (ONES, {"count": 1, "out": ONES[:2]}, "out must have the shape of w"),
        (ONES, {"count": 1, "out": ONES.astype(np.float16)}, "out must be float32: got dtype=float16"),
    ],
)
def test_bad_input_is_named(w, arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.extract_outliers(w, **arguments)


VALUES = np.array([1, 2, 3], np.float32)
COLUMNS = np.array([0, 4, 2], np.uint16)
OFFSETS = np.array([0, 2, 3], np.uint16)


def test_a_sound_matrix_is_taken():
    assert ops.SparseCSR(VALUES, COLUMNS, OFFSETS, (2, 5)).to_dense().tolist() == [[1, 0, 0, 0, 2], [0, 0, 3, 0, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": VALUES.astype(float)}, r"\[csr\] values must be float32 or float16 or bfloat16: got dtype=float64"),
        ({"columns": COLUMNS.astype(np.int32)}, "columns must be uint16: got dtype=int32"),
        ({"row_offsets": OFFSETS.astype(np.int64)}, "row_offsets must be uint16: got dtype=int64"),
        ({"columns": torch.tensor([0, 4, 2])}, "columns must be a NumPy array or a torch tensor, as values"),
        ({"columns": COLUMNS[:2]}, r"columns must have one dimension of length 3: got shape=\(2,\)"),
        ({"shape": (3, 5)}, r"row_offsets must have one dimension of length 4: got shape=\(3,\)"),
        ({"values": np.ones(6, np.float32)[::2]}, "values must be contiguous"),
        ({"row_offsets": np.array([1, 2, 3], np.uint16)}, "row_offsets must begin with 0"),
        ({"row_offsets": np.array([0, 2, 2], np.uint16)}, "row_offsets must end with the number of values"),
        ({"row_offsets": np.array([0, 4, 3], np.uint16)}, "row_offsets must not fall: got row=0, from=0, to=4"),
        ({"shape": (2, 4)}, "columns must be within the shape: got row=0, column=4, cols=4"),
        ({"columns": np.array([4, 4, 2], np.uint16)}, "columns of a row must ascend: got row=0, column=4"),
        ({"shape": (2, 0)}, "shape must not be empty"),
    ],
)
def test_an_unsound_matrix_is_named(fields, message):
    sound = {"values": VALUES, "columns": COLUMNS, "row_offsets": OFFSETS, "shape": (2, 5)}
    with pytest.raises(InvalidArgumentError, match=message):
        ops.SparseCSR(**(sound | fields))


def test_bad_targets_are_named():
    sparse = ops.SparseCSR(VALUES, COLUMNS, OFFSETS, (2, 5))
    for dense, message in [
        (np.zeros((2, 6), np.float32), r"\[add_to\] dense must have the shape of the sparse matrix"),
        (torch.zeros(2, 5), "dense must be of the library of the sparse matrix: got torch"),
        (np.zeros((2, 5)), "dense must be float32"),
        (FIXED, "dense must be writable"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            sparse.add_to(dense)
