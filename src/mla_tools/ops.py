"""The ops: what happens to the values of tensors on their way from one layout to the other.

Each op says the same thing four times: `infer` for specs, `apply` for arrays, `inverse` for the way
back, and `slabs` for how the work can be cut so that no more than a few rows are in memory. `apply`
maps the blocks that one slab reads to the blocks that it writes; whole tensors are the slab of
everything, so there is one implementation for both.

A block's rows are counted with all axes but the last taken as one, because a packed tensor can be
cut between rows but not within them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from mla_tools import mla
from mla_tools.errors import MlaToolsError
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "AddPadding",
    "Block",
    "ConcatRows",
    "Copies",
    "CutRows",
    "DropPadding",
    "Indices",
    "JoinRows",
    "MergeKvB",
    "Op",
    "Same",
    "Slab",
    "SplitKvB",
    "SplitRows",
    "Stack",
    "StackRows",
    "SwapLastAxes",
    "TakeFirst",
    "Unstack",
    "UnstackRows",
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
        # The slabs of the way there, read from right to left.
        for slab in Stack().slabs(self.infer(specs), limit):
            yield Slab(slab.writes, slab.reads)

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
class SplitRows:
    """[…, p*o, i] as p tensors of […, o, i]: fused gate and up projections, [e, 2*o, i] or [2*o, i]."""

    parts: int = 2

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        if len(spec.shape) < 2 or spec.shape[-2] % self.parts:
            raise ValueError(f"{spec} cannot be cut into {self.parts} equal parts along its rows")
        *head, rows, width = spec.shape
        return (Spec((*head, rows // self.parts, width), spec.dtype),) * self.parts

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        # A slab reads the same rows of each part; one after the other they are a small fused tensor.
        fused = arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=-2)
        return tuple(mx.split(fused, self.parts, axis=-2))

    def inverse(self) -> JoinRows:
        return JoinRows(self.parts)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        first = self.infer(specs)[0]
        rows, width = first.shape[-2:]
        for e in range(first.rows // rows):
            for start, stop in _runs(rows, _rows(width, limit) // self.parts, _ROW_ALIGNMENT):
                shape = (1, stop - start, width)
                offsets = [(e * self.parts + part) * rows for part in range(self.parts)]
                yield Slab(
                    tuple(Block(0, offset + start, offset + stop, shape) for offset in offsets),
                    tuple(
                        Block(part, e * rows + start, e * rows + stop, shape) for part in range(self.parts)
                    ),
                )

    def keeps_last_axis(self, output: int) -> bool:
        return True


@dataclass(frozen=True)
class JoinRows:
    """p tensors of […, o, i] as one […, p*o, i], the inverse of `SplitRows`."""

    parts: int = 2

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        first = specs[0]
        if len(specs) != self.parts or any(spec.shape != first.shape for spec in specs):
            raise ValueError(f"{', '.join(map(str, specs))} are not {self.parts} equal parts of one tensor")
        *head, rows, width = first.shape
        return (Spec((*head, rows * self.parts, width), first.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        return (mx.concatenate(list(arrays), axis=-2),)

    def inverse(self) -> SplitRows:
        return SplitRows(self.parts)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        # One part at a time: a run of rows is one block on both sides.
        rows, width = specs[0].shape[-2:]
        for e in range(specs[0].rows // rows):
            for part in range(self.parts):
                for start, stop in _runs(rows, _rows(width, limit), _ROW_ALIGNMENT):
                    shape = (1, stop - start, width)
                    there = (e * self.parts + part) * rows
                    yield Slab(
                        (Block(part, e * rows + start, e * rows + stop, shape),),
                        (Block(0, there + start, there + stop, shape),),
                    )

    def keeps_last_axis(self, output: int) -> bool:
        return True


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
            raise ValueError(f"{spec} has no whole number of heads of {self.nope} + {self.value} rows")
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
        for slab in self.inverse().slabs(self.infer(specs), limit):
            yield Slab(slab.writes, slab.reads)

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
class ConcatRows:
    """Tensors of [o, …, i] one after the other along their first axis, as long as `lengths` say.

    `swap`: with the last two axes swapped, as `SwapLastAxes` does it: convolutions [c, 1, k] of q, k
    and v as one of MLX's [3c, k, 1].
    """

    lengths: tuple[int, ...]
    swap: bool = False

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        inner = specs[0].shape[1:]
        if not inner or [spec.shape for spec in specs] != [(length, *inner) for length in self.lengths]:
            found = ", ".join(map(str, specs))
            raise ValueError(f"{found} are not parts of {list(self.lengths)} rows of one tensor")
        whole = Spec((sum(self.lengths), *inner), specs[0].dtype)
        return SwapLastAxes().infer([whole]) if self.swap else (whole,)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        import mlx.core as mx

        parts = [array.swapaxes(-1, -2) for array in arrays] if self.swap else list(arrays)
        return (mx.concatenate(parts),)

    def inverse(self) -> CutRows:
        return CutRows(self.lengths, self.swap)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        offset = 0
        for index, spec in enumerate(specs):
            (made,) = SwapLastAxes().infer([spec]) if self.swap else (spec,)
            length, size = spec.shape[0], spec.size // spec.shape[0]
            for start, stop in _runs(length, _rows(size, limit), _ROW_ALIGNMENT):
                blocks = []
                for number, first, whole in ((index, 0, spec), (0, offset, made)):
                    rows = whole.rows // length
                    shape = (stop - start, *whole.shape[1:])
                    blocks.append(Block(number, (first + start) * rows, (first + stop) * rows, shape))
                yield Slab((blocks[0],), (blocks[1],))
            offset += length

    def keeps_last_axis(self, output: int) -> bool:
        return not self.swap


@dataclass(frozen=True)
class CutRows:
    """One tensor cut along its first axis into parts of `lengths`, the inverse of `ConcatRows`."""

    lengths: tuple[int, ...]
    swap: bool = False

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = SwapLastAxes().infer(specs) if self.swap else specs
        if spec.shape[0] != sum(self.lengths):
            raise ValueError(f"{spec} has no parts of {list(self.lengths)} rows")
        return tuple(Spec((length, *spec.shape[1:]), spec.dtype) for length in self.lengths)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        whole = array.swapaxes(-1, -2) if self.swap else array
        ends = list(accumulate(self.lengths))
        # A slab holds rows of one part.
        if whole.shape[0] != ends[-1]:
            return (whole,)
        return tuple(whole[end - length : end] for end, length in zip(ends, self.lengths, strict=True))

    def inverse(self) -> ConcatRows:
        return ConcatRows(self.lengths, self.swap)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        for slab in self.inverse().slabs(self.infer(specs), limit):
            yield Slab(slab.writes, slab.reads)

    def keeps_last_axis(self, output: int) -> bool:
        return not self.swap


@dataclass(frozen=True)
class StackRows:
    """[c * rows, i] as [c, rows, i]: a block-diagonal matrix that is stored with its blocks on end."""

    rows: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        count, rest = divmod(spec.shape[0], self.rows)
        if len(spec.shape) != 2 or rest:
            raise ValueError(f"{spec} has no whole number of blocks of {self.rows} rows")
        return (Spec((count, self.rows, spec.shape[1]), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        # A slab is a number of blocks, or a piece of one.
        return (array.reshape(-1, min(self.rows, array.shape[0]), array.shape[-1]),)

    def inverse(self) -> UnstackRows:
        return UnstackRows(self.rows)

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
class UnstackRows:
    """[c, rows, i] as [c * rows, i], the inverse of `StackRows`."""

    rows: int

    def infer(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        (spec,) = specs
        if len(spec.shape) != 3 or spec.shape[1] != self.rows:
            raise ValueError(f"{spec} has no blocks of {self.rows} rows")
        return (Spec((spec.shape[0] * self.rows, spec.shape[2]), spec.dtype),)

    def apply(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        (array,) = arrays
        return (array.reshape(-1, array.shape[-1]),)

    def inverse(self) -> StackRows:
        return StackRows(self.rows)

    def slabs(self, specs: Sequence[Spec], limit: int) -> Iterator[Slab]:
        for slab in self.inverse().slabs(self.infer(specs), limit):
            yield Slab(slab.writes, slab.reads)

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
        for slab in self.inverse().slabs(self.infer(specs), limit):
            yield Slab(slab.writes, slab.reads)

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
