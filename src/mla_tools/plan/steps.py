"""The values that a plan is made of: tensors of the checkpoint, of the output, and the steps between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from mla_tools.codecs import Codec, TargetCodec, part_name
from mla_tools.names import short
from mla_tools.ops import Op, Slab
from mla_tools.spec import Spec

__all__ = ["Drop", "Exactness", "Source", "Step", "Target"]

Exactness = Literal["copied", "repacked", "rounded", "decoded", "encoded", "requantized"]


class Source(NamedTuple):
    """A tensor of the checkpoint: its nominal spec, its codec and its parts."""

    name: str
    spec: Spec
    codec: Codec
    held: tuple[str, ...]

    @property
    def parts(self) -> dict[str, str]:
        """The parts with the names of their stored tensors."""
        return {part: part_name(self.name, part) for part in self.held}

    @property
    def label(self) -> str:
        """The name as people say it."""
        return short(self.name)


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output.

    `spec` is the nominal one (shape and the float dtype computed in); `parts` are stored names.
    `moved`: the source's packed rows are taken over without decoding.
    """

    name: str
    spec: Spec
    codec: TargetCodec
    parts: Mapping[str, str]
    exactness: Exactness
    moved: bool

    @property
    def label(self) -> str:
        """The name as people say it, which is the path of its module."""
        return short(self.name)

    def stored(self) -> dict[str, Spec]:
        """Return the stored tensors that it is written as, by name."""
        return {self.parts[part]: spec for part, spec in self.codec.encoded(self.spec).items()}


@dataclass(frozen=True)
class Step:
    """One application of a rule."""

    op: Op
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]

    @cached_property
    def codecs(self) -> tuple[Codec, ...]:
        """The codecs of the sources, each once."""
        return tuple(dict.fromkeys(source.codec for source in self.sources))

    def slabs(self, limit: int) -> list[Slab]:
        """Return the slabs of the step, of about `limit` elements each.

        A format whose rows share scales is written in slabs that begin and end where these do, so that a
        slab may be larger.
        """
        specs = [source.spec for source in self.sources]
        while not self._are_aligned(slabs := list(self.op.slabs(specs, limit))):
            limit *= 2
        return slabs

    def first_slab(self, limit: int) -> Slab | None:
        """Return the first of `slabs`, which is the largest, if possible without making the others."""
        if all(target.codec.rows_together == 1 for target in self.targets):
            return next(iter(self.op.slabs([source.spec for source in self.sources], limit)), None)
        return next(iter(self.slabs(limit)), None)

    def _are_aligned(self, slabs: list[Slab]) -> bool:
        together = [target.codec.rows_together for target in self.targets]
        if max(together) == 1 or len(slabs) < 2:
            return True
        return all(
            block.start % together[block.index] == 0
            and (block.stop % together[block.index] == 0 or block.stop == self.targets[block.index].spec.rows)
            for slab in slabs
            for block in slab.writes
        )


@dataclass(frozen=True, slots=True)
class Drop:
    """A tensor that is left out, and why."""

    source: Source
    reason: str
