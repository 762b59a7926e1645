"""One slab of a step, arrays to arrays: the one place where numbers are decoded, changed and encoded.

`whole` is the slab of everything, for arrays that are all there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mla_tools.codecs import part_name, repacking
from mla_tools.errors import DataError, MlaToolsError
from mla_tools.ops import Block, Concat, Slab, Stack
from mla_tools.overflow import floats_of, holds_infinity, is_narrower, refuse_far_apart, refuse_infinite
from mla_tools.spec import DType, Spec
from mla_tools.steps import Source, Step, Target

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["named", "transform", "whole"]

Parts = Mapping[str, "mx.array"]

# Sources that are stacked are decoded together, up to so many elements: operations of their own for each of
# tens of thousands of experts take seconds and a gigabyte. More would take too much memory when evaluated.
_TOGETHER = 1 << 27


def whole(step: Step, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the stored tensors that a step makes of those among `weights`, by name and unevaluated."""
    if joined := _joined(step, weights):
        # Where it fails, the sources are gone through one by one, to name the one that is at fault.
        with suppress(MlaToolsError):
            return _whole(*joined)
    return _whole(
        step,
        [{part: _rows(weights[name]) for part, name in source.parts.items()} for source in step.sources],
    )


def _joined(step: Step, weights: Mapping[str, mx.array]) -> tuple[Step, list[Parts]] | None:
    """Return a step that does the same with stacks of the sources, and the parts of these; None if none."""
    (_, spec, codec, held), *others = step.sources
    if not others or step.op != Stack():
        return None
    stacked = codec.stacked(spec)
    alike = all(other[2] is codec and other[3] == held and other[1] == spec for other in others)
    if stacked is None or not alike:
        return None
    sources: list[Source] = []
    parts: list[Parts] = []
    count = max(1, _TOGETHER // spec.size)
    for start in range(0, len(step.sources), count):
        names = [source[0] for source in step.sources[start : start + count]]
        sources.append(Source(names[0], Spec((len(names), *spec.shape), spec.dtype), stacked, held))
        parts.append({part: _stacked([weights[part_name(name, part)] for name in names]) for part in held})
    op = Concat(tuple(source.spec.shape[0] for source in sources))
    return Step(op, tuple(sources), step.targets), parts


def _stacked(arrays: list[mx.array]) -> mx.array:
    """Return the rows of a stack of arrays, as two axes."""
    import mlx.core as mx

    # An axis of its own would be one operation more for each.
    return mx.concatenate(arrays, axis=0) if arrays[0].ndim == 2 else _rows(mx.stack(arrays))


def _rows(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1] if array.ndim else 1)


def _whole(step: Step, parts: Sequence[Parts]) -> dict[str, mx.array]:
    """Return the stored tensors that a step makes of all rows of its sources."""
    slab = Slab(_blocks([source.spec for source in step.sources]), _blocks([t.spec for t in step.targets]))
    result: dict[str, mx.array] = {}
    for target, made in zip(step.targets, transform(step, slab, parts), strict=True):
        stored = target.stored()
        for part, array in made.items():
            name = target.parts[part]
            result[name] = array.reshape(stored[name].shape)
    return result


def _blocks(specs: Sequence[Spec]) -> tuple[Block, ...]:
    return tuple(Block(index, 0, spec.rows, spec.shape) for index, spec in enumerate(specs))


def transform(
    step: Step, slab: Slab, parts: Sequence[Parts], *, now: bool = False
) -> list[dict[str, mx.array]]:
    """Return the stored parts of each written block of a slab, unevaluated; `now`: perhaps evaluated.

    `parts` holds for each read block the rows of its source's parts that the codec's `cut` names, as
    two-axis arrays. The results have the shape of the written block, but for the last axis. With `now`,
    MlaToolsError is raised for a finite number that becomes infinite.
    """
    decoded: dict[str, tuple[mx.array, ...]] = {}
    results = []
    for output, block in enumerate(slab.writes):
        target = step.targets[block.index]
        if target.moved:
            made = _move(step, slab, parts, output, now=now)
            results.append(target.codec.finish(made, block.start, target.spec))
            continue
        dtype = target.spec.dtype
        if dtype.name not in decoded:
            arrays = []
            for read, held in zip(slab.reads, parts, strict=True):
                source = step.sources[read.index]
                with named(source):
                    array = source.codec.decode(held, read.start, read.stop, dtype)
                arrays.append(array.reshape(read.shape))
            with named(step.sources[0]):
                decoded[dtype.name] = step.op.apply(arrays)
            if now:
                _refuse_infinite(step, slab, parts, dtype, decoded[dtype.name])
        encode = target.codec.encode_now if now else target.codec.encode
        array = decoded[dtype.name][output]
        results.append(target.codec.finish(encode(array), block.start, target.spec))
        if now and target.codec.quantized:
            with named(step.sources[0]):
                refuse_far_apart(array, results[-1])
    return results


