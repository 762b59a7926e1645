"""Names: folded, they are short, and stand for not a name more or less than was given."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tools.names import fold_indices, fold_names, natural


def unfold_indices(text: str) -> list[int]:
    """Return the numbers that a folded set of indices stands for."""
    numbers = []
    for item in text.strip("{}").split(","):
        first, _, last = item.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def unfold(line: str) -> list[str]:
    """Return the names that a folded line stands for, after checking the count before it."""
    count, times, name = line.partition(" x ")
    if not times:
        count, name = "1", line
    pieces = [[piece] for piece in name.split(".")]
    # ".." stands inside braces alone, so the pieces that it tore apart are put together again.
    texts: list[str] = []
    for (piece,) in pieces:
        if texts and texts[-1].count("{") > texts[-1].count("}"):
            texts[-1] += "." + piece
        else:
            texts.append(piece)
    choices = [[str(n) for n in unfold_indices(text)] if text.startswith("{") else [text] for text in texts]
    names = [".".join(choice) for choice in product(*choices)]
    assert len(names) == int(count)
    return names


INDICES = [
    pytest.param([], "{}", id="none"),
    pytest.param([7], "7", id="one"),
    pytest.param([3, 4], "{3,4}", id="two_neighbours"),
    pytest.param([0, 1, 2], "{0..2}", id="range"),
    pytest.param([8, 0, 1, 2, 4, 6, 7, 8, 0], "{0..2,4,6..8}", id="mixed_doubled_unsorted"),
    pytest.param([9, 10, 11], "{9..11}", id="by_number_not_by_letter"),
]


@pytest.mark.parametrize(("numbers", "text"), INDICES)
def test_fold_indices(numbers: list[int], text: str) -> None:
    assert fold_indices(numbers) == text


@given(st.sets(st.integers(0, 40), min_size=1))
def test_folded_indices_stand_for_exactly_the_numbers(numbers: set[int]) -> None:
    assert unfold_indices(fold_indices(numbers)) == sorted(numbers)


NAMES = [
    pytest.param([], [], id="none"),
    pytest.param(["lm_head"], ["lm_head"], id="no_index"),
    pytest.param(["a.3.b"], ["a.3.b"], id="one"),
    pytest.param([f"l.{k}.kv_b_proj" for k in range(61)], ["61 x l.{0..60}.kv_b_proj"], id="layers"),
    pytest.param(
        [f"l.{k}.e.{e}.up" for k in (1, 2) for e in (0, 1, 2)], ["6 x l.{1,2}.e.{0..2}.up"], id="product"
    ),
    pytest.param(["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["2 x l.0.e.{0,1}", "l.1.e.0"], id="no_product_is_split"),
    pytest.param(["x.b.0", "y.0", "x.b.1"], ["2 x x.b.{0,1}", "y.0"], id="order_of_appearance"),
    pytest.param(["q_conv1d.a", "q_conv2d.a"], ["q_conv1d.a", "q_conv2d.a"], id="digits_in_words"),
    pytest.param(["a.0", "a.0"], ["a.0"], id="doubled"),
]


@pytest.mark.parametrize(("names", "lines"), NAMES)
def test_fold_names(names: list[str], lines: list[str]) -> None:
    assert fold_names(names) == lines


LEAVES = st.sampled_from(["weight", "bias", "q_conv1d"])


@given(st.lists(st.builds("m.{}.e.{}.{}".format, st.integers(0, 5), st.integers(0, 5), LEAVES)))
def test_folded_lines_stand_for_exactly_the_names(names: list[str]) -> None:
    unfolded = [name for line in fold_names(names) for name in unfold(line)]
    assert sorted(unfolded) == sorted(set(names))


def test_names_that_differ_in_leading_zeros_are_different_names() -> None:
    folded = fold_names(["layers.1.x", "layers.01.x"])
    assert any("01" in line for line in folded)


def test_a_number_of_ten_thousand_digits_is_a_word() -> None:
    name = f"layers.{'9' * 10_000}.x"
    assert fold_names([name]) == [name]


def test_a_name_of_thousands_of_indices_is_one_word() -> None:
    names = [f"a.{number}" + ".0" * 2000 for number in range(2)]
    assert fold_names(names) == names


def test_in_natural_order_layer_10_comes_after_layer_9() -> None:
    names = ["l.10.a", "l.9.b", "l.9.a", "a", "l.9.a.2", "l.9.a.11"]
    assert sorted(names, key=natural) == ["a", "l.9.a", "l.9.a.2", "l.9.a.11", "l.9.b", "l.10.a"]
