"""From a plan to files: slab by slab, so that memory is a matter of slabs and threads, not of the model."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tools.codecs import MlxQuantized, repacking
from mla_tools.errors import MlaToolsError
from mla_tools.files.place import copy
from mla_tools.files.safetensors import Reader, Writer
from mla_tools.ops import Slab
from mla_tools.plan import SLAB_ELEMENTS, Plan, Source, Step
from mla_tools.spec import Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["THREADS", "check_output", "execute", "transform", "write_index"]

# Two MLX streams keep two cores busy and overlap reading with computing; a third gains nothing.
THREADS = 2

# Slabs handed to the threads beyond those in work, so that none waits for the next.
_AHEAD = 2

Parts = Mapping[str, "mx.array"]
Progress = Callable[[int], None]


def transform(step: Step, slab: Slab, parts: Sequence[Parts]) -> list[dict[str, mx.array]]:
    """Return the stored parts of each written block of a slab, unevaluated.

    `parts` holds for each read block the rows of its source's parts that the codec's `cut` names, as
    two-axis arrays. The results have the shape of the written block, but for the last axis.
    """
    decoded: dict[str, tuple[mx.array, ...]] = {}
    results = []
    for output, block in enumerate(slab.writes):
        target = step.targets[block.index]
        if target.moved:
            results.append(_move(step, slab, parts, output))
            continue
        dtype = target.spec.dtype
        if dtype.name not in decoded:
            arrays = []
            for read, held in zip(slab.reads, parts, strict=True):
                source = step.sources[read.index]
                with _named(source):
                    array = source.codec.decode(held, read.start, read.stop, dtype)
                arrays.append(array.reshape(read.shape))
            with _named(step.sources[0]):
                decoded[dtype.name] = step.op.apply(arrays)
        results.append(target.codec.encode(decoded[dtype.name][output]))
    return results


def _move(step: Step, slab: Slab, parts: Sequence[Parts], output: int) -> dict[str, mx.array]:
    """Return the parts of a written block whose rows are rows of the source, without decoding them."""
    target = step.targets[slab.writes[output].index]
    packed: list[Parts] = []
    for read, held in zip(slab.reads, parts, strict=True):
        source = step.sources[read.index]
        repack = repacking(source.codec, target.codec)
        assert repack is not None
        with _named(source):
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
    assert isinstance(target.codec, MlxQuantized)
    return target.codec.joined(made, slab.writes[output].start)


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Name the tensor in whose data a codec finds something wrong."""
    try:
        yield
    except MlaToolsError as error:
        raise MlaToolsError(f"{source.label}: {error}") from error


def check_output(folder: Path) -> None:
    """Raise MlaToolsError if an output folder cannot be made there."""
    if folder.exists() or folder.is_symlink():
        raise MlaToolsError(
            f"Cannot save to the path {folder} as it already exists."
            " Please delete the file/directory or specify a new path to save to."
        )


def execute(
    plan: Plan,
    folder: Path,
    *,
    progress: Progress = lambda nbytes: None,
    agrees: Callable[[], None] = lambda: None,
) -> None:
    """Write the output folder of a plan.

    `progress` is called with the number of bytes just written. `agrees` is called when all tensors are
    written and raises if the output must not be finished. Whatever goes wrong, nothing is left behind
    that looks like a model: the folder, which this call made, is removed.
    """
    check_output(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise MlaToolsError(f"The output folder {folder} cannot be made: {error.strerror}") from error
    try:
        with ExitStack() as stack:
            writers = {file.name: Writer(folder / file.name, file.layout) for file in plan.files}
            for writer in writers.values():
                stack.callback(writer.abort)
            _run(plan, writers, progress)
            agrees()
            for writer in writers.values():
                writer.finish()
            stack.pop_all()
        for companion in plan.checkpoint.companions:
            copy(companion, folder / companion.name)
        for name, text in plan.added.items():
            (folder / name).write_text(text)
        _write_json(folder / "config.json", plan.config)
        write_index(folder, plan)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for path in made[1:]:
                path.rmdir()
        if isinstance(error, OSError):
            raise MlaToolsError(f"Writing to {folder} failed: {error}") from error
        raise


def write_index(folder: Path, plan: Plan) -> None:
    """Write model.safetensors.index.json, the file that completes an output."""
    weight_map = {name: file.name for file in plan.files for name in file.tensors}
    metadata = {"total_size": plan.nbytes, "total_parameters": plan.parameters}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=4) + "\n")
    partial.rename(path)


def _run(plan: Plan, writers: Mapping[str, Writer], progress: Progress) -> None:
    homes = {name: writers[file.name] for file in plan.files for name in file.tensors}
    specs = {name: spec for file in plan.files for name, spec in file.tensors.items()}
    local = threading.local()

    def work(step: Step, slab: Slab) -> int:
        import mlx.core as mx

        if not hasattr(local, "stream"):
            local.stream = mx.new_stream(mx.default_device())
        with mx.stream(local.stream):
            return _slab(step, slab, plan, reader, homes, specs)

    with Reader() as reader, ThreadPoolExecutor(THREADS) as pool:
        pending: set[Future[int]] = set()
        try:
            for step, slab in _work(plan):
                pending.add(pool.submit(work, step, slab))
                if len(pending) >= THREADS + _AHEAD:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        progress(future.result())
            for future in pending:
                progress(future.result())
        except BaseException:
            plan.checkpoint.place.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _work(plan: Plan) -> Iterator[tuple[Step, Slab]]:
    for step in plan.steps:
        for slab in step.op.slabs([source.spec for source in step.sources], SLAB_ELEMENTS):
            yield step, slab


def _slab(
    step: Step,
    slab: Slab,
    plan: Plan,
    reader: Reader,
    homes: Mapping[str, Writer],
    specs: Mapping[str, Spec],
) -> int:
    """Read, transform and write one slab; return the number of bytes written."""
    import mlx.core as mx
    import numpy as np

    parts = []
    for block in slab.reads:
        source = step.sources[block.index]
        cut = source.codec.cut(block.start, block.stop)
        held = {part: _read(plan, reader, source.parts[part], *rows) for part, rows in cut.items()}
        with _named(source):
            source.codec.check(held)
        parts.append(held)
    results = transform(step, slab, parts)
    mx.eval(results)
    written = 0
    for block, result in zip(slab.writes, results, strict=True):
        target = step.targets[block.index]
        for part, array in result.items():
            name = target.parts[part]
            data = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8), copy=False)
            homes[name].write(name, target.offset(part, block.start, specs[name]), data)
            written += data.nbytes
    return written


def _read(plan: Plan, reader: Reader, name: str, first: int, last: int) -> mx.array:
    """Return rows first..last of a stored tensor as a two-axis array."""
    import mlx.core as mx

    stored = plan.checkpoint.tensors[name]
    spec = stored.spec
    raw = reader.read(stored.file, stored.offset + first * spec.row_bytes, (last - first) * spec.row_bytes)
    array = mx.array(raw.view(spec.dtype.numpy)).reshape(last - first, spec.width)
    return array.view(mx.bfloat16) if spec.dtype.mlx == "bfloat16" else array
