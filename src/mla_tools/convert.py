"""Conversions from Python: what the command `mla-sanitize` calls, and what a program of one's own can call.

    from mla_tools import Options, QuantSpec
    from mla_tools.convert import convert, inspect, plan, verify

    convert("DeepSeek-V3", "DeepSeek-V3-4bit", Options(quantize=QuantSpec()))

`inspect` and `plan` read headers and write nothing, `convert` writes, `verify` looks at what was written. A
source is a checkpoint folder or a repository on the hub, org/name or hf://org/name@revision; a `Path` is
always a folder. Every error that a user can cause is an `MlaToolsError`: a `CheckpointError` has all that is
wrong with a checkpoint in its `problems`, and a `UsageError` is about the arguments, called as the command
calls them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mla_tools import execute as executing
from mla_tools.distributed import Group, launched, shares
from mla_tools.errors import Problem, UsageError
from mla_tools.execute import Device
from mla_tools.files.checkpoint import Checkpoint, open_checkpoint
from mla_tools.files.hub import locate
from mla_tools.options import Options, parse_size
from mla_tools.output import check_output, how_to_resume, is_unfinished, refuse_source
from mla_tools.plan import MAX_MEMORY, Plan, Steps, Workload, make_draft_plan, make_plan, steps_of

if TYPE_CHECKING:
    from mla_tools.verify import ManifestCheck, Verified

__all__ = [
    "MAX_THREADS",
    "Converted",
    "Device",
    "Plans",
    "Progress",
    "Survey",
    "Written",
    "convert",
    "inspect",
    "plan",
    "verify",
]

MAX_THREADS = 1024


@dataclass(frozen=True)
class Survey:
    """What a checkpoint is: what is stored, what each tensor would become, and what is wrong with it."""

    checkpoint: Checkpoint
    made: Steps

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong, of the files first; nothing where it can be converted."""
        return (*self.checkpoint.problems, *self.made.problems)


@dataclass(frozen=True)
class Plans:
    """What a conversion will do: the plan of the model, and that of its MTP layers if they are kept."""

    model: Plan
    mtp: Plan | None = None

    def __iter__(self) -> Iterator[Plan]:
        yield self.model
        if self.mtp is not None:
            yield self.mtp

    def with_workloads(
        self, max_memory: int | str = MAX_MEMORY, threads: int | None = None
    ) -> list[tuple[Plan, Workload]]:
        """Return each plan with how it is carried out in so much memory, with at most so many threads.

        They mean what they mean to `convert`. Raises MlaToolsError that names the smallest budget, if this
        one is too small.
        """
        memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
        return [(each, each.workload(memory, threads)) for each in self]


@dataclass(frozen=True)
class Progress:
    """How far the writing of one folder is: bytes of tensor data, of those that this process writes.

    What an earlier run has done counts from the start, so that at the end `done` is `total`.
    """

    folder: Path
    done: int
    total: int

    @property
    def share(self) -> float:
        """The part that is done, from 0 to 1."""
        return self.done / self.total if self.total else 1.0


