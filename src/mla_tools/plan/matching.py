"""Match: which application of which rule each tensor belongs to, and what is left out for which reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from mla_tools.architectures import Family
from mla_tools.architectures.geometry import label
from mla_tools.codecs import SCALES
from mla_tools.errors import Problem
from mla_tools.names import short, template
from mla_tools.plan.claiming import Claimed
from mla_tools.rules import Drop as Rejected
from mla_tools.steps import Drop, Source
from mla_tools.table import Match, Table

__all__ = ["Application", "Matched", "VisionTensor", "match", "shape_text"]

# A route by its number, and the values of the indices that its sources and targets share.
Application = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class VisionTensor:
    """A vision tensor that is copied: what it is called in the output."""

    source: Source
    name: str


@dataclass
class Matched:
    """The tensors by application and number of the source; those of another shape than needed are `unfit`.

    `foreign`: the stored tensors that are nothing of this table's, where these are no problem.
    """

    inputs: dict[Application, dict[int, Source]] = field(default_factory=lambda: defaultdict(dict))
    unfit: set[Application] = field(default_factory=set)
    vision: list[VisionTensor] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    # The numbers of the layers that were dropped because a marker shows what they are.
    dropped_layers: set[int] = field(default_factory=set)
    # How many tensors are in which layouts; a tensor that is alike in several counts for them together.
    layouts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)


def match(
    claimed: Claimed,
    table: Table,
    family: Family,
    *,
    keep_vision: bool,
    lost: Collection[str],
    partial: bool = False,
) -> Matched:
    """Return what each tensor is for; `lost` names tensors that are there and cannot be read.

    With `partial`, tensors that the table does not know, and MTP layers that are not proved to be some,
    are no problem.
    """
    made = Matched(drops=list(claimed.drops))
    dropped: list[tuple[Source, Match]] = []
    unknown = list(claimed.unread)
    for source, named in claimed.tensors:
        found, spec = named, source.spec
        route = table.route(found) if found else None
        if found and table.shape(found) not in (None, spec.shape):
            # One name can stand for a tensor in two shapes.
            found = table.lookup(source.name, spec.shape)
            route = table.route(found) if found else None
        if found is None:
            unknown.append((source, _unknown(source, family)))
        elif route is not None:
            key, slot = table.slot(found)
            made.inputs[found.claim, key][slot] = source
            if (spec.dtype.kind == "int") != route.param.integer:
                made.problems.append(_other_dtype(source, integer=route.param.integer))
            if spec.shape != route.shapes[found.position]:
                made.problems.append(_shape_mismatch(source, route.shapes[found.position]))
                made.unfit.add((found.claim, key))
        else:
            drop = table.drop(found)
            if keep_vision and drop.vision is not None:
                made.vision.append(VisionTensor(source, drop.vision + source.name.removeprefix(drop.source)))
            else:
                made.drops.append(Drop(source, drop.reason))
                dropped.append((source, found))
            if drop.shape is not None and source.spec.shape != drop.shape:
                made.problems.append(_shape_mismatch(source, drop.shape))
    for (claim, _), inputs in made.inputs.items():
        made.layouts[table.routes[claim].layouts] += len(inputs)
    _check_markers(dropped, table, made, lost, partial=partial)
    _drop_layers(unknown, table, made, lost, partial=partial)
    return made


def _check_markers(
    dropped: list[tuple[Source, Match]],
    table: Table,
    made: Matched,
    lost: Collection[str],
    *,
    partial: bool,
) -> None:
    """Refuse to drop layers as MTP layers if they are none; with `partial`, do not drop them."""
    unproved: set[str] = set()
    present = {drop.source.name for drop in made.drops}
    for source, found in sorted(dropped, key=lambda one: one[0].name):
        drop = table.drop(found)
        if drop.marker is None:
            continue
        made.dropped_layers.add(found.values[0])
        marker = _marker(drop, found)
        if marker in present or marker in lost:
            continue
        if partial:
            made.foreign += source.parts.values()
            unproved.add(source.name)
        else:
            made.problems.append(
                Problem(
                    source.label,
                    "would be dropped for a wrong reason",
                    needed=f"{short(marker)} beside it, if this is {drop.reason}",
                    found="no such tensor",
                    cause="Does config.json give the right number of layers?",
                )
            )
    if unproved:
        made.drops = [drop for drop in made.drops if drop.source.name not in unproved]


def _drop_layers(
    unknown: list[tuple[Source, Problem]],
    table: Table,
    made: Matched,
    lost: Collection[str],
    *,
    partial: bool,
) -> None:
    """Drop the tensors that no rule knows where they lie in a layer that is dropped; the others are problems.

    Only the marker of that very layer shows what it is, so that no layer of the model gets lost. With
    `partial`, what can be nothing of this table's is no problem.
    """
    present = {drop.source.name for drop in made.drops} if unknown else set()
    for source, problem in unknown:
        found = table.layer(source.name)
        marker = _marker(table.drop(found), found) if found else None
        if found is not None and (marker in present or marker in lost):
            made.drops.append(Drop(source, table.drop(found).reason))
            made.dropped_layers.add(found.values[0])
        elif partial and _is_foreign(source, table):
            made.foreign += source.parts.values()
        elif made.problems[-1:] != [problem]:
            made.problems.append(problem)


def _is_foreign(source: Source, table: Table) -> bool:
    """Whether a tensor that no rule knows can be nothing of this table's.

    Codes and scales of a module whose weight the table knows are part of that weight, in some format.
    """
    dtype = source.spec.dtype
    is_part = dtype.kind != "float" or dtype.bits == 8 or source.name.endswith(SCALES)
    return not is_part or table.lookup(f"{source.name.rpartition('.')[0]}.weight") is None


def _marker(drop: Rejected, found: Match) -> str:
    """Return the name of the tensor that shows what the layer of a dropped one is."""
    assert drop.marker is not None
    values = dict(zip(template(drop.source).indices, found.values, strict=True))
    return template(drop.marker).format(values)


def _unknown(source: Source, family: Family) -> Problem:
    cause = f"No rule of {family.name} names it. Is model_type in config.json right?"
    if source.name.endswith(SCALES):
        cause = "It looks like a scale whose weight is missing or stored in an unknown format."
    found = f"{source.spec} ({source.codec.name})"
    return Problem(source.label, "unknown tensor", found=found, cause=cause)


def _other_dtype(source: Source, *, integer: bool) -> Problem:
    return Problem(source.label, "dtype mismatch", "integers" if integer else "floats", str(source.spec))


def _shape_mismatch(source: Source, shape: tuple[int, ...]) -> Problem:
    return Problem(source.label, "shape mismatch", shape_text(shape), f"{list(source.spec.shape)}")


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape with the config keys that it is made of."""
    labels = ", ".join(label(number) for number in shape)
    return f"[{', '.join(str(int(number)) for number in shape)}]  ({labels} in config.json)"
