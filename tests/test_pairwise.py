"""The selection of parametrized cases covers every pair of values."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.pairwise import covering


def pairs(cases):
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


@pytest.mark.parametrize("sizes", [(3, 2, 8, 3), (2, 2, 2), (4, 5), (3,), ()])
def test_every_pair_is_covered(sizes):
    cases = [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]
    chosen = covering(cases)
    assert pairs(cases[i] for i in chosen) == pairs(cases)
    assert {item for i in chosen for item in cases[i].items()} == {item for case in cases for item in case.items()}
    if sizes == (3, 2, 8, 3):
        assert len(chosen) <= 30


def test_cases_that_are_no_product():
    cases = [{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}]
    assert covering(cases) == [0, 1]
