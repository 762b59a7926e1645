"""Errors: what is wrong, told in few lines and without leaving anything out."""

from __future__ import annotations

import pytest

from mla_tools.errors import (
    CheckpointError,
    MlaToolsError,
    Problem,
    UsageError,
    clipped,
)


def test_a_number_of_ten_thousand_digits_stands_in_the_message_like_any_other_name() -> None:
    name = f"layers.{'9' * 10_000}.x"
    assert name in str(CheckpointError([Problem(name, "unknown tensor")]))


def test_a_problem_has_a_line_for_each_thing_it_knows() -> None:
    whole = Problem("a.weight", "is missing", "[2, 3]", "nothing", "Download it.")
    assert str(whole) == "a.weight: is missing\n  needed  [2, 3]\n  found   nothing\n  Download it."
    assert str(Problem("a", "is odd")) == "a: is odd"


def test_the_message_folds_problems_that_differ_in_indices_alone() -> None:
    problems = [Problem(f"layers.{k}.w", "missing", f"[{2}]") for k in range(5)]
    other = Problem("lm_head", "shape mismatch", "[1]", "[2]")
    error = CheckpointError([*problems, other])
    assert error.problems == (*problems, other)
    assert str(error) == (
        "6 problems\n\n"
        "5 x layers.{0..4}.w: missing\n  needed  [2]\n"
        "  (the lines above are those of the first of 5)\n\n"
        "lm_head: shape mismatch\n  needed  [1]\n  found   [2]"
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


def test_a_value_is_clipped() -> None:
    assert clipped({"a": "x" * 1000}) == "{'a': '" + "x" * 37 + "..." + "x" * 38 + "'}"
