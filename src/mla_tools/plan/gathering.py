"""Gather: whether each application of a route has all its sources, and each target exactly one origin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mla_tools.errors import Problem
from mla_tools.names import NUMBER, short, template
from mla_tools.plan.matching import Matched, shape_text
from mla_tools.rules import Route
from mla_tools.steps import Source
from mla_tools.table import Table

__all__ = ["Gathered", "Group", "gather"]

# At most this many missing numbers are listed.
_MAX_LISTED = 8


@dataclass(frozen=True)
class Group:
    """An application of a route with all its sources, in their order."""

    route: Route
    key: tuple[int, ...]
    sources: tuple[Source, ...]


@dataclass
class Gathered:
    """The applications that are complete."""

    groups: list[Group] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def gather(
    matched: Matched, table: Table, lost: Mapping[str, str], *, blind: bool, partial: bool = False
) -> Gathered:
    """Return the applications of routes with their sources.

    `lost` says why tensors cannot be read. With `blind`, missing tensors are expected; with `partial`,
    missing targets, but not a part of the sources of one.
    """
    made = Gathered()
    makers: dict[str, Route] = {}
    for (claim, key), found in matched.inputs.items():
        route = table.routes[claim]
        for name in route.targets(key):
            if name in makers:
                made.problems.append(_duplicate(name, route, makers[name], key))
            makers[name] = route
        count = route.source_count
        if len(found) < count:
            if not blind:
                made.problems.append(_incomplete(route, key, found, lost))
        elif (claim, key) not in matched.unfit:
            made.groups.append(Group(route, key, tuple([found[slot] for slot in range(count)])))
    if not blind and not partial:
        causes = _causes(table, lost)
        for route in table.routes:
            for key in route.applications() if route.first else ():
                if not all(name in makers for name in route.targets(key)):
                    made.problems.append(_missing(route, key, makers, causes))
    return made


def _duplicate(name: str, route: Route, other: Route, key: tuple[int, ...]) -> Problem:
    known = dict(zip(route.shared, key, strict=True))
    origins = sorted(short(template(r.source[0]).fold(known, r.where)) for r in (other, route))
    return Problem(
        short(name),
        "duplicate",
        needed="one of them",
        found=" and ".join(origins),
        cause="The checkpoint mixes two layouts.",
    )


def _incomplete(
    route: Route, key: tuple[int, ...], found: Mapping[int, Source], lost: Mapping[str, str]
) -> Problem:
    names = route.sources(key)
    missing = [name for slot, name in enumerate(names) if slot not in found]
    known = dict(zip(route.shared, key, strict=True))
    needed = short(template(route.source[0]).fold(known, route.where))
    word = "expert" if route.gathered[-1:] == ("e",) else "part"
    numbers = [pieces[-2] if len(pieces := NUMBER.split(name)) > 1 else short(name) for name in missing]
    few = ", ".join(numbers[:_MAX_LISTED])
    few += f" and {len(numbers) - _MAX_LISTED} more" if len(numbers) > _MAX_LISTED else ""
    what = f"{word} {few} is missing" if len(missing) == 1 else f"{word}s {few} are missing"
    causes = sorted({lost[name] for name in missing if name in lost})
    return Problem(
        short(route.targets(key)[0]),
        what,
        needed + (f"  ({route.because})" if route.because else ""),
        f"{len(found)} of {len(names)}",
        "\n  ".join(causes),
    )


def _causes(table: Table, lost: Mapping[str, str]) -> dict[tuple[str, ...], set[str]]:
    """Return why tensors are lost, by the names of what they would have become."""
    causes: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, reason in lost.items():
        match = table.lookup(name)
        route = table.route(match) if match else None
        if match is not None and route is not None:
            causes[tuple(route.targets(table.slot(match)[0]))].add(reason)
    return causes


def _missing(
    route: Route,
    key: tuple[int, ...],
    makers: Mapping[str, Route],
    causes: Mapping[tuple[str, ...], Collection[str]],
) -> Problem:
    absent = [short(name) for name in route.targets(key) if name not in makers]
    known = dict(zip(route.shared, key, strict=True))
    name = short(template(route.source[0]).fold(known, route.where))
    purpose = "" if absent == [name] else f", for {' and '.join(absent)}"
    return Problem(
        name,
        "missing",
        needed=shape_text(route.shapes[0]) + purpose,
        found="no such tensor",
        cause="\n  ".join(sorted(causes.get(tuple(route.targets(key)), ()))),
    )
