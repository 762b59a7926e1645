"""Names of tensors: the numbers in them, templates, their natural order, and many folded into one line.

A template is a name in which whole components are indices: `model.layers.{l}.mlp.experts.{e}.up_proj.weight`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

__all__ = [
    "NUMBER",
    "Domain",
    "Fold",
    "Template",
    "fold_files",
    "fold_indices",
    "fold_names",
    "folds",
    "natural",
    "short",
    "template",
]

# The values that an index may take.
Domain = range | frozenset[int]

_FIELD = re.compile(r"\.\{(\w+)\}(?=\.|\Z)")

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")

# Splits a name into its words and its numbers: "a.3.b.17" -> ["a", "3", ".b", "17", ""].
# Only whole dotted components count, so "q_conv1d" stays a word, and only numbers as they are written
# out: "01" is a word, or two names would stand for one place, and so is what no int should be made of.
NUMBER = re.compile(rf"\.({_INDEX.pattern})(?=\.|\Z)")

# Names with more indices than this are not folded: no model has them, and each costs a level of recursion.
_MAX_INDICES = 16

# Fewer numbers than this in equal steps are listed, which is as short.
_MIN_STEPS = 6


# A file of a set, such as model-00002-of-00003.safetensors.
_OF_A_SET = re.compile(r"(.*-)([0-9]{1,18})(-of-[0-9]{1,18}\.[a-z]+)", re.DOTALL)


def short(tensor: str) -> str:
    """Return a tensor's name as people say it: without the ".weight" that every module has."""
    return tensor.removesuffix(".weight")


class Template:
    """A template taken apart: `words` between the indices, `indices` in order. Made by `template`."""

    __slots__ = ("indices", "text", "words")

    def __init__(self, text: str) -> None:
        pieces = _FIELD.split(text)
        self.text = text
        self.words = tuple(pieces[::2])
        self.indices = tuple(pieces[1::2])
        if len(NUMBER.split(text)) > 1 or "{" in "".join(self.words):
            raise ValueError(
                f"{text}: indices are whole components in braces, and numbers are written as indices"
            )

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    def format(self, values: Mapping[str, int]) -> str:
        """Return the concrete name for these index values."""
        pieces = [self.words[0]]
        for index, word in zip(self.indices, self.words[1:], strict=True):
            pieces.append(f".{values[index]}{word}")
        return "".join(pieces)

    def fold(self, values: Mapping[str, int], where: Mapping[str, Domain]) -> str:
        """Return the name with the given values filled in and the other indices as ranges."""
        pieces = [self.words[0]]
        for index, word in zip(self.indices, self.words[1:], strict=True):
            number = str(values[index]) if index in values else fold_indices(where[index])
            pieces.append(f".{number}{word}")
        return "".join(pieces)


@cache
def template(text: str) -> Template:
    """Return a template taken apart; ValueError if it is none."""
    return Template(text)


def natural(name: str) -> tuple[str | int, ...]:
    """Return a sort key under which layer 10 comes after layer 9."""
    pieces: list[str | int] = list(NUMBER.split(name))
    pieces[1::2] = map(int, pieces[1::2])
    return tuple(pieces)


def fold_indices(values: Iterable[int], digits: int = 1) -> str:
    """Return a set of indices, exactly and in short; a single index stands without braces.

    {0..60}                         0 to 60
    {3,7,...,91}                    3, 7 and so on to 91: the first two tell the step
    {0..2,5,9..11}                  several of them
    {0..90 except 3,7,...,87}       where that is shorter

    `digits`: numbers are filled up with zeros to so many.
    """
    runs = _runs(values)
    text = _listed(runs, digits)
    if text.isdigit():
        return text
    if len(runs) > 1:
        whole = [(runs[0][0], runs[-1][1])]
        gaps = [(last + 1, first - 1) for (_, last), (first, _) in pairwise(runs)]
        text = min(text, f"{_listed(whole, digits)} except {_listed(gaps, digits)}", key=len)
    return f"{{{text}}}"


