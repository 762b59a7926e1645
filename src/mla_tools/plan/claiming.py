"""Claim: which stored tensors together are one tensor, and which rule knows its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mla_tools.codecs import Codec, Dense, Module, bundle, lacking, part_name
from mla_tools.errors import Problem
from mla_tools.spec import Spec
from mla_tools.steps import Drop, Source
from mla_tools.table import Match, Table

__all__ = ["Claimed", "claim"]


@dataclass
class Claimed:
    """The tensors of a checkpoint, each with the place of its name in the table, and what is left out.

    `bare` are the names of affine tensors whose missing biases are taken as zeros. `unread` are stored
    tensors that no rule knows and no format reads, with the problem that each is; those of a module may
    be one problem together.
    """

    tensors: list[tuple[Source, Match | None]] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    bare: set[str] = field(default_factory=set)
    unread: list[tuple[Source, Problem]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def claim(
    stored: Iterable[tuple[str, Spec]], section: Mapping[str, object], table: Table, *, zeros: bool = False
) -> Claimed:
    """Return the tensors that stored tensors are; `section` is what config.json says of them.

    `zeros`: biases that affine tensors lack are zeros, and no problem.
    """
    made = Claimed()
    # For each module its leaves and their specs in turn: lists, because there are hundreds of thousands.
    modules: dict[str, list[Any]] = {}
    for name, spec in stored:
        module, _, leaf = name.rpartition(".")
        held = modules.get(module)
        if held is None:
            held = modules[module] = []
        held += (leaf, spec)
    # Most modules look like thousands of others, so what the codecs say is remembered.
    seen: dict[Any, _Answer] = {}
    new = tuple.__new__  # which is what a NamedTuple calls
    for module in list(modules):
        held = modules.pop(module)  # what was seen need not be kept
        prefix = f"{module}." if module else ""
        weight = table.lookup(prefix + "weight")
        shape = table.shape(weight) if weight else None
        width = int(shape[-1]) if shape else None
        look = (*held, width)
        answer = seen.get(look)
        if answer is None:
            leaves = dict(zip(held[::2], held[1::2], strict=True))
            answer = seen[look] = _answer(Module(leaves, width, section))
        if answer.fault:
            problem = Problem(module, "its stored tensors do not fit together", found=answer.fault)
            if weight is None:
                leaves = dict(zip(held[::2], held[1::2], strict=True))
                made.unread += [(_plain(prefix + leaf, spec), problem) for leaf, spec in leaves.items()]
            else:
                made.problems.append(problem)
            continue
        for leaf, spec, reason in answer.unread:
            unread = table.lookup(prefix + leaf)
            if unread is not None and table.route(unread) is None:
                # Whatever it is, it is left out.
                made.tensors.append((_plain(prefix + leaf, spec), unread))
                continue
            problem = Problem(prefix + leaf, "cannot be read", found=f"{spec}", cause=reason)
            if unread is None:
                made.unread.append((_plain(prefix + leaf, spec), problem))
            else:
                made.problems.append(problem)
        for leaf, spec, reason in answer.drops:
            made.drops.append(Drop(_plain(prefix + leaf, spec), reason))
        for leaf, spec, codec, parts in answer.claims:
            name = prefix + leaf
            match = weight if leaf == "weight" else table.lookup(name)
            made.tensors.append((new(Source, (name, spec, codec, parts)), match))
    codecs = {codec for answer in seen.values() for _, _, codec, _ in answer.claims}
    _add_lacking(codecs, made, zeros=zeros)
    return made


class _Answer(NamedTuple):
    """What the codecs say of modules that look alike, or why their stored tensors do not fit together."""

    claims: list[tuple[str, Spec, Codec, tuple[str, ...]]]
    drops: list[tuple[str, Spec, str]]
    unread: list[tuple[str, Spec, str]]
    fault: str = ""


def _answer(module: Module) -> _Answer:
    try:
        claims, drops, unread = bundle(module)
    except ValueError as error:
        return _Answer([], [], [], str(error))
    for leaf, _, _, parts in claims:
        # So that a tensor has no names of its own to keep.
        assert parts == {part: part_name(leaf, part) for part in parts}, parts
    specs = module.leaves
    return _Answer(
        [(leaf, spec, codec, tuple(parts)) for leaf, spec, codec, parts in claims],
        [(leaf, specs[leaf], reason) for leaf, reason in drops.items()],
        [(leaf, specs[leaf], reason) for leaf, reason in unread.items()],
    )


def _add_lacking(codecs: Collection[Codec], made: Claimed, *, zeros: bool) -> None:
    """Add the problems of tensors that lack a part of their format."""
    for what, part, missing, others in lacking(codecs):
        held: dict[Codec, list[Source]] = defaultdict(list)
        for source, _ in made.tensors:
            held[source.codec].append(source)
        if part == "biases" and zeros:
            made.bare |= {source.name for codec in missing for source in held[codec]}
            continue
        count = sum(len(held[codec]) for codec in others)
        cause = "If zeros are meant: --missing-biases zero." if part == "biases" else ""
        for codec in missing:
            others_have = f", and {count:,} other tensors have both" if count else ""
            found = f"scales without it{others_have} ({codec.name})"
            made.problems += [
                Problem(source.label, f"its {what} missing", part_name(source.name, part), found, cause)
                for source in held[codec]
            ]


def _plain(name: str, spec: Spec) -> Source:
    """Return a dropped stored tensor as a tensor of its own."""
    return Source(name, spec, Dense(spec.dtype), ("weight",))
