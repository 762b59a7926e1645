"""Names of tensors: the numbers in them, their natural order, and many of them folded into one line."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

__all__ = ["NUMBER", "fold_indices", "fold_names", "natural"]

# Splits a name into its words and its numbers: "a.3.b.17" -> ["a", "3", ".b", "17", ""].
# Only whole dotted components count, so "q_conv1d" stays a word, and only numbers as they are written
# out: "01" is a word, or two names would stand for one place, and so is what no int should be made of.
NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,17})(?=\.|\Z)")

# Names with more indices than this are not folded: no model has them, and each costs a level of recursion.
_MAX_INDICES = 16


def natural(name: str) -> tuple[str | int, ...]:
    """Return a sort key under which layer 10 comes after layer 9."""
    pieces: list[str | int] = list(NUMBER.split(name))
    pieces[1::2] = map(int, pieces[1::2])
    return tuple(pieces)


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
        pieces = NUMBER.split(name)
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
