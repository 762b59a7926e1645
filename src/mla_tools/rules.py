"""Names, rules and tables: which tensor of a checkpoint becomes which tensor of the model.

A template is a name in which whole components are indices: `model.layers.{l}.mlp.experts.{e}.up_proj.weight`.
The values an index may take are part of the rule, so two rules can share a template and divide the
layers among them. An index that stands only on the left is gathered, in order; one that stands only
on the right is scattered.

A rule names tensors as they are called when stored dense; how a tensor is spelled in stored tensors
is the business of the codecs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from typing import NamedTuple

from mla_tools.names import NUMBER, fold_indices
from mla_tools.ops import Op, Same
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

__all__ = ["Domain", "Drop", "Match", "Name", "Param", "Rule", "Table", "name", "short"]

Domain = range | frozenset[int]

_FIELD = re.compile(r"\.\{(\w+)\}(?=\.|\Z)")


def short(tensor: str) -> str:
    """Return a tensor's name as people say it: without the ".weight" that every module has."""
    return tensor.removesuffix(".weight")


class Name:
    """A template taken apart: `words` between the indices, `indices` in order. Made by `name`."""

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
        return f"Name({self.text!r})"

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
def name(text: str) -> Name:
    """Return a template taken apart; ValueError if it is none."""
    return Name(text)


@dataclass(frozen=True)
class Param:
    """What a target tensor is in the model that loads it.

    `quantizable`: it is the weight of a module that MLX can quantize (Linear, Embedding, SwitchLinear,
    MultiLinear). `spec`: the width that the model class itself prescribes when it is quantized.
    `cast`: whether a conversion to another float dtype touches it. `dense`: the model class leaves it
    in floats where the rest is quantized, unless a recipe decides. `raw`: the class reads the weight
    itself and not through its module, so that packed codes are no use to it. `global_scale`: the
    module (SwitchLinear) can hold a float32 scale for each expert beside nvfp4 codes.
    """

    quantizable: bool = False
    spec: QuantSpec | None = None
    cast: bool = True
    dense: bool = False
    raw: bool = False
    global_scale: bool = False


