"""Claim: which stored tensors together are one tensor, and which rule knows its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mla_tools.codecs import Bundle, Codec, Dense, Module, bare, bundle, part_name
from mla_tools.errors import Problem
from mla_tools.spec import Spec
from mla_tools.steps import Drop, Source
from mla_tools.table import Match, Table

__all__ = ["Claimed", "claim"]


@dataclass
class Claimed:
    """The tensors of a checkpoint, each with the place of its name in the table, and what is left out."""

    tensors: list[tuple[Source, Match | None]] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def claim(stored: Mapping[str, Spec], section: Mapping[str, object], table: Table) -> Claimed:
    """Return the tensors that stored tensors are; `section` is what config.json says of them."""
    made = Claimed()
    modules: dict[str, dict[str, Spec]] = defaultdict(dict)
    for name, spec in stored.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = spec
    # Most modules look like thousands of others, so what the codecs say is remembered.
    seen: dict[Any, Bundle | str] = {}
    for module, leaves in modules.items():
        prefix = f"{module}." if module else ""
        weight = table.lookup(prefix + "weight")
        shape = table.shape(weight) if weight else None
        width = int(shape[-1]) if shape else None
        look = (*leaves.items(), width)
        answer = seen.get(look)
        if answer is None:
            answer = seen[look] = _answer(Module(leaves, width, section))
        if isinstance(answer, str):
            made.problems.append(Problem(module, "its stored tensors do not fit together", found=answer))
            continue
        for leaf, reason in answer.unread.items():
            unread = table.lookup(prefix + leaf)
            if unread is not None and table.route(unread) is None:
                # Whatever it is, it is left out.
                made.tensors.append((_plain(prefix + leaf, leaves[leaf]), unread))
                continue
            there = str(leaves[leaf])
            made.problems.append(Problem(prefix + leaf, "cannot be read", found=there, cause=reason))
        for leaf, reason in answer.drops.items():
            made.drops.append(Drop(_plain(prefix + leaf, leaves[leaf]), reason))
        for leaf, spec, codec, leaves_of in answer.claims:
            name = prefix + leaf
            match = weight if leaf == "weight" else table.lookup(name)
            parts = {part: prefix + other for part, other in leaves_of.items()}
            made.tensors.append((Source(name, spec, codec, parts), match))
    made.problems += _without_biases([source for source, _ in made.tensors])
    return made


def _answer(module: Module) -> Bundle | str:
    try:
        return bundle(module)
    except ValueError as error:
        return str(error)


def _without_biases(sources: Sequence[Source]) -> list[Problem]:
    held: dict[Codec, list[Source]] = defaultdict(list)
    for source in sources:
        held[source.codec].append(source)
    missing, others = bare(held)
    count = sum(len(held[codec]) for codec in others)
    found = f"scales without biases, and {count:,} other affine tensors have both"
    return [
        Problem(source.label, "its biases are missing", part_name(source.name, "biases"), found)
        for codec in missing
        for source in held[codec]
    ]


def _plain(name: str, spec: Spec) -> Source:
    """Return a stored tensor that is left out as the tensor that it is by itself."""
    return Source(name, spec, Dense(spec.dtype), {"weight": name})
