"""Errors, and the folding of names: short, and never a name more or less than was given."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tools.errors import (
    CheckpointError,
    MlaToolsError,
    Problem,
    UsageError,
    clipped,
    fold_indices,
    fold_names,
)


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


def test_a_number_of_ten_thousand_digits_is_folded_like_any_other_name() -> None:
    name = f"layers.{'9' * 10_000}.x"
    assert fold_names([name]) == [name]
    assert name in str(CheckpointError([Problem(name, "unknown tensor")]))


def test_a_problem_has_a_line_for_each_thing_it_knows() -> None:
    whole = Problem("a.weight", "is missing", "[2, 3]", "nothing", "Download it.")
    assert str(whole) == "a.weight: is missing\n  needed  [2, 3]\n  found   nothing\n  Download it."
    assert str(Problem("a", "is odd")) == "a: is odd"


def test_the_message_folds_problems_that_differ_in_indices_alone() -> None:
    problems = [Problem(f"layers.{k}.w", "missing", f"[{2}]") for k in range(5)]
    other = Problem("lm_head", "wrong shape", "[1]", "[2]")
    error = CheckpointError([*problems, other])
    assert error.problems == (*problems, other)
    assert str(error) == (
        "6 problems\n\n"
        "5 x layers.{0..4}.w: missing\n  needed  [2]\n"
        "  (the lines above are those of the first of 5)\n\n"
        "lm_head: wrong shape\n  needed  [1]\n  found   [2]"
    )


def test_one_problem_is_said_in_the_singular() -> None:
    assert str(CheckpointError([Problem("x", "is odd")])) == "1 problem\n\nx: is odd"


def test_thousands_of_kinds_of_problems_do_not_fill_the_screen() -> None:
    problems = [Problem(f"name_{k}", "unknown tensor") for k in range(5000)]
    error = CheckpointError(problems)
    assert len(error.problems) == 5000
    assert str(error).startswith("5000 problems\n\n")
    assert len(str(error).splitlines()) < 200
    assert "more kinds of problems" in str(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [(MlaToolsError("x"), 1), (UsageError("x"), 2), (CheckpointError([]), 1)],
    ids=["error", "usage", "checkpoint"],
)
def test_exit_codes(error: MlaToolsError, code: int) -> None:
    assert error.exit_code == code


def test_a_name_of_thousands_of_indices_is_one_word() -> None:
    names = [f"a.{number}" + ".0" * 2000 for number in range(2)]
    assert fold_names(names) == names
    assert clipped({"a": "x" * 1000}) == "{'a': '" + "x" * 37 + "..." + "x" * 38 + "'}"
