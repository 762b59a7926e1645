"""The pairs that stand for a product have every row and every column."""

from __future__ import annotations

from collections import Counter

import pytest
from pairs import PUBLISHED, pairs
from reference import FAMILIES

from mla_tools.architectures import MODEL_TYPES
from mla_tools.codecs import FORMATS


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (4, 6), (6, 4), (5, 7), (16, 20), (20, 20), (22, 20)])
def test_each_row_and_each_column_is_there_as_often_as_asked(rows: int, columns: int, times: int) -> None:
    first, second = [f"r{n}" for n in range(rows)], [f"c{n}" for n in range(columns)]
    chosen = pairs(first, second, times=times)
    assert len(chosen) == times * max(rows, columns)
    for half, names in zip(zip(*chosen, strict=True), (first, second), strict=True):
        counts = Counter(half)
        assert counts.keys() == set(names)
        assert min(counts.values()) >= times


def test_special_pairs_are_added_where_both_halves_are_known() -> None:
    rows, columns = "abc", "xyz"
    (special,) = {(r, c) for r in "a" for c in columns} - pairs(rows, columns)
    assert pairs(rows, columns, [special, ("a", "w"), ("d", "x")]) == pairs(rows, columns) | {special}


def test_published_pairs_are_of_known_families_and_formats() -> None:
    assert {family for family, _ in PUBLISHED} <= MODEL_TYPES.keys() | FAMILIES.keys()
    assert {fmt for _, fmt in PUBLISHED} <= FORMATS.keys()
    assert len(set(PUBLISHED)) == len(PUBLISHED)
