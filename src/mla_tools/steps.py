"""The values that a plan is made of: tensors of the source, of the output, and the steps between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from mla_tools.codecs import Codec, TargetCodec, part_name, repacking
from mla_tools.errors import MlaToolsError
from mla_tools.names import short
from mla_tools.ops import Op, Slab
from mla_tools.spec import DType, Spec

__all__ = ["Drop", "Exactness", "Source", "Step", "Target", "exactness", "made_by"]

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
        most = sum(spec.size for spec in specs)
        while not self._are_aligned(slabs := list(self.op.slabs(specs, limit))):
            if limit > most:
                target = self.targets[0]
                raise MlaToolsError(
                    f"{target.label} cannot be written as {target.codec.name}: what it is made of does not"
                    f" begin at a multiple of {target.codec.rows_together} rows"
                )
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


def made_by(
    op: Op, output: int, sources: Sequence[Source], name: str, spec: Spec, codec: TargetCodec
) -> Target:
    """Return the target that an output of an op becomes, stored by this codec.

    `spec` has the shape that the op infers and the float dtype to compute in. Packed rows are moved where
    the op leaves them rows and the codec takes them as they are.
    """
    codecs = {source.codec for source in sources}
    moved = op.keeps_last_axis(output) and all(
        one.quantized and repacking(one, codec) is not None for one in codecs
    )
    parts = {part: part_name(name, part) for part in codec.encoded(spec)}
    return Target(name, spec, codec, parts, exactness(sources, codec, spec.dtype, moved=moved), moved)


def exactness(sources: Sequence[Source], codec: Codec, dtype: DType, *, moved: bool) -> Exactness:
    """Return how exact a target is that is computed in `dtype`, or moved, and stored by this codec."""
    # There may be hundreds of sources, and few codecs.
    codecs = {source.codec for source in sources}
    quantized = any(one.quantized for one in codecs)
    nominal = {source.spec.dtype for source in sources}
    if dtype.kind == "int":
        # An op has looked whether the numbers fit.
        return "copied" if nominal == {dtype} else "repacked"
    if moved:
        # The form that holds a source's numbers exactly can be wider than the dtype of its scales.
        exact = {native.dtype for one in codecs if (native := one.native) is not None}
        if any(_narrower(dtype, other) for other in exact):
            return "rounded"
        return "copied" if all(one == codec for one in codecs) else "repacked"
    if codec.quantized:
        return "requantized" if quantized else "encoded"
    if quantized:
        return "decoded"
    if nominal == {dtype}:
        return "copied"
    return "rounded" if any(_narrower(dtype, other) for other in nominal) else "repacked"


def _narrower(dtype: DType, other: DType) -> bool:
    """Whether not every number of `other` is one of `dtype`; bf16 and f16 do not hold each other."""
    return dtype is not other and dtype is not DType.F32
