"""From a plan to files: slab by slab, so that memory is a matter of slabs and threads, not of the model."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mla_tools.distributed import Alone, Group, together
from mla_tools.errors import DataError, MlaToolsError, UsageError
from mla_tools.files.checkpoint import check_content, check_unchanged
from mla_tools.files.place import Bytes
from mla_tools.files.reader import Reader
from mla_tools.ops import Slab
from mla_tools.output import Journal, Output, begin, begun, how_to_resume, how_to_start_again, publish
from mla_tools.plan import Plan, Step, Workload
from mla_tools.transform import named, transform

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["Device", "check_source", "execute"]

Device = Literal["cpu", "gpu"]

# Slabs handed to the threads beyond those in work, so that none waits for the next.
_AHEAD = 2

# Streams of MLX that nobody computes on now. Each is a thread that lives as long as the process, so they are
# used again, by any thread and any run: there are never more than were used at once.
_idle_streams: dict[Device, list[mx.Stream]] = {"cpu": [], "gpu": []}

Progress = Callable[[int], None]


def execute(
    plan: Plan,
    folder: Path,
    *,
    workload: Workload | None = None,
    device: Device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    source_checked: bool = False,
    group: Group | None = None,
    progress: Progress = lambda nbytes: None,
    agrees: Callable[[], None] = lambda: None,
) -> bool:
    """Write the output folder of a plan; return whether there was anything to do.

    `workload` says with how many threads and how much memory, `device` where to compute (None: MLX's
    default); `group` are the processes that share the work. `resume` finishes an unfinished folder of the
    same plan, `overwrite` replaces a folder that this tool made. `source_checked` is what the record says:
    whether `check_source` was called before. `progress` is called with the number of bytes just written.
    `agrees` is called when all tensors are written and raises if the output must not be completed.
    Whatever goes wrong after the first byte, the folder is left visibly unfinished, and the error has a note
    that says how to resume.
    """
    group = group or Alone()
    workload = workload or plan.workload()
    device = _use(device)
    first = begun(plan, device)
    opened = begin(plan, folder, first, group, resume=resume, overwrite=overwrite)
    if opened is None:
        return False
    with opened, ExitStack() as stack:

        def work() -> None:
            journal = stack.enter_context(closing(Journal(opened, group.rank, first)))
            output = stack.enter_context(closing(Output(plan, opened, group, journal)))
            progress(output.done_bytes)
            _run(plan, output, workload, device, progress)
            output.complete()
            check_unchanged(plan.checkpoint)
            if group.rank == 0:
                agrees()

        try:
            together(group, work)
            if group.rank == 0:
                publish(plan, opened, first["provenance"], checked=source_checked)
        except OSError as error:
            fault = MlaToolsError(f"{folder} cannot be written: {error.strerror}")
            fault.add_note(how_to_resume(folder, overwrite=overwrite))
            raise fault from error
        except MlaToolsError as error:
            if error.resumable:
                error.add_note(how_to_resume(folder, overwrite=overwrite))
            elif isinstance(error, DataError):
                error.add_note(how_to_start_again(folder))
            raise
        except Exception as error:  # unexpected, but what is done is kept
            error.add_note(how_to_resume(folder, overwrite=overwrite))
            raise
    return True


def check_source(plan: Plan, group: Group | None = None) -> None:
    """Raise MlaToolsError unless all weight files of the source have the hashes that the hub gives.

    They are read whole, each by one of the processes of a group.
    """
    group = group or Alone()
    together(group, lambda: check_content(plan.checkpoint, (group.rank, group.size)))


def _use(device: Device | None) -> Device:
    """Compute on this device from now on, and return which it is."""
    import mlx.core as mx

    if device == "gpu" and not mx.is_available(mx.gpu):
        raise UsageError("--device gpu: MLX finds no GPU on this machine")
    if device is not None:
        mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def _run(plan: Plan, output: Output, workload: Workload, device: Device, progress: Progress) -> None:
    import mlx.core as mx

    mx.set_cache_limit(workload.cache_bytes)
    local = threading.local()
    first_targets, count = [], 0
    for step in plan.steps:
        first_targets.append(count)
        count += len(step.targets)
    todo = {
        number: [first + i for i in range(len(step.targets)) if first + i in output.todo]
        for number, (step, first) in enumerate(zip(plan.steps, first_targets, strict=True))
    }
    left: dict[int, int] = {}

    def work(number: int, slab: Slab) -> tuple[int, int]:
        if not hasattr(local, "arena"):
            local.arena = _Arena()
        wanted = {target - first_targets[number] for target in todo[number]}
        return number, _slab(plan.steps[number], slab, wanted, plan, reader, local.arena, output)

    def note(done: set[Future[tuple[int, int]]]) -> None:
        for future in done:
            number, nbytes = future.result()
            progress(nbytes)
            left[number] -= 1
            if not left[number]:
                for target in todo[number]:
                    output.finished(target)

    with (
        Reader() as reader,
        _streams(device) as use_one,
        ThreadPoolExecutor(workload.threads, initializer=use_one) as pool,
    ):
        pending: set[Future[tuple[int, int]]] = set()
        try:
            for number, slabs in _ordered(plan, todo, workload.slab_elements, left):
                pending.add(pool.submit(work, number, slabs))
                if len(pending) >= workload.threads + _AHEAD:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    note(done)
            note(pending)
            for number, targets in todo.items():
                if number not in left:  # tensors without elements have no slabs
                    for target in targets:
                        output.finished(target)
        except BaseException:
            plan.checkpoint.place.stop()
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _streams(device: Device) -> Iterator[Callable[[], None]]:
    """Yield what gives the thread that calls it a stream that nobody else computes on.

    The streams are given back at the end, but for those of threads that are still there.
    """
    import mlx.core as mx

    where = mx.cpu if device == "cpu" else mx.gpu
    idle = _idle_streams[device]
    given: list[tuple[threading.Thread, mx.Stream]] = []

    def use_one() -> None:
        try:
            stream = idle.pop()
        except IndexError:
            # One of `mx.new_stream` could be used by the thread that made it alone.
            stream = mx.new_thread_unsafe_stream(where)
        given.append((threading.current_thread(), stream))
        # In a `with mx.stream(...)`, the thread would get a default stream of its own besides.
        mx.set_default_device(where)
        mx.set_default_stream(stream)

    try:
        yield use_one
    finally:
        for thread, stream in given:
            if not thread.is_alive():
                # What fails here belongs to work whose error is known, and the stream is not used again.
                with suppress(RuntimeError):
                    mx.synchronize(stream)
                    idle.append(stream)


def _ordered(
    plan: Plan, todo: Mapping[int, Sequence[int]], elements: int, left: dict[int, int]
) -> Iterator[tuple[int, Slab]]:
    """Yield the slabs of the steps in which something is to do, in the order in which their data lies.

    `left` gets the number of slabs of a step when its first one is yielded.
    """
    shards = {shard.name: number for number, shard in enumerate(plan.checkpoint.shards)}

    def place(step: Step, slab: Slab) -> tuple[int, int]:
        block = slab.reads[0]
        source = step.sources[block.index]
        part, rows = next(iter(source.codec.cut(block.start, block.stop).items()))
        stored = plan.checkpoint.tensors[source.parts[part]]
        return shards[stored.file.name], stored.offset + rows[0] * stored.spec.row_bytes

    def start(number: int) -> tuple[int, int]:
        places = (
            plan.checkpoint.tensors[name] for s in plan.steps[number].sources for name in s.parts.values()
        )
        return min((shards[stored.file.name], stored.offset) for stored in places)

    waiting = sorted((start(number), number) for number, targets in todo.items() if targets)
    waiting.reverse()
    ready: list[tuple[tuple[int, int], int, int, Slab]] = []
    while waiting or ready:
        # A step's slabs come into play when the reading arrives at its first tensor.
        while waiting and (not ready or waiting[-1][0] <= ready[0][0]):
            _, number = waiting.pop()
            step = plan.steps[number]
            slabs = step.slabs(elements)
            if slabs:
                left[number] = len(slabs)
            for count, slab in enumerate(slabs):
                heapq.heappush(ready, (place(step, slab), number, count, slab))
        if ready:
            _, number, _, slab = heapq.heappop(ready)
            yield number, slab


class _Arena:
    """Memory of one thread into which stored bytes are read, and which MLX computes on where they lie."""

    # What every dtype and every kernel is content with.
    _ALIGNMENT = 64

    def __init__(self) -> None:
        self._size = 0

    def reserve(self, nbytes: Sequence[int]) -> Iterator[tuple[Bytes, mx.array]]:
        """Yield a buffer for each of these sizes, and the same memory as an array.

        What was reserved before must not be in use any more.
        """
        import mlx.core as mx
        import numpy as np

        starts = list(accumulate((-(-n // self._ALIGNMENT) * self._ALIGNMENT for n in nbytes), initial=0))
        if starts[-1] > self._size:
            self._array = mx.zeros((starts[-1],), dtype=mx.uint8)
            mx.eval(self._array)
            self._bytes = np.array(self._array, copy=False).data
            self._size = starts[-1]
        for start, n in zip(starts, nbytes, strict=False):
            yield self._bytes[start : start + n], self._array[start : start + n]


def _slab(
    step: Step, slab: Slab, wanted: set[int], plan: Plan, reader: Reader, arena: _Arena, output: Output
) -> int:
    """Read, transform and write the wanted targets of one slab; return the number of bytes written."""
    import mlx.core as mx
    import numpy as np

    results = transform(step, slab, _read(step, slab, plan, reader, arena), now=True)
    written = []
    for block, result in zip(slab.writes, results, strict=True):
        if block.index in wanted:
            target = step.targets[block.index]
            stored = target.codec.encoded(target.spec)
            for part, array in result.items():
                start = target.codec.offset(part, block.start, stored[part])
                written.append((target.parts[part], start, array.reshape(-1).view(mx.uint8)))
    mx.eval([array for _, _, array in written])
    for name, start, array in written:
        output.write(name, start, np.ascontiguousarray(np.array(array, copy=False)))
    return sum(array.nbytes for _, _, array in written)


def _read(step: Step, slab: Slab, plan: Plan, reader: Reader, arena: _Arena) -> list[dict[str, mx.array]]:
    """Return the stored rows of each read block, as two-axis arrays that are good until the next call."""
    import mlx.core as mx

    cuts = [step.sources[block.index].codec.cut(block.start, block.stop) for block in slab.reads]
    wanted = []
    for number, (block, cut) in enumerate(zip(slab.reads, cuts, strict=True)):
        for part, (first, last) in cut.items():
            stored = plan.checkpoint.tensors[step.sources[block.index].parts[part]]
            wanted.append((number, part, stored, first, last))
    parts: list[dict[str, mx.array]] = [{} for _ in slab.reads]
    places = arena.reserve([(last - first) * stored.spec.row_bytes for *_, stored, first, last in wanted])
    for (number, part, stored, first, last), (buffer, array) in zip(wanted, places, strict=True):
        spec = stored.spec
        reader.read(stored.file, stored.offset + first * spec.row_bytes, len(buffer), buffer)
        parts[number][part] = array.view(getattr(mx, spec.dtype.mlx)).reshape(last - first, spec.width)
    for block, held in zip(slab.reads, parts, strict=True):
        source = step.sources[block.index]
        with named(source):
            source.codec.check(held)
    return parts