def _refuse_infinite(
    step: Step, slab: Slab, parts: Sequence[Parts], dtype: DType, outputs: Sequence[mx.array]
) -> None:
    """Raise MlaToolsError if a finite number of a source became infinite when it was decoded.

    `outputs` are what the op made of the decoded sources; those whose target is moved are not looked at.
    """
    if not any(s.codec.quantized or is_narrower(dtype, s.spec.dtype) for s in step.sources):
        return
    targets = [step.targets[block.index] for block in slab.writes]
    looked_at = [n for n, target in enumerate(targets) if not target.moved and target.spec.dtype is dtype]
    if not any(holds_infinity(outputs[n]) for n in looked_at):
        return
    for number, (read, held) in enumerate(zip(slab.reads, parts, strict=True)):
        source = step.sources[read.index]

        def make(
            held: Parts, dtype: DType, number: int = number, source: Source = source, read: Block = read
        ) -> dict[str, mx.array]:
            import mlx.core as mx

            array = source.codec.decode(held, read.start, read.stop, dtype).reshape(read.shape)
            if len(looked_at) == len(targets):
                return {"weight": array}
            # Of this source alone, what becomes of it in the outputs in question.
            arrays = [mx.zeros(other.shape, array.dtype) for other in slab.reads]
            arrays[number] = array
            made = step.op.apply(arrays)
            return {str(n): made[n] for n in looked_at}

        with named(source):
            refuse_infinite(held, dtype, make, "numbers")


def _move(step: Step, slab: Slab, parts: Sequence[Parts], output: int, *, now: bool) -> dict[str, mx.array]:
    """Return the parts of a written block whose rows are rows of the source, without decoding them.

    With `now`, MlaToolsError is raised for a finite scale that becomes infinite.
    """
    target = step.targets[slab.writes[output].index]
    packed: list[Parts] = []
    for read, held in zip(slab.reads, parts, strict=True):
        source = step.sources[read.index]
        repack = repacking(source.codec, target.codec)
        assert repack is not None
        with named(source):
            packed.append(repack(held, read.start, read.stop))
    made = {
        part: step.op.apply(
            [
                held[part].reshape(*read.shape[:-1], held[part].shape[-1])
                for read, held in zip(slab.reads, packed, strict=True)
            ]
        )[output]
        for part in target.parts
    }
    kept = all(source.codec == target.codec for source in step.sources)
    if now and not kept and any(map(holds_infinity, floats_of(made).values())):
        _refuse_infinite_scales(step, slab, parts, target)
    return made


def _refuse_infinite_scales(step: Step, slab: Slab, parts: Sequence[Parts], target: Target) -> None:
    """Raise MlaToolsError if a finite scale of a source, or what is made of it, became infinite."""
    for read, held in zip(slab.reads, parts, strict=True):
        source = step.sources[read.index]

        def floats(
            held: Parts, dtype: DType, source: Source = source, read: Block = read
        ) -> dict[str, mx.array]:
            repack = repacking(source.codec, target.codec.in_dtype(dtype))
            assert repack is not None
            return floats_of(repack(held, read.start, read.stop))

        with named(source):
            refuse_infinite(held, target.spec.dtype, floats, "scales")


@contextmanager
def named(source: Source) -> Iterator[None]:
    """Name the tensor in whose data a codec finds something wrong."""
    try:
        yield
    except MlaToolsError as error:
        raise DataError(f"{source.label}: {error}") from error
