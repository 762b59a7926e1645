"""How much memory the work on a plan takes: a matter of slabs and threads, not of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_tools.errors import MlaToolsError
from mla_tools.ops import Same
from mla_tools.steps import Source, Step, Target

__all__ = ["MAX_MEMORY", "NETWORK_THREADS", "SLAB_ELEMENTS", "THREADS", "Workload", "workload"]

# How many elements are worked on at a time: 16 MB of bf16.
SLAB_ELEMENTS = 8 << 20

# Below this, starting the work on a slab costs as much as the work.
_WORTH_A_THREAD = 1 << 20

# Two MLX streams keep two cores busy and overlap reading with computing; a third gains nothing there.
# What comes over a network is mostly waited for, and each thread waits for a request of its own.
THREADS = 2
NETWORK_THREADS = 8

MAX_MEMORY = 2 * 10**9

# What the process takes before the first slab: the interpreter with MLX and numpy, and what a plan
# holds for each stored tensor. Measured, as growth of the resident size.
_BASE_BYTES = 90 * 10**6
_BYTES_PER_TENSOR = 1200

# Bytes of working memory for each element of a slab beyond what is read and what is written, the growth
# of mx.get_peak_memory. Codes that are decoded, at worst; codes that are packed in another way.
_DECODED = 13
_REPACKED = 5

# MLX takes whole pages for its buffers, of which a slab has a few.
_PAGES = 1 << 16

# The share of the slabs' memory that MLX may keep of freed buffers to use them again.
_CACHED = 4


@dataclass(frozen=True)
class Workload:
    """How a plan is carried out: threads, elements of a slab, and the bytes of memory that this takes.

    MLX may keep `cache_bytes` of buffers that were freed, to use them again; they are among `peak_bytes`.
    """

    threads: int
    slab_elements: int
    peak_bytes: int
    cache_bytes: int = 0


def workload(steps: Sequence[Step], stored: int, max_memory: int, threads: int) -> Workload:
    """Return how to work within so many bytes of memory, with at most so many threads.

    `stored` is the number of stored tensors. Slabs become smaller before threads become fewer, as long as
    slabs are worth a thread. Raises MlaToolsError that names the smallest budget, if this one is too small.
    """
    base = _BASE_BYTES + _BYTES_PER_TENSOR * stored
    unlike = _unlike(steps)

    def work(count: int, elements: int) -> Workload:
        slabs = count * max((_slab_bytes(step, elements) for step in unlike), default=0)
        return Workload(count, elements, base + slabs + slabs // _CACHED, slabs // _CACHED)

    sizes = [SLAB_ELEMENTS >> shift for shift in range(SLAB_ELEMENTS.bit_length())]
    worth = [size for size in sizes if size >= _WORTH_A_THREAD]
    choices = [(count, size) for count in range(threads, 0, -1) for size in worth]
    choices += [(1, size) for size in sizes if size < _WORTH_A_THREAD]
    for choice in choices:
        if (found := work(*choice)).peak_bytes <= max_memory:
            return found
    raise MlaToolsError(
        f"This conversion needs more than {max_memory:,} bytes of memory: at least --max-memory"
        f" {-(-work(1, 1).peak_bytes // 10**6)}MB."
    )


def _unlike(steps: Sequence[Step]) -> list[Step]:
    """Return a step of each kind: of those that differ in nothing but names, the first."""
    kinds: dict[tuple[object, ...], Step] = {}
    for step in steps:
        sources = step.sources[:1]
        kind = (step.op, len(step.sources), *((s.spec, s.codec) for s in sources))
        targets = tuple((target.codec, target.spec, target.moved) for target in step.targets)
        kinds.setdefault((*kind, targets), step)
    return list(kinds.values())


def _slab_bytes(step: Step, limit: int) -> int:
    """Return the working set of the first slab of a step, which is the largest."""
    slab = step.first_slab(limit)
    if slab is None:
        return 0
    read = sum(_rows_bytes(step.sources[block.index], block.start, block.stop) for block in slab.reads)
    elements = sum((b.stop - b.start) * step.sources[b.index].spec.width for b in slab.reads)
    written = sum(_rows_bytes(step.targets[b.index], b.start, b.stop) for b in slab.writes) + _PAGES
    made = [target for target in step.targets if not target.moved]
    if not made:
        same = all(target.codec == source.codec for target in step.targets for source in step.sources)
        return read + written + (0 if same else elements * _REPACKED)
    width = max(target.spec.dtype.nbytes for target in made)
    each = 0 if isinstance(step.op, Same) else width
    if any(source.codec.quantized for source in step.sources):
        each += _DECODED
    elif any(source.spec.dtype is not target.spec.dtype for source in step.sources for target in made):
        each += width
    encoding = max(target.codec.working_bytes(elements, width) for target in made)
    return read + written + elements * each + encoding


def _rows_bytes(tensor: Source | Target, start: int, stop: int) -> int:
    encoded = tensor.codec.encoded(tensor.spec)
    return sum(
        (last - first) * encoded[part].row_bytes
        for part, (first, last) in tensor.codec.cut(start, stop).items()
    )
