"""The errors of mla-tools, and the folding of long lists of names into lines a person can read."""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "ChangedError",
    "CheckpointError",
    "DamagedError",
    "DataError",
    "MlaToolsError",
    "Problem",
    "UsageError",
    "clipped",
    "fold_indices",
    "fold_names",
]

# Splits a name into its words and its numbers: "a.3.b.17" -> ["a", "3", ".b", "17", ""].
# Only whole dotted components count, so "q_conv1d" stays a word, and only numbers as they are written
# out: "01" is a word, or two names would stand for one place, and so is what no int should be made of.
INDEX = re.compile(r"\.(0|[1-9][0-9]{0,17})(?=\.|\Z)")

_MAX_GROUPS = 40

# Names with more indices than this are not folded: no model has them, and each costs a level of recursion.
_MAX_INDICES = 16


_clip = reprlib.Repr()
_clip.maxstring = _clip.maxother = _clip.maxlong = 80
_clip.maxlist = _clip.maxdict = 8
_clip.maxlevel = 3


def clipped(value: object) -> str:
    """Return the repr of a JSON value, short and printable however deep, long or strange it is."""
    return _clip.repr(value)


class MlaToolsError(Exception):
    """Base of every error that mla-tools raises on purpose; `exit_code` is what the command returns.

    `resumable`: an output that it leaves unfinished can be finished, once what was wrong is mended.
    """

    exit_code = 1
    resumable = True


class UsageError(MlaToolsError):
    """The options contradict each other or name something that does not exist."""

    exit_code = 2


class DataError(MlaToolsError):
    """The numbers of a tensor cannot be converted, or not with these options."""

    resumable = False


class DamagedError(MlaToolsError):
    """An unfinished output is not as it was left."""

    resumable = False


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint: what, what was needed and why, what was found."""

    subject: str
    what: str
    needed: str = ""
    found: str = ""
    cause: str = ""

    def __str__(self) -> str:
        return self.text(self.subject)

    def text(self, subject: str) -> str:
        """Return the problem as lines, under a heading that may stand for several folded subjects."""
        lines = [f"{subject}: {self.what}"]
        lines += [f"  {word:<7} {value}" for word, value in self._details() if value]
        if self.cause:
            lines.append(f"  {self.cause}")
        return "\n".join(lines)

    def _details(self) -> tuple[tuple[str, str], ...]:
        return (("needed", self.needed), ("found", self.found))

    def _kind(self) -> tuple[str, ...]:
        return tuple(
            INDEX.sub(".*", text) for text in (self.subject, self.what, self.needed, self.found, self.cause)
        )


class CheckpointError(MlaToolsError):
    """Everything that is wrong with a checkpoint or an output, in one go.

    `problems` holds each case; the message folds cases that differ in their indices alone.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        groups: dict[tuple[str, ...], list[Problem]] = defaultdict(list)
        for problem in self.problems:
            groups[problem._kind()].append(problem)
        blocks = []
        for members in list(groups.values())[:_MAX_GROUPS]:
            subjects = fold_names(problem.subject for problem in members)
            text = members[0].text(subjects[0])
            if len(members) > 1:
                text += f"\n  (the lines above are those of the first of {len(members)})"
            blocks.append("\n".join(subjects[1:] + [text]))
        if len(groups) > _MAX_GROUPS:
            blocks.append(f"... and {len(groups) - _MAX_GROUPS} more kinds of problems")
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        return f"{head}\n\n" + "\n\n".join(blocks)


class ChangedError(CheckpointError):
    """A checkpoint is not what it was when its conversion was planned."""

    resumable = False


def fold_indices(values: Iterable[int]) -> str:
    """Return a set of indices as ranges, "{0..2,4,6..8}"; a single index stands without braces."""
    if isinstance(values, range) and values.step == 1 and len(values) > 2:
        return f"{{{values[0]}..{values[-1]}}}"
    numbers = sorted(set(values))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(numbers[0])
    # Two neighbours are a list, three and more a range.
    texts = [
        str(first) if first == last else f"{first}{',' if last == first + 1 else '..'}{last}"
        for first, last in runs
    ]
    return "{" + ",".join(texts) + "}"


def fold_names(names: Iterable[str]) -> list[str]:
    """Return one line for all names that differ in their indices alone, in order of first appearance.

    Each line is a name or "61 x model.layers.{0..60}.self_attn.kv_b_proj". A line stands for exactly
    the names given: index sets that are not a full product are split over several lines.
    """
    groups: dict[tuple[str, ...], dict[tuple[int, ...], None]] = {}
    for name in names:
        pieces = INDEX.split(name)
        if len(pieces) > 2 * _MAX_INDICES:
            pieces = [name]
        groups.setdefault(tuple(pieces[::2]), {})[tuple(map(int, pieces[1::2]))] = None
    lines = []
    for words, tuples in groups.items():
        for axes in _products(list(tuples)):
            count = 1
            text = words[0]
            for axis, word in zip(axes, words[1:], strict=True):
                count *= len(axis)
                text += f".{fold_indices(axis)}{word}"
            lines.append(text if count == 1 else f"{count:,} x {text}")
    return lines


def _products(tuples: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Return axes whose products cover exactly the given index tuples, folding the last index first."""
    if not tuples[0]:
        return [()]
    tails: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for head, *rest in tuples:
        tails[head].append(tuple(rest))
    same: dict[tuple[tuple[tuple[int, ...], ...], ...], list[int]] = defaultdict(list)
    for head, rests in tails.items():
        same[tuple(_products(rests))].append(head)
    return [(tuple(heads), *axes) for products, heads in same.items() for axes in products]
