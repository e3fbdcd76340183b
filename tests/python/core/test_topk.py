import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantrature
from quantrature import InvalidArgumentError, ops


def by_sorting(x: np.ndarray, k: int, key: str) -> np.ndarray:
    """Places of the k largest, as a stable sort finds them."""
    score = np.abs(x.ravel()) if key == "abs" else x.ravel()
    return np.sort(np.argsort(-score.astype(np.float64), kind="stable")[:k])


def check(x: torch.Tensor, k: int, key: str) -> None:
    values, indices = ops.topk(x, k, key)
    expected = by_sorting(x.float().numpy(), k, key)
    np.testing.assert_array_equal(indices.numpy(), expected)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    bits = torch.int32 if x.dtype is torch.float32 else torch.int16
    assert torch.equal(values.view(bits), x.reshape(-1)[torch.from_numpy(expected)].view(bits))


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
KEYS = st.sampled_from(["abs", "value"])


@st.composite
def arrays(draw, max_size):
    """Numbers of few or many distinct values, infinities and both zeros among them."""
    shape = draw(st.one_of(st.tuples(st.integers(1, max_size)), st.tuples(st.integers(1, 40), st.integers(1, 200))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 2, 5, 100, 10**9]))
    scale = draw(st.sampled_from([1e-44, 1e-7, 1.0, 1e4]))
    x = (rng.integers(-levels, levels + 1, shape) / levels * scale).astype(np.float32)
    if draw(st.booleans()):
        special = rng.choice(np.array([0.0, -0.0, np.inf, -np.inf], np.float32), shape)
        x = np.where(rng.random(shape) < 0.1, special, x)
    return torch.from_numpy(x).to(draw(DTYPES))


@settings(max_examples=200, deadline=None)
@given(arrays(3000), st.floats(0, 1), KEYS)
def test_is_what_a_stable_sort_gives(x, share, key):
    check(x, round(share * x.numel()), key)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(66_000, 300_000), st.sampled_from([1, 3, 50, 10**9]), st.floats(0, 1), DTYPES, KEYS, st.integers(1, 4)
)
def test_of_many_numbers(n, levels, share, dtype, key, threads):
    """Long enough for the sampled bound, with ties enough to defeat it."""
    rng = np.random.default_rng(n)
    x = torch.from_numpy((rng.integers(-levels, levels + 1, n) / levels).astype(np.float32)).to(dtype)
    before = quantrature.num_threads()
    quantrature.set_num_threads(threads)
    try:
        check(x, round(share**4 * n), key)
    finally:
        quantrature.set_num_threads(before)


@pytest.mark.parametrize("key", ["abs", "value"])
def test_numbers_that_mislead_the_sample(key):
    """All of the largest side by side, and none of them where most of the matrix is."""
    x = torch.full((2**18,), 0.25)
    x[100_000:100_700] = torch.linspace(1, 2, 700)
    for k in (1, 500, 700, 701, 2**18):
        check(x, k, key)
    check(torch.arange(2**18, dtype=torch.float32), 2000, key)
    check(-torch.arange(2**18, dtype=torch.float32), 2000, key)


def test_agrees_with_argpartition(library):
    x = np.random.default_rng(0).standard_normal((500, 400)).astype(np.float32)
    k = 1000
    values, indices = ops.topk(library(x), k)
    np.testing.assert_array_equal(
        np.asarray(indices), np.sort(np.argpartition(np.abs(x).ravel(), x.size - k)[x.size - k :])
    )
    np.testing.assert_array_equal(np.asarray(values), x.ravel()[np.asarray(indices)])
    assert type(values) is type(library(x))
    assert type(indices) is type(library(x))


def test_every_target_and_thread_count_selects_the_same(every_target):
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal(200_000).astype(np.float32), rng.integers(-3, 4, 200_000).astype(np.float16)]
    before = quantrature.num_threads()
    results = []
    for _ in every_target():
        for threads in (1, 2, 3, 4):
            quantrature.set_num_threads(threads)
            results.append([ops.topk(x, k, key)[1] for x in inputs for k in (7, 1000) for key in ("abs", "value")])
    quantrature.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=5), st.sampled_from([1, 4, 10**9]), st.floats(0, 1), KEYS)
def test_of_several_arrays_is_that_of_their_concatenation(sizes, levels, share, key):
    rng = np.random.default_rng(sum(sizes))
    parts = [(rng.integers(-levels, levels + 1, n) / levels).astype(np.float32) for n in sizes]
    whole = np.concatenate(parts)
    k = round(share * whole.size)
    pairs = ops.topk(parts, k, key)
    starts = np.cumsum([0, *sizes[:-1]])
    _, expected = ops.topk(whole, k, key)
    assert len(pairs) == len(parts)
    np.testing.assert_array_equal(np.concatenate([i + s for (_, i), s in zip(pairs, starts, strict=True)]), expected)
    np.testing.assert_array_equal(np.concatenate([v for v, _ in pairs]), whole[expected])


def test_of_several_large_arrays():
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal((300, 1000)).astype(np.float32) * scale for scale in (1, 0.01, 2)]
    pairs = ops.topk(tuple(parts), 3000)
    whole = np.concatenate([p.ravel() for p in parts])
    found = np.concatenate([i + 300_000 * n for n, (_, i) in enumerate(pairs)])
    np.testing.assert_array_equal(found, by_sorting(whole, 3000, "abs"))
    assert len(pairs[1][0]) == 0


def test_none_of_them(library):
    values, indices = ops.topk(library(np.ones((3, 4), np.float32)), 0)
    assert tuple(values.shape) == tuple(indices.shape) == (0,)
    assert ops.topk(np.array([np.nan], np.float32), 0)[1].size == 0


@pytest.mark.parametrize("n", [50, 200_000])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("key", ["abs", "value"])
def test_not_a_number_is_refused_with_its_place(key, sign, n):
    x = np.random.default_rng(0).standard_normal((2, n)).astype(np.float32)
    x[1, 7] = np.copysign(np.float32(np.nan), sign)
    x[1, 9] = np.nan
    with pytest.raises(InvalidArgumentError, match=r"\[topk\] x must have no NaN: got row=1, column=7"):
        ops.topk(x, 3, key)
    with pytest.raises(InvalidArgumentError, match=r"x must have no NaN: got array=1, row=1, column=7"):
        ops.topk([x[:1], x], 3, key)


ONES = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
    ("x", "k", "key", "message"),
    [
        (ONES, 17, "abs", r"\[topk\] k must be from 0 to the number of elements: got k=17, elements=16"),
        (ONES, -1, "abs", "k must be from 0 to the number of elements: got k=-1"),
        ([ONES, ONES], 33, "abs", "got k=33, elements=32"),
        (ONES, 1, "rank", "key must be abs or value: got key='rank'"),
        (np.ones(4), 1, "abs", "x must be float32 or float16 or bfloat16: got dtype=float64"),
        (np.ones((0, 4), np.float32), 0, "abs", "x must not be empty"),
        (ONES[:, ::2], 1, "abs", "x must be contiguous"),
        ("text", 1, "abs", "x must be a NumPy array or a torch tensor: got builtins.str"),
        ([], 0, "abs", "x must hold at least one array"),
        ([ONES, ONES.astype(np.float16)], 1, "abs", r"arrays of one library and dtype: got x\[1\] of numpy, float16"),
        ([ONES, torch.ones(3)], 1, "abs", r"arrays of one library and dtype: got x\[1\] of torch"),
        ([ONES, 3], 1, "abs", r"x\[1\] must be a NumPy array"),
    ],
)
def test_bad_input_is_named(x, k, key, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.topk(x, k, key)
