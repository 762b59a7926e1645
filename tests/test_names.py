"""Names: folded, they are short, and stand for not a name more or less than was given."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tools.names import fold_files, fold_indices, fold_names, natural


def unfold_indices(text: str) -> list[int]:
    """Return the numbers that a folded set of indices stands for, read as a person would."""
    whole, _, holes = text.strip("{}").partition(" except ")
    return sorted(set(listed(whole)) - set(listed(holes)))


def listed(text: str) -> list[int]:
    numbers: list[int] = []
    items = iter(text.split(",") if text else [])
    for item in items:
        if item == "...":
            numbers += range(numbers[-1], int(next(items)) + 1, numbers[-1] - numbers[-2])[1:]
        else:
            first, _, last = item.partition("..")
            numbers += range(int(first), int(last or first) + 1)
    assert sorted(set(numbers)) == numbers  # in order, and none is there again
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
    pytest.param(range(3, 92, 4), "{3,7,...,91}", id="every_fourth"),
    pytest.param(
        set(range(91)) - set(range(3, 91, 4)), "{0..90 except 3,7,...,87}", id="all_but_every_fourth"
    ),
    pytest.param(range(0, 10, 2), "{0,2,4,6,8}", id="five_in_steps_are_listed"),
    pytest.param(range(0, 12, 2), "{0,2,...,10}", id="six_in_steps_are_not"),
    pytest.param([3, 7, 11, 15, 19, 23, 26], "{3,7,...,23,26}", id="steps_and_one_more"),
    pytest.param([0, 5, *range(7, 40, 4), 50, 51, 52], "{0,5,7,11,...,39,50..52}", id="one_more_and_steps"),
    pytest.param(set(range(61)) - {3}, "{0..2,4..60}", id="one_hole"),
    pytest.param(set(range(61)) - {3, 30, 31, 50}, "{0..60 except 3,30,31,50}", id="few_holes"),
    pytest.param([1, 10**17], f"{{1,{10**17}}}", id="far_apart"),
    pytest.param(range(10**15), f"{{0..{10**15 - 1}}}", id="a_range_is_not_walked"),
]


@pytest.mark.parametrize(("numbers", "text"), INDICES)
def test_fold_indices(numbers: list[int], text: str) -> None:
    assert fold_indices(numbers) == text


# Sets as models have them, of ranges with steps, and what is left when such are taken away.
STEPS = st.builds(range, st.integers(0, 30), st.integers(0, 100), st.integers(1, 7)).map(set)


@given(
    st.one_of(
        st.sets(st.integers(0, 40), min_size=1), STEPS, st.builds(set.symmetric_difference, STEPS, STEPS)
    )
)
def test_folded_indices_stand_for_exactly_the_numbers(numbers: set[int]) -> None:
    text = fold_indices(numbers)
    assert unfold_indices(text) == sorted(numbers)
    assert len(text) <= len(",".join(map(str, numbers))) + 2
    assert unfold_indices(fold_indices(numbers, 5)) == sorted(numbers)


FILES = [
    pytest.param(["a.bin", "a.bin"], ["a.bin"], id="doubled"),
    pytest.param(["m-00002-of-00003.x"], ["m-00002-of-00003.x"], id="one"),
    pytest.param(
        [f"m-{k:05}-of-00163.x" for k in range(82, 164)], ["82 x m-{00082..00163}-of-00163.x"], id="set"
    ),
    pytest.param(
        ["m-00001-of-00003.x", "m-00003-of-00003.x"], ["2 x m-{00001,00003}-of-00003.x"], id="holes"
    ),
    pytest.param(["m-01-of-9.x", "m-001-of-9.x"], ["m-01-of-9.x", "m-001-of-9.x"], id="digits"),
    pytest.param(["config.json", "b.10.x", "c.x"], ["config.json", "b.10.x", "c.x"], id="none"),
]


@pytest.mark.parametrize(("names", "lines"), FILES)
def test_fold_files(names: list[str], lines: list[str]) -> None:
    assert fold_files(names) == lines


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