@dataclass(frozen=True)
class Rule:
    """Tensors in, tensors out, and the one op between them.

    `shapes` are those of the source templates, one each. `where` gives the values of every index.
    An `alternative` rule produces a target that another rule produces too, from another spelling; at
    most one of them may find its sources. `because` says where the number of gathered tensors comes from.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    op: Op = field(default_factory=Same)
    where: Mapping[str, Domain] = field(default_factory=dict)
    param: Param = field(default_factory=Param)
    alternative: bool = False
    because: str = ""

    @cached_property
    def gathered(self) -> tuple[str, ...]:
        """The indices that stand only on the left."""
        return _only(self.source, self.target)

    @cached_property
    def scattered(self) -> tuple[str, ...]:
        """The indices that stand only on the right."""
        return _only(self.target, self.source)

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The indices that stand on both sides: each combination of them is an application."""
        free = {*self.gathered, *self.scattered}
        return tuple(index for index in self.where if index not in free)

    def applications(self) -> list[tuple[int, ...]]:
        """Return the values of the shared indices, one tuple for each application of the rule."""
        return _combinations(self.shared, self.where)

    def sources(self, values: tuple[int, ...]) -> list[str]:
        """Return the concrete names of the sources of one application."""
        return self._names(self.source, self.gathered, values)

    def targets(self, values: tuple[int, ...]) -> list[str]:
        """Return the concrete names of the targets of one application."""
        return self._names(self.target, self.scattered, values)

    def _names(self, templates: Sequence[str], free: tuple[str, ...], values: tuple[int, ...]) -> list[str]:
        known = dict(zip(self.shared, values, strict=True))
        combinations = [dict(zip(free, c, strict=True)) for c in _combinations(free, self.where)]
        return [name(text).format({**known, **more}) for text in templates for more in combinations]

    @cached_property
    def source_count(self) -> int:
        """The number of sources of one application."""
        return len(self.source_shapes())

    def source_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of all sources of one application, gathered indices written out."""
        count = len(_combinations(self.gathered, self.where))
        return tuple(shape for shape in self.shapes for _ in range(count))

    def target_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of all targets of one application, scattered indices written out."""
        specs = [Spec(shape, DType.BF16) for shape in self.source_shapes()]
        return tuple(spec.shape for spec in self.op.infer(specs))

    def is_done(self, shape: tuple[int, ...]) -> bool:
        """Return whether a source of this shape is the target already, maybe under another name."""
        alone = len(self.source) == 1 and not self.gathered
        return alone and shape != self.shapes[0] and self.target_shapes() == (tuple(shape),)

    def inverse(self) -> Rule:
        """Return the rule from the targets back to the sources."""
        shapes = self.target_shapes()
        return replace(
            self,
            source=self.target,
            target=self.source,
            shapes=tuple(shapes[:: len(shapes) // len(self.target)]),
            op=self.op.inverse(),
        )


@dataclass(frozen=True)
class Drop:
    """Tensors that the model has no place for, and why.

    `marker`: a template that must be present too, for the same values of its indices, or the tensors
    are not what the reason says (a layer beyond the last is an MTP layer only if it has `eh_proj`).
    `usual`: whether the family's checkpoints on the hub have them, so that samples do too.
    `inside`: the drop is of a whole module, everything whose name begins with `source` and a dot; these
    are the rest of some of the names, for samples. `image`: what is left out serves images, and this is
    what `source` is called in the output where the user wants it kept.
    """

    source: str
    reason: str
    where: Mapping[str, Domain] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    marker: str | None = None
    usual: bool = True
    inside: tuple[str, ...] = ()
    image: str | None = None


class Match(NamedTuple):
    """Where a name belongs: the rule or drop, which of its sources it is, and the index values."""

    claim: int
    position: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class _Slots:
    """Where the sources of one template stand among the inputs of an application of the rule.

    `shared` and `gathered` are positions in a match's values; `order` numbers the gathered ones.
    """

    shared: tuple[int, ...]
    gathered: tuple[int, ...]
    order: Mapping[tuple[int, ...], int]


class Table:
    """The rules of one checkpoint, with everything that depends on its config worked out.

    Rules that only rename nothing are added for each target, so that a checkpoint which is already
    in the model's own layout, wholly or in parts, is understood as well.
    """

    def __init__(self, rules: Sequence[Rule], drops: Sequence[Drop] = (), *, identities: bool = True) -> None:
        primary = [rule for rule in rules if all(rule.where.values())]
        self.rules = (*primary, *_identities(primary, drops)) if identities else tuple(primary)
        self.drops = tuple(drops)
        self._modules: dict[str, int] = {}
        self._lookup: dict[tuple[str, ...], list[tuple[int, int, tuple[Domain, ...]]]] = {}
        self._slots = [_slots(rule) for rule in self.rules]
        for claim, rule in enumerate(self.rules):
            for position, text in enumerate(rule.source):
                self._add(claim, position, text, rule.where)
        for claim, drop in enumerate(self.drops, start=len(self.rules)):
            if drop.inside:
                self._modules[drop.source] = claim
            else:
                self._add(claim, 0, drop.source, drop.where)
        for text in (text for rule in self.rules for text in rule.source):
            if self._module(text) is not None:
                raise ValueError(f"{text} is claimed by a rule and lies in a module that is dropped")

    def _add(self, claim: int, position: int, text: str, where: Mapping[str, Domain]) -> None:
        template = name(text)
        domains = tuple(where[index] for index in template.indices)
        entries = self._lookup.setdefault(template.words, [])
        for other, _, theirs in entries:
            if all(_overlap(a, b) for a, b in zip(domains, theirs, strict=True)):
                raise ValueError(f"two rules claim {text}: number {other} and number {claim}")
        entries.append((claim, position, domains))

    def _module(self, tensor: str) -> int | None:
        """Return the drop of the module in which a tensor lies."""
        for source, claim in self._modules.items():
            if tensor.startswith(f"{source}."):
                return claim
        return None

    def lookup(self, tensor: str) -> Match | None:
        """Return where a tensor's name belongs, or None if no rule knows it."""
        pieces = NUMBER.split(tensor)
        entries = self._lookup.get(tuple(pieces[::2]))
        if entries is None:
            module = self._module(tensor)
            return None if module is None else Match(module, 0, ())
        values = tuple(map(int, pieces[1::2]))
        for claim, position, domains in entries:
            for value, domain in zip(values, domains):  # noqa: B905 - equal by construction, and hot
                if value not in domain:
                    break
            else:
                return Match(claim, position, values)
        return None

    def slot(self, match: Match) -> tuple[tuple[int, ...], int]:
        """Return which application of its rule a match belongs to, and as which input."""
        claim, position, values = match
        slots = self._slots[claim][position]
        return (
            tuple([values[p] for p in slots.shared]),
            slots.order[tuple([values[p] for p in slots.gathered])],
        )

    def rule(self, match: Match) -> Rule | None:
        """Return the matched rule, or None for a drop."""
        return self.rules[match.claim] if match.claim < len(self.rules) else None

    def drop(self, match: Match) -> Drop:
        """Return the matched drop."""
        return self.drops[match.claim - len(self.rules)]

    def shape(self, match: Match) -> tuple[int, ...] | None:
        """Return the shape that the matched tensor must have, if the table says."""
        rule = self.rule(match)
        return rule.shapes[match.position] if rule else self.drop(match).shape

    def targets(self) -> dict[str, tuple[tuple[int, ...], Param]]:
        """Return every tensor of the model by name, with its shape and what it is."""
        found: dict[str, tuple[tuple[int, ...], Param]] = {}
        for rule in self.rules:
            if rule.alternative:
                continue
            shapes = rule.target_shapes()
            for values in rule.applications():
                for target, shape in zip(rule.targets(values), shapes, strict=True):
                    if target in found:
                        raise ValueError(f"two rules make {target}")
                    found[target] = (shape, rule.param)
        return found

    def layers(self) -> int:
        """Return the number of layers."""
        return 1 + max((max(rule.where["l"]) for rule in self.rules if rule.where.get("l")), default=-1)

    def inverse(self) -> Table:
        """Return the table from the model's layout back to the checkpoint's."""
        rules = [rule.inverse() for rule in self.rules if not rule.alternative]
        return Table(rules, identities=False)


def _only(these: Sequence[str], those: Sequence[str]) -> tuple[str, ...]:
    other = {index for text in those for index in name(text).indices}
    return tuple(dict.fromkeys(i for text in these for i in name(text).indices if i not in other))


def _combinations(indices: tuple[str, ...], where: Mapping[str, Domain]) -> list[tuple[int, ...]]:
    return list(product(*(sorted(where[index]) for index in indices)))


def _slots(rule: Rule) -> tuple[_Slots, ...]:
    shared, gathered = rule.shared, rule.gathered
    combinations = _combinations(gathered, rule.where)
    slots = []
    for position, text in enumerate(rule.source):
        indices = name(text).indices
        slots.append(
            _Slots(
                tuple(indices.index(index) for index in shared),
                tuple(indices.index(index) for index in gathered),
                {values: position * len(combinations) + n for n, values in enumerate(combinations)},
            )
        )
    return tuple(slots)


def _identities(rules: Sequence[Rule], drops: Sequence[Drop]) -> list[Rule]:
    """Return a rule from each target to itself, where nothing reads or drops that name already."""
    read = {text for rule in rules for text in rule.source} | {drop.source for drop in drops}
    found = []
    for rule in rules:
        if rule.alternative or (isinstance(rule.op, Same) and rule.source == rule.target):
            continue
        shapes = rule.target_shapes()
        scattered = len(_combinations(rule.scattered, rule.where))
        for position, text in enumerate(rule.target):
            if text in read:
                continue
            where = {index: rule.where[index] for index in name(text).indices}
            found.append(
                Rule(
                    (text,),
                    (text,),
                    (shapes[position * scattered],),
                    where=where,
                    param=rule.param,
                    alternative=True,
                )
            )
    return found


def _overlap(a: Domain, b: Domain) -> bool:
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    return any(value in large for value in small)
