"""The table of a checkpoint: its rules with a look-up, which tells where a tensor's name belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

from mla_tools.names import NUMBER, Domain, template
from mla_tools.ops import Same
from mla_tools.rules import MLX, Drop, Form, Param, Route, Rule, Shape, combinations

__all__ = ["Match", "Table"]


class Match(NamedTuple):
    """Where a name belongs: the route or drop, which of its sources it is, and the index values."""

    claim: int
    position: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class _Slots:
    """Where the sources of one template stand among the inputs of an application of a route.

    `shared` and `gathered` pick these from a match's values; `order` numbers the gathered ones.
    """

    shared: Callable[[tuple[int, ...]], tuple[int, ...]]
    gathered: Callable[[tuple[int, ...]], tuple[int, ...]]
    order: Mapping[tuple[int, ...], int]


class Table:
    """The rules of one checkpoint, with everything that depends on its config worked out.

    `layout` is that of the targets. Each target is also understood where it is there already: under its own
    name, and in its own shape under a name of another layout that only reshapes it.
    """

    def __init__(self, rules: Sequence[Rule], drops: Sequence[Drop] = (), layout: str = MLX) -> None:
        self.layout = layout
        self.rules = tuple(rules)
        self.drops = tuple(drops)
        declared = [route for rule in rules for route in rule.routes() if all(route.where.values())]
        read: dict[str, list[Mapping[str, Domain]]] = {}
        for text, where in (
            *((text, route.where) for route in declared for text in route.source),
            *((drop.source, drop.where) for drop in drops),
        ):
            read.setdefault(text, []).append(where)
        self.routes = (*self._known(declared), *self._there(declared, read))
        self._modules: dict[str, int] = {}
        self._whole: list[tuple[int, Drop]] = []
        self._lookup: dict[tuple[str, ...], list[tuple[int, int, tuple[Domain, ...]]]] = {}
        self._slots = [_slots(route) for route in self.routes]
        for claim, route in enumerate(self.routes):
            for position, text in enumerate(route.source):
                self._add(claim, position, text, route.where)
        for claim, drop in enumerate(self.drops, start=len(self.routes)):
            if drop.inside:
                self._modules[drop.source] = claim
            elif drop.whole:
                self._whole.append((claim, drop))
            else:
                self._add(claim, 0, drop.source, drop.where)
        for text in (text for route in self.routes for text in route.source):
            if self._module(text) is not None:
                raise ValueError(f"{text} is claimed by a rule and lies in a module that is dropped")

    def _known(self, declared: Sequence[Route]) -> list[Route]:
        """Return the routes; those that change no name and no shape are in the targets' layout too."""
        return [
            replace(route, layouts=(*route.layouts, self.layout))
            if route.source == route.target and route.shapes == route.target_shapes()
            else route
            for route in declared
        ]

    def _there(
        self, declared: Sequence[Route], read: Mapping[str, Sequence[Mapping[str, Domain]]]
    ) -> list[Route]:
        """Return the routes of what has a target's form already; `read` are names of others."""
        found = []
        for route in declared:
            shapes = route.per_target()
            if route.first:
                for text, shape in shapes:
                    if not any(_share(text, route.where, where) for where in read.get(text, ())):
                        found.append(self._identity(route, text, text, shape, (self.layout,)))
            alone = len(route.source) == len(route.target) == 1 and not route.gathered
            if alone and not route.scattered and shapes[0][1] != route.shapes[0]:
                source, target = route.source[0], route.target[0]
                layouts = (self.layout,) if source == target else route.layouts
                found.append(self._identity(route, source, target, shapes[0][1], layouts))
        return found

    def _identity(
        self, route: Route, source: str, target: str, shape: Shape, layouts: tuple[str, ...]
    ) -> Route:
        where = {index: route.where[index] for index in template(target).indices}
        return Route((source,), (shape,), (target,), Same(), where, route.param, layouts, first=False)

    def _add(self, claim: int, position: int, text: str, where: Mapping[str, Domain]) -> None:
        parsed = template(text)
        domains = tuple(where[index] for index in parsed.indices)
        entries = self._lookup.setdefault(parsed.words, [])
        for other, _, theirs in entries:
            overlap = all(_overlap(a, b) for a, b in zip(domains, theirs, strict=True))
            if overlap and not self._differ_in_shape(claim, other):
                raise ValueError(f"two rules claim {text}: number {other} and number {claim}")
        entries.append((claim, position, domains))

    def _differ_in_shape(self, claim: int, other: int) -> bool:
        """Whether two routes of one source make the same target, and the source's shape tells which it is."""
        if max(claim, other) >= len(self.routes):
            return False
        one, two = self.routes[claim], self.routes[other]
        alone = len(one.shapes) == len(two.shapes) == 1
        return alone and one.target == two.target and one.shapes != two.shapes

    def _module(self, tensor: str) -> int | None:
        """Return the drop of the module in which a tensor lies."""
        for source, claim in self._modules.items():
            if tensor.startswith(f"{source}."):
                return claim
        return None

    def lookup(self, tensor: str, shape: Shape | None = None) -> Match | None:
        """Return where a tensor's name belongs, or None if no rule knows it.

        Where a name has several shapes, `shape` tells which it is; else it is the first.
        """
        pieces = NUMBER.split(tensor)
        entries = self._lookup.get(tuple(pieces[::2]))
        if entries is None:
            module = self._module(tensor)
            return None if module is None else Match(module, 0, ())
        values = tuple(map(int, pieces[1::2]))
        found = None
        for claim, position, domains in entries:
            for value, domain in zip(values, domains):  # noqa: B905 - equal by construction, and hot
                if value not in domain:
                    break
            else:
                match = Match(claim, position, values)
                if shape is None or self.shape(match) == shape:
                    return match
                found = found or match
        return found

    def layer(self, tensor: str) -> Match | None:
        """Return the drop of the whole layer in which a tensor lies that `lookup` does not know, or None.

        It holds only where the drop's marker is there.
        """
        pieces = NUMBER.split(tensor)
        for claim, drop in self._whole:
            parsed = template(drop.source)
            if len(pieces) < 3 or pieces[0] != parsed.words[0] or not any(pieces[2:]):
                continue
            value = int(pieces[1])
            if value in drop.where[parsed.indices[0]]:
                return Match(claim, 0, (value,))
        return None

    def slot(self, match: Match) -> tuple[tuple[int, ...], int]:
        """Return which application of its route a match belongs to, and as which input."""
        claim, position, values = match
        slots = self._slots[claim][position]
        return slots.shared(values), slots.order[slots.gathered(values)]

    def route(self, match: Match) -> Route | None:
        """Return the matched route, or None for a drop."""
        return self.routes[match.claim] if match.claim < len(self.routes) else None

    def drop(self, match: Match) -> Drop:
        """Return the matched drop."""
        return self.drops[match.claim - len(self.routes)]

    def shape(self, match: Match) -> Shape | None:
        """Return the shape that the matched tensor must have, if the table says."""
        claim, position, _ = match
        if claim < len(self.routes):
            return self.routes[claim].shapes[position]
        return self.drop(match).shape

    def targets(self) -> dict[str, tuple[Shape, Param]]:
        """Return every tensor of the model by name, with its shape and what it is."""
        found: dict[str, tuple[Shape, Param]] = {}
        for route in self.routes:
            if not route.first:
                continue
            shapes = route.target_shapes()
            for values in route.applications():
                for target, shape in zip(route.targets(values), shapes, strict=True):
                    if target in found:
                        raise ValueError(f"two rules make {target}")
                    found[target] = (shape, route.param)
        return found

    def layers(self) -> int:
        """Return the number of layers."""
        return 1 + max((max(route.where["l"]) for route in self.routes if route.where.get("l")), default=-1)

    def aimed(self, layout: str) -> Table:
        """Return the table whose targets are this one's in another layout, and whose sources are its targets.

        What a layout does not name has the hub's form there. Raises ValueError for a layout that no rule has.
        """
        if layout == self.layout:
            return self
        known = dict.fromkeys(form.layout for rule in self.rules for form in rule.forms)
        if layout not in known:
            raise ValueError(f"there is no layout {layout} here, only {', '.join((*known, self.layout))}")
        rules = []
        for rule in self.rules:
            form = next((form for form in rule.forms if form.layout == layout), rule.forms[0])
            for route in (route.inverse() for route in replace(rule, forms=(form,)).routes()):
                back = Form(self.layout, route.source, route.shapes, route.op, route.where)
                rules.append(Rule(route.target, (back,), {}, route.param))
        read = {name for rule in rules for name in rule.forms[0].source}
        return Table(rules, [drop for drop in self.drops if drop.source not in read], layout)


def _slots(route: Route) -> tuple[_Slots, ...]:
    shared, gathered = route.shared, route.gathered
    found = combinations(gathered, route.where)
    slots = []
    for position, text in enumerate(route.source):
        indices = template(text).indices
        slots.append(
            _Slots(
                _picker([indices.index(index) for index in shared]),
                _picker([indices.index(index) for index in gathered]),
                {values: position * len(found) + n for n, values in enumerate(found)},
            )
        )
    return tuple(slots)


def _picker(places: Sequence[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Return what picks the values at these places, in their order; it is called for each tensor."""
    if len(places) > 1:
        return itemgetter(*places)
    first = places[0] if places else 0
    return itemgetter(slice(first, first + len(places)))


def _share(text: str, one: Mapping[str, Domain], other: Mapping[str, Domain]) -> bool:
    """Whether two domains of a template's indices have a name in common."""
    return all(_overlap(one[index], other[index]) for index in template(text).indices)


def _overlap(a: Domain, b: Domain) -> bool:
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    return any(value in large for value in small)
