import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integer_program import choose
from quantrature import InvalidArgumentError
from quantrature.ops import multiple_choice_knapsack


def loss_like(items, options, seed):
    """Costs that fall with size about as losses do with bits, of matrices of a few sizes."""
    rng = np.random.default_rng(seed)
    params = rng.choice([4096, 11008, 16384], items) * 4096
    weight = np.exp(rng.normal(0, 1.5, items))
    bits = np.sort(rng.choice(np.arange(9, 65), options, replace=False)) / 8
    costs = weight[:, None] * 4.0 ** -bits[None, :] * np.exp(rng.normal(0, 0.1, (items, options)))
    return costs.tolist(), (params[:, None] * bits[None, :]).astype(np.int64).tolist()


@pytest.mark.parametrize("items", [7, 60, 224])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_agrees_with_the_integer_program(items, share):
    costs, sizes = loss_like(items, 10, items)
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    budget = int(least + share * (most - least))
    found = multiple_choice_knapsack(costs, sizes, budget)
    peer = choose(costs, sizes, budget, relative_gap=1e-9, time_limit=30)
    assert found.size <= budget
    assert found.cost <= peer.cost * (1 + 1e-12)
    assert found.bound == pytest.approx(found.cost, rel=1e-9)
    assert peer.bound <= found.cost * (1 + 1e-9)


items = st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 500)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(st.lists(items, min_size=1, max_size=6), st.integers(0, 3000))
def test_the_choice_is_the_best_there_is(problem, budget):
    costs = [[cost for cost, _ in item] for item in problem]
    sizes = [[size for _, size in item] for item in problem]
    if sum(map(min, sizes)) > budget:
        with pytest.raises(InvalidArgumentError, match="smallest choice must be within the budget"):
            multiple_choice_knapsack(costs, sizes, budget)
        return
    least = {0: 0.0}
    for item in problem:
        reached: dict[int, float] = {}
        for size, cost in least.items():
            for more, extra in item:
                if size + extra <= budget:
                    reached[size + extra] = min(reached.get(size + extra, math.inf), cost + more)
        least = reached
    found = multiple_choice_knapsack(costs, sizes, budget)
    assert found.cost == pytest.approx(min(least.values()), abs=1e-9)
    assert found.cost == pytest.approx(sum(c[k] for c, k in zip(costs, found.chosen, strict=True)), abs=1e-9)
    assert found.size == sum(s[k] for s, k in zip(sizes, found.chosen, strict=True)) <= budget


def test_refusals():
    for args, message in [
        (([], [], 1), r"\[allocate\] items must be at least 1: got items=0"),
        (([[1.0]], [[1, 2]], 3), r"as many sizes as costs: got item=0, sizes=2, costs=1"),
        (([[1.0, 2.0], []], [[1, 2], []], 3), r"each item has an option: got item=1"),
        (([[1.0]], [[0.5]], 3), r"sizes must be whole numbers"),
        (([[1.0]], [[-1]], 3), r"sizes must be at least 0: got item=0"),
        (([[math.nan]], [[1]], 3), r"costs must be finite"),
        (([[1.0]], [[1]], -3), r"sizes and budget must be at least 0"),
        (([[1.0]], [[1 << 63]], 3), r"below 2\^62"),
        (([[1.0]], [[4]], 3), r"the smallest choice must be within the budget: got smallest=4, budget=3"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            multiple_choice_knapsack(*args)


def test_the_budget_holds_to_the_byte_in_large_programs():
    sizes = [[10**11 + 1, 10**11 + 2, 3 * 10**11] for _ in range(5)]
    costs = [[2.0, 1.0, 0.0] for _ in range(5)]
    found = multiple_choice_knapsack(costs, sizes, 5 * 10**11 + 7)
    assert found.size == 5 * 10**11 + 7
    assert found.cost == 8
    assert found.gap == 0
