from collections import Counter
from itertools import combinations

import pytest

from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 3), (7, 9, 8, 2), (8, 15, 2), (4, 3, 2, 2, 2), (3, 1, 3)])
def test_each_two_values_meet_and_none_is_rare(sizes):
    cases = pairwise(*(range(size) for size in sizes))
    for a, b in combinations(range(len(sizes)), 2):
        assert len({(case[a], case[b]) for case in cases}) == sizes[a] * sizes[b]
    largest, second = sorted(sizes)[:-3:-1]
    assert len(cases) <= 1.3 * largest * second
    for a, size in enumerate(sizes):
        assert min(Counter(case[a] for case in cases).values()) >= 0.7 * len(cases) / size
    assert cases == pairwise(*(range(size) for size in sizes))


def test_values_that_compare_equal_stay_apart():
    assert sorted(pairwise([1, True], [0]), key=str) == [(1, 0), (True, 0)]
