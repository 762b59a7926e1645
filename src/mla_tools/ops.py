"""The ops: what happens to the values of tensors on their way from one layout to the other.

Each op says the same thing four times: `infer` for specs, `apply` for arrays, `inverse` for the way
back, and `slabs` for how the work can be cut so that no more than a few rows are in memory. `apply`
maps the blocks that one slab reads to the blocks that it writes; whole tensors are the slab of
everything, so there is one implementation for both.

A block's rows are counted with all axes but the last taken as one, because a packed tensor can be
cut between rows but not within them.

The file is longer than others because it is one list: every op stands beside its inverse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from math import prod
from typing import TYPE_CHECKING, Protocol

from mla_tools import mla
from mla_tools.errors import MlaToolsError
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "AddPadding",
    "Block",
    "Concat",
    "Copies",
    "DropPadding",
    "Flatten",
    "Indices",
    "MergeKvB",
    "Op",
    "Same",
    "Slab",
    "Split",
    "SplitKvB",
    "Stack",
    "SwapLastAxes",
    "TakeFirst",
    "Then",
    "Unflatten",
    "Unstack",
]

# Rows are cut at multiples of this where a slab is long enough, so that formats with blocks of
# 128 rows do not read and decode a scale twice.
_ROW_ALIGNMENT = 128

# Tensors to be stacked that are smaller share a slab of so many elements: no more of them, because what
# lies between them in the file is passed over.
_TOGETHER = 1 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start..stop` of tensor number `index` of a step, seen as an array of `shape`."""

    index: int
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slab:
    """A piece of work that stands on its own: the blocks it reads and the blocks it writes."""

    reads: tuple[Block, ...]
    writes: tuple[Block, ...]


class Op(Protocol):
    """What every op provides."""

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        """Return the specs of the outputs; ValueError when the inputs do not fit."""
        ...

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Return the written blocks of one slab from its read blocks."""
        ...

    def inverse(self) -> Op:
        """Return the op that undoes this one."""
        ...

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        """Yield slabs that together cover every output row once, of about `limit` elements each."""
        ...

    def keeps_last_axis(self, output: int) -> bool:
        """Return whether rows of this output are rows of an input, so that packed rows can be moved."""
        ...


def _runs(count: int, step: int, alignment: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges that cover 0..count, `step` long and aligned where `step` allows it."""
    step = max(1, step)
    if step >= alignment:
        step -= step % alignment
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _rows(width: int, limit: int) -> int:
    return limit // max(1, width)