@dataclass(frozen=True)
class Written:
    """A complete folder: its plan, how that was carried out, and whether there was anything to do."""

    plan: Plan
    workload: Workload
    folder: Path
    anything: bool


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: the folder of the model, and that of its MTP layers if they were kept.

    `rank` is the number of this process among those that share the work; 0 where there is one.
    """

    model: Written
    mtp: Written | None = None
    rank: int = 0

    def __iter__(self) -> Iterator[Written]:
        yield self.model
        if self.mtp is not None:
            yield self.mtp


def inspect(source: str | os.PathLike[str], *, revision: str | None = None, download: bool = False) -> Survey:
    """Return what a checkpoint is, with everything that is wrong in `problems`; only headers are read.

    `revision` is the branch, tag or commit of a repository; `download` brings it into the hub's cache first.
    Raises MlaToolsError where there is no such source, and CheckpointError where there is nothing to go on.
    """
    checkpoint = _opened(source, revision, download)
    return Survey(checkpoint, steps_of(checkpoint, Options()))


def plan(
    source: str | os.PathLike[str],
    options: Options = Options(),
    *,
    revision: str | None = None,
    download: bool = False,
    keep_mtp: bool = False,
) -> Plans:
    """Return what `convert` with these arguments would do; only headers are read, and nothing is written.

    `keep_mtp`: the MTP layers of DeepSeek V4 become a model of their own, with a plan of its own. Raises
    CheckpointError that lists everything that is wrong with the checkpoint, MlaToolsError where there is no
    such source, and UsageError for options that fit nothing in it.
    """
    checkpoint = _opened(source, revision, download)
    model = make_plan(checkpoint, options)
    return Plans(model, make_draft_plan(checkpoint, options) if keep_mtp else None)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options = Options(),
    *,
    revision: str | None = None,
    download: bool = False,
    max_memory: int | str = MAX_MEMORY,
    threads: int | None = None,
    device: Device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_mtp: bool = False,
    check_source: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Converted:
    """Write a folder that mlx_lm.load opens, and return what was written.

    `output` must not exist, but with `resume`, which finishes an unfinished folder of the same plan, and
    `overwrite`, which replaces one that this tool made. The MTP layers of `keep_mtp` go to a second folder,
    OUTPUT-mtp. `max_memory` is what the process may take, in bytes or as "4GB"; `threads` are 2 if left out,
    or 8 over a network; `device` is MLX's own choice if left out. `check_source` compares the weight files
    with the hashes of the hub first.

    `progress` is called in the thread of the caller: when the writing of a folder begins, and whenever a
    piece is written. What it raises ends the conversion, as any error does. Under `mlx.launch` each process
    calls this with the same arguments and writes its share; only the first one calls `progress`.

    The folder is complete only when the model class of the installed mlx-lm has agreed. Raises what `plan`
    raises before anything is written. Whatever ends the work later, Ctrl-C too, leaves the folder visibly
    unfinished, and the error has a note that says how to resume; from here, that is `resume=True`.
    """
    _check_arguments(output, threads, device, resume, overwrite)
    folder = Path(output)
    if ".." in folder.parts:  # which may lead through a folder that is not there
        folder = folder.resolve()
    refuse_source(folder, [Path(source)])
    group = launched()
    if group.rank == 0:
        check_output(folder, resume=resume, overwrite=overwrite)
    plans = plan(source, options, revision=revision, download=download, keep_mtp=keep_mtp)
    folders = [folder, Path(f"{folder if folder.name else folder.resolve()}-mtp")]
    if plans.mtp is not None and group.rank == 0:
        check_output(folders[1], resume=resume, overwrite=overwrite)
    work = plans.with_workloads(max_memory, threads)
    written = []
    with _class_check(plans.model, group) as check:
        if check_source:
            executing.check_source(plans.model, group)
        with _mlx_as_it_was():
            for (each, workload), path in zip(work, folders, strict=False):
                with _resumable(path, overwrite):
                    anything = executing.execute(
                        each,
                        path,
                        workload=workload,
                        device=device,
                        resume=resume,
                        overwrite=overwrite,
                        source_checked=check_source,
                        group=group,
                        progress=_step(path, _total(each, group), None if group.rank else progress, check),
                        agrees=check.wait if check and each is plans.model else lambda: None,
                    )
                written.append(Written(each, workload, path, anything))
    model, *mtp = written
    return Converted(model, mtp[0] if mtp else None, group.rank)


def verify(folder: str | os.PathLike[str], *, quick: bool = False) -> Verified:
    """Return what an output of `convert` holds, all files of which are as they were written.

    `quick` leaves out the data of the weight files. Raises CheckpointError that lists everything that
    differs, and MlaToolsError for a folder that is no output of this tool, or an unfinished one.
    """
    from mla_tools.verify import verify_output

    return verify_output(Path(folder), quick=quick)


def _opened(source: str | os.PathLike[str], revision: str | None, download: bool) -> Checkpoint:
    name = os.fspath(source)
    if not isinstance(source, str) and not name.startswith(("/", "~")):
        name = f"./{name}"  # a path is no name of a repository
    return open_checkpoint(locate(name, revision, download=download))


def _check_arguments(
    output: str | os.PathLike[str],
    threads: int | None,
    device: Device | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Raise UsageError for arguments that mean nothing, whatever the source is."""
    if not os.fspath(output):
        raise UsageError("--mlx-path: give the folder to write")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads: {threads}: give a number from 1 to {MAX_THREADS}")
    if device is not None and device not in get_args(Device):
        raise UsageError(f"--device: {device!r}: give one of {', '.join(get_args(Device))}")
    if resume and overwrite:
        raise UsageError("--overwrite: not allowed with --resume")


def _total(each: Plan, group: Group) -> int:
    """Return the bytes of tensor data that this process writes."""
    owners = shares([file.layout.size for file in each.files], group.size)
    mine = [file for file, rank in zip(each.files, owners, strict=True) if rank == group.rank]
    return sum(spec.nbytes for file in mine for spec in file.tensors.values())


def _step(
    folder: Path, total: int, progress: Callable[[Progress], None] | None, check: ManifestCheck | None
) -> Callable[[int], None]:
    """Return what is called with the number of bytes just written.

    It ends the work as soon as it is known that mlx-lm does not agree.
    """
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(Progress(folder, done, total))
        if check is not None:
            check.look()

    return step


@contextmanager
def _class_check(model: Plan, group: Group) -> Iterator[ManifestCheck | None]:
    """Ask the installed mlx-lm for its model class, in the first process alone, until the work ends."""
    with ExitStack() as stack:
        check = None
        if group.rank == 0:
            from mla_tools.verify import ManifestCheck

            check = ManifestCheck(model.config, model.shapes)
            stack.callback(check.cancel)
        yield check


@contextmanager
def _mlx_as_it_was() -> Iterator[None]:
    """Leave MLX's default device and its cache in the end as the caller had them."""
    import mlx.core as mx

    device = mx.default_device()
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_default_device(device)
        mx.set_cache_limit(limit)


@contextmanager
def _resumable(folder: Path, overwrite: bool) -> Iterator[None]:
    """Say in a note how to resume after an interruption."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_unfinished(folder):
            error.add_note(how_to_resume(folder, overwrite=overwrite))
        raise
