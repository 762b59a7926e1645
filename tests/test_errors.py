"""Errors: what is wrong, in few lines and without leaving anything out."""

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
        "\n"
        "lm_head: shape mismatch\n  needed  [1]\n  found   [2]"
    )


def test_problems_of_one_kind_that_differ_in_more_say_whose_lines_these_are() -> None:
    problems = [Problem(f"layers.{k}.w", "missing", f"layers.{k}.v") for k in range(3)]
    assert str(CheckpointError(problems)) == (
        "3 problems\n\n3 x layers.{0..2}.w: missing\n  needed  layers.0.v\n"
        "  (the lines above describe the first of 3)"
    )


def test_problems_that_differ_in_their_subject_alone_are_told_together() -> None:
    problems = [Problem(name, "unknown tensor") for name in ("b", "a.0", "a.1")]
    assert str(CheckpointError(problems)) == "3 problems\n\nb: unknown tensor\n2 x a.{0,1}: unknown tensor"
    problems = [Problem(f"name_{k}", "unknown tensor") for k in range(5000)]
    lines = str(CheckpointError(problems)).splitlines()
    assert lines[-2:] == ["name_19: unknown tensor", "... and 4,980 more names"]
    assert len(lines) < 30


# --- what follows from a loss ------------------------------------------------------------------------

GONE = "m-1-of-2.x is gone"


def gone(*lost: str, file: str = "m-1-of-2.x") -> Problem:
    return Problem(file, "is gone", cause="Get it.", reason=GONE, lost=lost)


def scale(name: str) -> Problem:
    text = "It looks like a scale whose weight is missing or stored in an unknown format."
    return Problem(f"{name}.weight_scale", "unknown tensor", cause=text)


FOLLOWS = [
    pytest.param(Problem("x", "missing", cause=GONE), True, id="cause"),
    pytest.param(Problem("x", "missing", cause=f"{GONE}\n  {GONE}"), True, id="causes"),
    pytest.param(Problem("x", "missing", cause=f"{GONE}\n  And more."), False, id="another cause too"),
    pytest.param(Problem("x", "missing"), False, id="no cause"),
    pytest.param(
        Problem("l.1.up.weight", "cannot be read", cause="no scale"), True, id="weight without scale"
    ),
    pytest.param(Problem("l.2.up.weight", "cannot be read", cause="no scale"), False, id="other weight"),
    pytest.param(scale("l.1.up"), True, id="scale without weight"),
    pytest.param(scale("l.2.up"), False, id="other scale"),
    pytest.param(Problem("l.1.up.qzeros", "unknown tensor"), True, id="another part"),
    pytest.param(Problem("l.1.upper", "unknown tensor"), False, id="unknown"),
    pytest.param(Problem("l.1.up", "missing"), True, id="module"),
    pytest.param(Problem("l.1.up", "its biases are missing"), True, id="biases"),
    pytest.param(Problem("l.1.up", "its stored tensors do not fit together"), True, id="parts"),
    pytest.param(Problem("l.1.up", "shape mismatch"), True, id="codes without scale"),
    pytest.param(Problem("l.1.up.bias", "shape mismatch"), False, id="shape"),
    pytest.param(Problem("l.1.up", "duplicate"), False, id="duplicate"),
    pytest.param(
        Problem("l.1", "expert 3 is missing", "l.1.e.{0..7}.up  (8 in config.json)"), True, id="expert"
    ),
    pytest.param(Problem("l.2", "expert 3 is missing", "l.2.e.{0..7}.up  (8)"), False, id="other expert"),
    pytest.param(Problem("l.1.e.{0..7}.up", "missing"), True, id="all experts"),
    pytest.param(Problem("l.1.e.{0..7}.down", "missing"), False, id="all other experts"),
]


@pytest.mark.parametrize(("problem", "follows"), FOLLOWS)
def test_what_follows_from_a_loss_is_not_told_by_itself(problem: Problem, follows: bool) -> None:
    cause = gone("l.1.up.weight_scale", "l.1.e.3.up.weight")
    error = CheckpointError([cause, problem])
    assert error.problems == (cause, problem)
    cause = (
        "m-1-of-2.x: is gone\n  Get it.\n  lost with it: 2 stored tensors\n"
        "    l.1.e.3.up.weight\n    l.1.up.weight_scale"
    )
    if follows:
        verb = "follows" if problem.cause.startswith(GONE) else "may follow"
        assert str(error) == f"1 problem, and 1 that {verb} from it (--json lists them)\n\n{cause}"
    else:
        assert str(error) == f"2 problems\n\n{cause}\n\n{problem}"
    assert str(error.in_full()) == f"2 problems\n\n{cause}\n\n{problem}"


def test_without_its_cause_nothing_follows() -> None:
    assert str(CheckpointError([Problem("x", "missing", cause=GONE)])).startswith("1 problem\n\nx: missing")


def test_files_of_a_set_are_told_together_with_all_that_is_lost() -> None:
    problems = [gone(f"l.{k}.w", f"l.{k}.v", file=f"m-{k:05}-of-00163.x") for k in range(82, 164)]
    problems += [Problem(f"l.{k}", "missing", cause=GONE) for k in range(82, 164)]
    assert str(CheckpointError(problems)) == (
        "82 problems, and 82 that follow from what is lost (--json lists them)\n\n"
        "82 x m-{00082..00163}-of-00163.x: is gone\n  Get it.\n  lost with it: 164 stored tensors\n"
        "    82 x l.{82..163}.v\n    82 x l.{82..163}.w"
    )


def test_of_much_that_is_lost_the_most_is_named() -> None:
    names = [f"l.{k}.w_{word}" for k, word in enumerate("aabbbcccccdefghiii")]
    text = str(CheckpointError([gone(*names)]))
    assert text.endswith("\n    l.10.w_d\n    l.11.w_e\n    and 3 more")
    assert "    5 x l.{5..9}.w_c\n    3 x l.{2..4}.w_b\n    3 x l.{15..17}.w_i\n    2 x l.{0,1}.w_a\n" in text


def test_where_nobody_knows_what_was_in_a_file_problems_may_follow() -> None:
    problems = [gone(), Problem("l.1.up.weight", "cannot be read"), Problem("lm_head", "shape mismatch")]
    assert str(CheckpointError(problems)) == (
        "2 problems, and 1 that may follow from what is lost (--json lists them)\n\n"
        "m-1-of-2.x: is gone\n  Get it.\n\nlm_head: shape mismatch"
    )


def test_a_tensor_that_is_lost_by_itself_is_named_once() -> None:
    problem = Problem("a.w", "is not in its file", reason="a.w is not in its file", lost=("a.w",))
    assert str(CheckpointError([problem])) == "1 problem\n\na.w: is not in its file"


def test_one_problem_is_said_in_the_singular() -> None:
    assert str(CheckpointError([Problem("x", "is odd")])) == "1 problem\n\nx: is odd"


def test_thousands_of_kinds_of_problems_do_not_fill_the_screen() -> None:
    problems = [Problem(f"name_{k}", f"unknown tensor {k}") for k in range(5000)]
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