def _runs(values: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of neighbours, in order."""
    if isinstance(values, range) and values.step == 1 and values:
        return [(values[0], values[-1])]
    runs: list[tuple[int, int]] = []
    for number in sorted(set(values)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _listed(runs: Sequence[tuple[int, int]], digits: int) -> str:
    """Return runs of numbers (first, last) as a list of numbers, ranges and equal steps."""
    items: list[str] = []
    start = 0
    while start < len(runs):
        first, last = runs[start]
        stop = _steps_end(runs, start)
        if stop - start >= _MIN_STEPS:
            numbers = [first, runs[start + 1][0], "...", runs[stop - 1][0]]
        elif last > first + 1:
            stop, numbers = start + 1, [f"{first:0{digits}}..{last:0{digits}}"]
        else:  # two neighbours are a list, three and more a range
            stop, numbers = start + 1, list(range(first, last + 1))
        items += [item if isinstance(item, str) else f"{item:0{digits}}" for item in numbers]
        start = stop
    return ",".join(items)


def _steps_end(runs: Sequence[tuple[int, int]], start: int) -> int:
    """Return where the single numbers end that begin at `start` and follow one another in equal steps."""
    stop = start
    while stop < len(runs) and runs[stop][0] == runs[stop][1]:
        if stop > start + 1 and runs[stop][0] - runs[stop - 1][0] != runs[start + 1][0] - runs[start][0]:
            break
        stop += 1
    return stop


@dataclass(frozen=True)
class Fold:
    """Names that differ in their indices alone: how many, and one text for all of them."""

    count: int
    text: str

    def __str__(self) -> str:
        return self.text if self.count == 1 else f"{self.count:,} x {self.text}"


def fold_names(names: Iterable[str]) -> list[str]:
    """Return one line for all names that differ in their indices alone, in order of first appearance.

    Each line is a name or "61 x model.layers.{0..60}.self_attn.kv_b_proj". A line stands for exactly
    the names given: index sets that are not a full product are split over several lines.
    """
    return list(map(str, folds(names)))


def folds(names: Iterable[str]) -> list[Fold]:
    """Return the lines of `fold_names` with their counts."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], None]] = {}
    for words, numbers in _split(names):
        groups.setdefault(words, {})[numbers] = None
    found = []
    for words, tuples in groups.items():
        for axes in _products(list(tuples)):
            count = 1
            text = words[0]
            for axis, word in zip(axes, words[1:], strict=True):
                count *= len(axis)
                text += f".{fold_indices(map(int, axis))}{word}"
            found.append(Fold(count, text))
    return found


def _split(names: Iterable[str]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yield the words and the numbers of each name; most differ from the one before in the last number."""
    words: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    before = after = ""
    for name in names:
        number = name[len(before) : len(name) - len(after)]
        if words and name.startswith(before) and name.endswith(after) and _INDEX.fullmatch(number):
            yield words, (*numbers, number)
            continue
        pieces = NUMBER.split(name)
        if 1 < len(pieces) <= 2 * _MAX_INDICES:
            words, numbers, after = tuple(pieces[::2]), tuple(pieces[1:-2:2]), pieces[-1]
            before = name[: len(name) - len(after) - len(pieces[-2])]
            yield words, (*numbers, pieces[-2])
        else:
            yield (name,), ()


def fold_files(names: Iterable[str]) -> list[str]:
    """Return one line for all files of a set: "2 x model-{00001,00003}-of-00003.safetensors"."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    for name in names:
        match = _OF_A_SET.fullmatch(name)
        before, number, after = match.groups() if match else (name, "", "")
        groups.setdefault((before, len(number), after), []).append(int(number or 0))
    return [
        str(Fold(len(set(numbers)), f"{before}{fold_indices(numbers, digits) if digits else ''}{after}"))
        for (before, digits, after), numbers in groups.items()
    ]


def _products(tuples: list[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Return axes whose products cover exactly the given index tuples, folding the last index first."""
    if not tuples[0]:
        return [()]
    if len(tuples[0]) == 1:
        return [(tuple([number for (number,) in tuples]),)]
    tails: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for head, *rest in tuples:
        tails[head].append(tuple(rest))
    same: dict[tuple[tuple[tuple[str, ...], ...], ...], list[str]] = defaultdict(list)
    for head, rests in tails.items():
        same[tuple(_products(rests))].append(head)
    return [(tuple(heads), *axes) for products, heads in same.items() for axes in products]