def _backwards(op: Op, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
    """Yield the slabs of the inverse with what they read and what they write exchanged."""
    for slab in op.inverse().slabs(op.infer(specs), limit):
        yield Slab(slab.writes, slab.reads)


@dataclass(frozen=True)
class Same:
    """One tensor as it is."""

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        return (spec,)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return (array,)

    def inverse(self) -> Same:
        return self

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        (spec,) = specs
        # A tensor can have any number of rows that hold nothing.
        rows = spec.rows if spec.width else 0
        for start, stop in _runs(rows, _rows(spec.width, limit), _ROW_ALIGNMENT):
            block = Block(0, start, stop, (stop - start, spec.width))
            yield Slab((block,), (block,))

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Stack:
    """e tensors of [o, i] as one [e, o, i]: the experts of a layer."""

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        first = specs[0]
        if any(spec.shape != first.shape for spec in specs):
            raise ValueError("tensors of different shapes cannot be stacked")
        return (Spec((len(specs), *first.shape), first.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        # A slab of one large expert is there already, and mx.stack would copy it.
        return (mx.stack(list(arrays)) if len(arrays) > 1 else arrays[0][None],)

    def inverse(self) -> Unstack:
        return Unstack()

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        rows = specs[0].rows
        width = specs[0].width
        together = min(limit, _TOGETHER) // max(1, specs[0].size)
        if together > 1:
            for first, last in _runs(len(specs), together):
                reads = (Block(e, 0, rows, (rows, width)) for e in range(first, last))
                write = Block(0, first * rows, last * rows, (last - first, rows, width))
                yield Slab(tuple(reads), (write,))
            return
        for e in range(len(specs)):
            for start, stop in _runs(rows, _rows(width, limit), _ROW_ALIGNMENT):
                yield Slab(
                    (Block(e, start, stop, (stop - start, width)),),
                    (Block(0, e * rows + start, e * rows + stop, (1, stop - start, width)),),
                )

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Unstack:
    """One [e, o, i] as e tensors of [o, i], the inverse of `Stack`."""

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        return (Spec(spec.shape[1:], spec.dtype),) * spec.shape[0]

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return tuple(array[e] for e in range(array.shape[0]))

    def inverse(self) -> Stack:
        return Stack()

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        return _backwards(self, specs, limit)

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Copies:
    """One tensor as `count` equal ones: a tied embedding written out as embedding and output head."""

    count: int = 2

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        return (spec,) * self.count

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return (array,) * self.count

    def inverse(self) -> TakeFirst:
        return TakeFirst(self.count)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        for slab in Same().slabs(specs, limit // self.count):
            (block,) = slab.reads
            yield Slab(slab.reads, tuple(replace(block, index=copy) for copy in range(self.count)))

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class TakeFirst:
    """`count` tensors that are meant to be equal as one, the inverse of `Copies`; only the first is read."""

    count: int = 2

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        if len(specs) != self.count or any(spec.shape != specs[0].shape for spec in specs):
            raise ValueError(f"{', '.join(map(str, specs))} are not {self.count} copies of one tensor")
        return (specs[0],)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        return (arrays[0],)

    def inverse(self) -> Copies:
        return Copies(self.count)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        yield from Same().slabs(specs[:1], limit)

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Split:
    """One tensor as parts of `lengths` along `axis`, which is not the last: gate and up of [e, 2*o, i]."""

    lengths: tuple[int, ...]
    axis: int = 0

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        at = _place(self.axis, spec)
        if at is None or spec.shape[at] != sum(self.lengths):
            raise ValueError(f"{spec} has no parts of {list(self.lengths)} along axis {self.axis}")
        head, inner = spec.shape[:at], spec.shape[at + 1 :]
        return tuple(Spec((*head, length, *inner), spec.dtype) for length in self.lengths)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        (array,) = arrays
        *ends, total = accumulate(self.lengths)
        # A slab is of one part.
        if array.shape[self.axis] != total:
            return (array,)
        return tuple(mx.split(array, ends, axis=self.axis))

    def inverse(self) -> Concat:
        return Concat(self.lengths, self.axis)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        return _backwards(self, specs, limit)

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Concat:
    """Tensors of `lengths` along `axis` one after the other, the inverse of `Split`."""

    lengths: tuple[int, ...]
    axis: int = 0

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        first = specs[0]
        at = _place(self.axis, first)
        if at is not None:
            head, inner = first.shape[:at], first.shape[at + 1 :]
            if [spec.shape for spec in specs] == [(*head, length, *inner) for length in self.lengths]:
                return (Spec((*head, sum(self.lengths), *inner), first.dtype),)
        found = ", ".join(map(str, specs))
        raise ValueError(f"{found} are not parts of {list(self.lengths)} along axis {self.axis}")

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        return (mx.concatenate(list(arrays), axis=self.axis),)

    def inverse(self) -> Split:
        return Split(self.lengths, self.axis)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        # One part at a time: a run of it is one block on both sides.
        (whole,) = self.infer(specs)
        at = self.axis % len(whole.shape)
        inner = whole.shape[at + 1 :]
        rows, size = prod(inner[:-1]), prod(inner)
        starts = list(accumulate(self.lengths, initial=0))
        # The longest is first, so that no slab is larger than the first.
        parts = sorted(range(len(specs)), key=lambda index: -self.lengths[index])
        for e in range(prod(whole.shape[:at])):
            for index in parts:
                length = self.lengths[index]
                here, there = e * length, e * starts[-1] + starts[index]
                for start, stop in _runs(length, _rows(size, limit), _ROW_ALIGNMENT):
                    shape = (*(1,) * at, stop - start, *inner)
                    yield Slab(
                        (Block(index, (here + start) * rows, (here + stop) * rows, shape),),
                        (Block(0, (there + start) * rows, (there + stop) * rows, shape),),
                    )

    def keeps_last_axis(self, output: int) -> bool:
        return True


def _place(axis: int, spec: Spec) -> int | None:
    """Return where this axis is, counted from the first; None if the tensor has none, or it is the last."""
    count = len(spec.shape)
    return axis % count if -count <= axis < count and (axis + 1) % count else None


@dataclass(frozen=True)
class SplitKvB:
    """kv_b_proj [h*(n+v), r] as embed_q [h, r, n] and unembed_out [h, v, r].

    Rows are head-major, per head n rows of K and then v rows of V. The rows of V stay rows; those of
    K become columns, so a packed K has to be decoded.
    """

    nope: int
    value: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        heads, rest = divmod(spec.shape[0], self.nope + self.value)
        if len(spec.shape) != 2 or rest:
            raise ValueError(f"{spec} does not divide into heads of {self.nope} + {self.value} rows")
        rank = spec.shape[1]
        return (
            Spec((heads, rank, self.nope), spec.dtype),
            Spec((heads, self.value, rank), spec.dtype),
        )

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return mla.split_kv_b(
            array,
            num_heads=array.shape[0] // (self.nope + self.value),
            qk_nope_head_dim=self.nope,
            v_head_dim=self.value,
        )

    def inverse(self) -> MergeKvB:
        return MergeKvB(self.nope, self.value)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        (spec,) = specs
        n, v, r = self.nope, self.value, spec.shape[1]
        for a, b in _runs(spec.shape[0] // (n + v), limit // ((n + v) * r)):
            yield Slab(
                (Block(0, a * (n + v), b * (n + v), ((b - a) * (n + v), r)),),
                (Block(0, a * r, b * r, (b - a, r, n)), Block(1, a * v, b * v, (b - a, v, r))),
            )

    def keeps_last_axis(self, output: int) -> bool:
        return output == 1


@dataclass(frozen=True)
class MergeKvB:
    """embed_q [h, r, n] and unembed_out [h, v, r] as kv_b_proj [h*(n+v), r], the inverse of `SplitKvB`."""

    nope: int
    value: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        embed_q, unembed_out = specs
        heads, rank, nope = embed_q.shape
        if nope != self.nope or unembed_out.shape != (heads, self.value, rank):
            raise ValueError(f"{embed_q} and {unembed_out} are not the halves of one kv_b_proj")
        return (Spec((heads * (self.nope + self.value), rank), embed_q.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        embed_q, unembed_out = arrays
        return (mla.merge_kv_b(embed_q, unembed_out),)

    def inverse(self) -> SplitKvB:
        return SplitKvB(self.nope, self.value)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        return _backwards(self, specs, limit)

    def keeps_last_axis(self, output: int) -> bool:
        return False


@dataclass(frozen=True)
class SwapLastAxes:
    """[…, a, b] as […, b, a]: a depthwise convolution [c, 1, k] as MLX's [c, k, 1]."""

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        *head, a, b = spec.shape
        return (Spec((*head, b, a), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return (array.swapaxes(-1, -2),)

    def inverse(self) -> SwapLastAxes:
        return self

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        (spec,) = specs
        *_, a, b = spec.shape
        for start, stop in _runs(spec.rows // a, limit // (a * b)):
            count = stop - start
            yield Slab(
                (Block(0, start * a, stop * a, (count, a, b)),),
                (Block(0, start * b, stop * b, (count, b, a)),),
            )

    def keeps_last_axis(self, output: int) -> bool:
        return False


@dataclass(frozen=True)
class Unflatten:
    """[c * rows, i] as [c, rows, i]: a block-diagonal matrix that is stored with its blocks on end."""

    rows: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        count, rest = divmod(spec.shape[0], self.rows)
        if len(spec.shape) != 2 or rest:
            raise ValueError(f"{spec} does not divide into blocks of {self.rows} rows")
        return (Spec((count, self.rows, spec.shape[1]), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        # A slab is a number of blocks, or a piece of one.
        return (array.reshape(-1, min(self.rows, array.shape[0]), array.shape[-1]),)

    def inverse(self) -> Flatten:
        return Flatten(self.rows)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        (spec,) = specs
        width, step = spec.width, _rows(spec.width, limit)
        for first, last in _runs(spec.rows, max(step, self.rows), self.rows):
            pieces = [(0, last - first)] if step >= self.rows else _runs(self.rows, step, _ROW_ALIGNMENT)
            for start, stop in pieces:
                count = stop - start
                shape = (count // self.rows, self.rows, width) if count >= self.rows else (1, count, width)
                rows = first + start, first + stop
                yield Slab((Block(0, *rows, (count, width)),), (Block(0, *rows, shape),))

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Flatten:
    """[c, rows, i] as [c * rows, i], the inverse of `Unflatten`."""

    rows: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        if len(spec.shape) != 3 or spec.shape[1] != self.rows:
            raise ValueError(f"{spec} has no blocks of {self.rows} rows")
        return (Spec((spec.shape[0] * self.rows, spec.shape[2]), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return (array.reshape(-1, array.shape[-1]),)

    def inverse(self) -> Unflatten:
        return Unflatten(self.rows)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        return _backwards(self, specs, limit)

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class DropPadding:
    """[…, padded] as […, length]: the last axis without the zeros that fill it up."""

    length: int
    padded: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        if spec.width != self.padded:
            raise ValueError(f"{spec} is not padded from {self.length} to {self.padded}")
        return (Spec((*spec.shape[:-1], self.length), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return (array[..., : self.length],)

    def inverse(self) -> AddPadding:
        return AddPadding(self.length, self.padded)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        (spec,) = specs
        for start, stop in _runs(spec.rows, _rows(self.padded, limit)):
            count = stop - start
            yield Slab(
                (Block(0, start, stop, (count, self.padded)),), (Block(0, start, stop, (count, self.length)),)
            )

    def keeps_last_axis(self, output: int) -> bool:
        return False


@dataclass(frozen=True)
class AddPadding:
    """[…, length] as […, padded], filled up with zeros: the inverse of `DropPadding`."""

    length: int
    padded: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        if spec.width != self.length:
            raise ValueError(f"{spec} cannot be padded from {self.length} to {self.padded}")
        return (Spec((*spec.shape[:-1], self.padded), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        (array,) = arrays
        zeros = mx.zeros((*array.shape[:-1], self.padded - self.length), array.dtype)
        return (mx.concatenate([array, zeros], axis=-1),)

    def inverse(self) -> DropPadding:
        return DropPadding(self.length, self.padded)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        return _backwards(self, specs, limit)

    def keeps_last_axis(self, output: int) -> bool:
        return False


@dataclass(frozen=True)
class Indices:
    """Whole numbers from 0 to `below` - 1, held in another integer dtype: the experts of a token.

    `before` is the dtype on the way back.
    """

    below: int
    dtype: DType = DType.I32
    before: DType = DType.I64

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        return (Spec(spec.shape, self.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Return the numbers; MlaToolsError for one that is out of range. Evaluates them."""
        import mlx.core as mx

        (array,) = arrays
        made = array.astype(getattr(mx, self.dtype.mlx))
        good = ((array >= 0) & (array < self.below) & (made == array)).reshape(-1)
        if not mx.all(good).item():
            found = array.reshape(-1)[mx.argmin(good)].item()
            raise MlaToolsError(
                f"holds {found}, and its numbers must be whole and from 0 to {self.below - 1}"
            )
        return (made,)

    def inverse(self) -> Indices:
        return Indices(self.below, self.before, self.dtype)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        yield from Same().slabs(specs, limit)

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class Then:
    """Two ops one after the other, with one tensor between them: three convolutions [c, 1, k] as [3*c, k, 1].

    The slabs are those of `first`, if `second` can work on each block that they write by itself; otherwise
    the inverse's, read backwards. `infer` refuses two ops that have neither.
    """

    first: Op
    second: Op

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        made = self.second.infer([self._between(specs)])
        if not self._carries(specs) and not self.inverse()._carries(made):
            first, second = (type(op).__name__ for op in (self.first, self.second))
            raise ValueError(f"{first} and then {second} cannot be done block by block")
        return made

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        return self.second.apply(self.first.apply(arrays))

    def inverse(self) -> Then:
        return Then(self.second.inverse(), self.first.inverse())

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        if not self._carries(specs):
            yield from _backwards(self, specs, limit)
            return
        between = self._between(specs)
        # What `second` makes may be larger than what it is made of.
        size = max(1, between.size, sum(spec.size for spec in self.second.infer([between])))
        for slab in self.first.slabs(specs, limit * between.size // size):
            yield Slab(slab.reads, _carried(self.second, between, slab.writes[0]))

    def keeps_last_axis(self, output: int) -> bool:
        return self.first.keeps_last_axis(0) and self.second.keeps_last_axis(output)

    def _between(self, specs: Sequence[Spec]) -> Spec:
        between = self.first.infer(specs)
        if len(between) != 1:
            raise ValueError(f"{type(self.first).__name__} makes {len(between)} tensors, not one")
        return between[0]

    def _carries(self, specs: Sequence[Spec]) -> bool:
        """Return whether `second` can work on each block that `first` writes by itself.

        The smallest and the largest block are asked about: those between are of the same kind.
        """
        between = self._between(specs)
        try:
            for limit in (1, sys.maxsize):
                for slab in islice(self.first.slabs(specs, limit), 1):
                    _carried(self.second, between, slab.writes[0])
        except ValueError:
            return False
        return True


def _carried(op: Op, spec: Spec, block: Block) -> tuple[Block, ...]:
    """Return the blocks that an op makes of a block of its one input; ValueError if it cannot work on that.

    It can if the block has whole all axes but the first ones, those that the op leaves where they are.
    """
    outputs = op.infer([spec])
    axis = _first_axes(op, spec, outputs)
    rest = spec.shape[axis:]
    lead = block.shape[: len(block.shape) - len(rest)]
    made = op.infer([Spec(block.shape, spec.dtype)])
    shapes = [(*lead, *output.shape[axis:]) for output in outputs]
    if block.shape != (*lead, *rest) or [each.shape for each in made] != shapes:
        raise ValueError(f"{type(op).__name__} cannot work on a block {list(block.shape)} of {spec}")
    first, last = (row // prod(rest[:-1]) for row in (block.start, block.stop))
    rows = [prod(output.shape[axis:-1]) for output in outputs]
    return tuple(
        Block(index, first * count, last * count, shape)
        for index, (count, shape) in enumerate(zip(rows, shapes, strict=True))
    )


def _first_axes(op: Op, spec: Spec, outputs: Sequence[Spec]) -> int:
    """Return how many of the first axes of its one input an op leaves where they are, of any length."""
    # Found by lengths that no other axis has.
    longest = max(max(each.shape, default=0) for each in (spec, *outputs))
    for count in range(len(spec.shape) - 1, 0, -1):
        lead = tuple(range(longest + 1, longest + 1 + count))
        with suppress(ValueError):
            made = op.infer([Spec((*lead, *spec.shape[count:]), spec.dtype)])
            if [each.shape for each in made] == [(*lead, *output.shape[count:]) for output in outputs]:
                return count
    return 0
