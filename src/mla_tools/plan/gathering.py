"""Gather: whether each application of a rule has all its sources, and each target exactly one origin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mla_tools.errors import Problem
from mla_tools.names import NUMBER
from mla_tools.plan.matching import Matched, shape_text
from mla_tools.plan.steps import Source
from mla_tools.rules import Rule, Table, short
from mla_tools.rules import name as template

__all__ = ["Gathered", "Group", "gather"]

# As many of the missing numbers are told.
_TOLD = 8


@dataclass(frozen=True)
class Group:
    """An application of a rule with all its sources, in their order."""

    rule: Rule
    key: tuple[int, ...]
    sources: tuple[Source, ...]


@dataclass
class Gathered:
    """The applications that are complete."""

    groups: list[Group] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def gather(matched: Matched, table: Table, lost: Mapping[str, str], *, blind: bool) -> Gathered:
    """Return the applications of rules with their sources.

    `lost` says why tensors cannot be read. With `blind`, missing tensors are no news.
    """
    made = Gathered()
    makers: dict[str, Rule] = {}
    for (claim, key), found in matched.inputs.items():
        rule = table.rules[claim]
        for name in rule.targets(key):
            if name in makers:
                made.problems.append(_duplicate(name, rule, makers[name], key))
            makers[name] = rule
        count = rule.source_count
        if len(found) < count:
            if not blind:
                made.problems.append(_incomplete(rule, key, found, lost))
        elif (claim, key) not in matched.unfit:
            made.groups.append(Group(rule, key, tuple([found[slot] for slot in range(count)])))
    if not blind:
        causes = _causes(table, lost)
        for rule in table.rules:
            for key in () if rule.alternative else rule.applications():
                if not all(name in makers for name in rule.targets(key)):
                    made.problems.append(_missing(rule, key, makers, causes))
    return made


def _duplicate(name: str, rule: Rule, other: Rule, key: tuple[int, ...]) -> Problem:
    known = dict(zip(rule.shared, key, strict=True))
    origins = sorted(short(template(r.source[0]).fold(known, r.where)) for r in (other, rule))
    return Problem(
        short(name),
        "duplicate",
        needed="one of them",
        found=" and ".join(origins),
        cause="The checkpoint mixes two layouts.",
    )


def _incomplete(
    rule: Rule, key: tuple[int, ...], found: Mapping[int, Source], lost: Mapping[str, str]
) -> Problem:
    names = rule.sources(key)
    missing = [name for slot, name in enumerate(names) if slot not in found]
    known = dict(zip(rule.shared, key, strict=True))
    needed = short(template(rule.source[0]).fold(known, rule.where))
    word = "expert" if rule.gathered[-1:] == ("e",) else "part"
    numbers = [NUMBER.split(name)[-2] for name in missing]
    few = ", ".join(numbers[:_TOLD])
    few += f" and {len(numbers) - _TOLD} more" if len(numbers) > _TOLD else ""
    what = f"{word} {few} is missing" if len(missing) == 1 else f"{word}s {few} are missing"
    causes = sorted({lost[name] for name in missing if name in lost})
    return Problem(
        short(rule.targets(key)[0]),
        what,
        needed + (f"  ({rule.because})" if rule.because else ""),
        f"{len(found)} of {len(names)}",
        "\n  ".join(causes),
    )


def _causes(table: Table, lost: Mapping[str, str]) -> dict[tuple[str, ...], set[str]]:
    """Return why tensors are lost, by the names of what they would have become."""
    causes: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, reason in lost.items():
        match = table.lookup(name)
        rule = table.rule(match) if match else None
        if match is not None and rule is not None:
            causes[tuple(rule.targets(table.slot(match)[0]))].add(reason)
    return causes


def _missing(
    rule: Rule,
    key: tuple[int, ...],
    makers: Mapping[str, Rule],
    causes: Mapping[tuple[str, ...], Collection[str]],
) -> Problem:
    absent = [short(name) for name in rule.targets(key) if name not in makers]
    known = dict(zip(rule.shared, key, strict=True))
    name = short(template(rule.source[0]).fold(known, rule.where))
    purpose = "" if absent == [name] else f", for {' and '.join(absent)}"
    return Problem(
        name,
        "missing",
        needed=shape_text(rule.shapes[0]) + purpose,
        found="no such tensor",
        cause="\n  ".join(sorted(causes.get(tuple(rule.targets(key)), ()))),
    )
