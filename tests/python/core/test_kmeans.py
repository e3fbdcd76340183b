import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

import quantrature
from quantrature import InvalidArgumentError, ops


def inertia(x, centroids, weights=None):
    apart = np.abs(np.asarray(x, np.float64)[:, None] - np.asarray(centroids, np.float64)).min(axis=1)
    return float((apart**2 * (1 if weights is None else np.asarray(weights, np.float64))).sum())


def least_inertia(x, k, weights):
    """Over all ways to cut the sorted numbers into k runs."""
    order = np.argsort(x, kind="stable")
    x, weights = x[order].astype(np.float64), weights[order].astype(np.float64)

    def cost(run):
        mean = np.average(x[run], weights=weights[run])
        return (weights[run] * (x[run] - mean) ** 2).sum()

    cuts = itertools.combinations(range(1, len(x)), min(k, len(x)) - 1)
    return min(sum(cost(slice(a, b)) for a, b in itertools.pairwise((0, *c, len(x)))) for c in cuts)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-100, 100, width=16), st.floats(0.0625, 8, width=16)), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_no_way_to_cut_is_better(numbers, k):
    x, weights = np.array(numbers, np.float32).T.copy()
    centroids, _ = ops.kmeans_1d(x, k, weights)
    assert inertia(x, centroids, weights) <= least_inertia(x, k, weights) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("k", [2, 8, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_never_worse_than_others_find(k, weighted):
    rng = np.random.default_rng(k)
    for sample in (rng.standard_normal(1500), rng.standard_t(2, 1500), rng.integers(0, 40, 1500)):
        x = sample.astype(np.float32)
        weights = rng.random(1500).astype(np.float32) if weighted else None
        mine, assignment = ops.kmeans_1d(x, k, weights)
        assert (np.diff(mine) >= 0).all()
        distances = np.abs(x.astype(np.float64)[:, None] - mine.astype(np.float64))
        np.testing.assert_array_equal(assignment, distances.argmin(axis=1))
        least = inertia(x, mine, weights)
        for seed in range(3):
            theirs, _ = kmeans2(x.astype(np.float64), k, seed=seed, minit="++")
            assert least <= inertia(x, theirs, weights) * (1 + 1e-6)


def least_by_all_begins(x, k, weights):
    """The dynamic program without any of its shortcuts."""
    order = np.argsort(x, kind="stable")
    x, weights = x[order].astype(np.float64), weights[order].astype(np.float64)
    mass, first, second = (np.append(0, np.cumsum(weights * x**power)) for power in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (first - first[:, None]) ** 2 / (mass - mass[:, None])
    cost = np.triu(second - second[:, None] - np.nan_to_num(spread))
    cost[np.tril_indices(len(x) + 1, -1)] = np.inf
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(axis=0)
    return best[-1]


@pytest.mark.parametrize("k", [2, 3, 16, 50])
@pytest.mark.parametrize("kind", ["tails", "clumps", "importances", "steps"])
def test_long_rows_are_divided_best(kind, k):
    rng = np.random.default_rng(k)
    x, weights = rng.standard_normal(700), rng.random(700) + 0.01
    if kind == "tails":
        x[rng.integers(0, 700, 5)] *= 100
    if kind == "clumps":
        x = x * 0.01 + rng.integers(0, 20, 700)
    if kind == "importances":
        weights = np.exp(4 * rng.standard_normal(700))
    if kind == "steps":
        x = np.arange(700) / 64
        weights[:] = 1
    x, weights = x.astype(np.float32), weights.astype(np.float32)
    centroids, _ = ops.kmeans_1d(x, k, weights)
    assert inertia(x, centroids, weights) <= least_by_all_begins(x, k, weights) * (1 + 1e-6)


def test_is_never_worse_than_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal(2000).astype(np.float32), rng.random(2000).astype(np.float32)
    theirs = cluster.KMeans(16, n_init=3, random_state=0).fit(x.reshape(-1, 1), sample_weight=weights)
    mine, _ = ops.kmeans_1d(x, 16, weights)
    assert inertia(x, mine, weights) <= inertia(x, theirs.cluster_centers_.ravel(), weights) * (1 + 1e-6)


def test_an_extreme_number_does_not_blur_the_rest():
    rest = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    alone, _ = ops.kmeans_1d(rest, 4)
    for extreme in (-1e9, 1e9):
        both, _ = ops.kmeans_1d(np.append(rest, np.float32(extreme)), 5)
        np.testing.assert_allclose(np.sort(np.delete(both, np.abs(both).argmax())), alone, rtol=1e-5)


def test_rows_are_apart(library):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((2, 7, 300)).astype(np.float32)
    weights = np.abs(weights)
    centroids, assignment = ops.kmeans_1d(library(x), 5, library(weights))
    assert type(centroids) is type(library(x))
    assert tuple(centroids.shape) == (7, 5)
    assert tuple(assignment.shape) == (7, 300)
    for row in range(7):
        alone, of_row = ops.kmeans_1d(x[row], 5, weights[row])
        np.testing.assert_array_equal(centroids[row], alone)
        np.testing.assert_array_equal(assignment[row], of_row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened(dtype):
    x = torch.randn(3, 400).to(dtype)
    for mine, theirs in zip(ops.kmeans_1d(x, 8, x.abs()), ops.kmeans_1d(x.float(), 8, x.abs().float()), strict=True):
        assert torch.equal(mine, theirs)


def test_numbers_of_no_weight_have_no_say():
    x = np.array([0, 1, 5, 6, 100], np.float32)
    centroids, assignment = ops.kmeans_1d(x, 2, np.array([1, 1, 1, 1, 0], np.float32))
    assert centroids.tolist() == [0.5, 5.5]
    assert assignment.tolist() == [0, 0, 1, 1, 1]


def test_nothing_depends_on_threads():
    x = np.random.default_rng(0).standard_normal((50, 200)).astype(np.float32)
    before = quantrature.num_threads()
    results = []
    for threads in (1, 2, 3):
        quantrature.set_num_threads(threads)
        results.append(ops.kmeans_1d(x, 16))
    quantrature.set_num_threads(before)
    for centroids, assignment in results:
        np.testing.assert_array_equal(centroids, results[0][0])
        np.testing.assert_array_equal(assignment, results[0][1])


X = np.arange(8, dtype=np.float32).reshape(2, 4)
NAN = X.copy()
NAN[1, 2] = np.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, 0), r"\[kmeans\] k must be 1 to 256: got k=0"),
        ((X, 257), r"\[kmeans\] k must be 1 to 256: got k=257"),
        ((X.astype(np.float64), 2), r"\[kmeans\] x must be float32 or float16 or bfloat16: got dtype=float64"),
        ((X[:, ::2], 2), r"\[kmeans\] x must be contiguous"),
        ((X, 2, X[:1]), r"\[kmeans\] weights must have the shape of x: got shape=\(1, 4\), expected=\(2, 4\)"),
        ((X, 2, torch.ones(2, 4)), r"\[kmeans\] weights must be of the library of x: got torch"),
        ((NAN, 2), r"\[kmeans\] x must be finite: got value=nan, row=1, column=2"),
        ((X, 2, NAN), r"\[kmeans\] weights must be finite and not negative: got weight=nan, row=1, column=2"),
        ((X, 2, -X), r"weights must be finite and not negative: got weight=-1, row=0, column=1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ops.kmeans_1d(*arguments)
