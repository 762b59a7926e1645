"""Conversions from Python: the calls that `mla-sanitize` makes, for use in other programs.

    from mla_tools import Options, QuantSpec
    from mla_tools.convert import convert, inspect, plan, verify

    convert("DeepSeek-V3", "DeepSeek-V3-4bit", Options(quantize=QuantSpec()))

`inspect` and `plan` only read headers; `convert` writes; `verify` checks an output. A source is a checkpoint
folder or a repository on the hub, org/name or hf://org/name@revision; a `Path` is always a folder. Every
error that a user can cause is an `MlaToolsError`: a `CheckpointError` lists everything that is wrong with a
checkpoint in `problems`, and a `UsageError` is about the arguments, under the names of the command's options.
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
from mla_tools.plan import MAX_MEMORY, Plan, Steps, Workload, make_mtp_plan, make_plan, steps_of

if TYPE_CHECKING:
    from mla_tools.verify import ManifestCheck, TokenizerCheck, Verified

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
    """A survey of a checkpoint: what it stores, what each tensor would become, and all problems."""

    checkpoint: Checkpoint
    made: Steps

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems, those of the files first; empty if the checkpoint can be converted."""
        return (*self.checkpoint.problems, *self.made.problems)


@dataclass(frozen=True)
class Plans:
    """What a conversion will do: the plan of the model and, with `keep_mtp`, that of its MTP layers."""

    model: Plan
    mtp: Plan | None = None

    def __iter__(self) -> Iterator[Plan]:
        yield self.model
        if self.mtp is not None:
            yield self.mtp

    def with_workloads(
        self, max_memory: int | str = MAX_MEMORY, threads: int | None = None
    ) -> list[tuple[Plan, Workload]]:
        """Return each plan with its workload for this much memory and at most this many threads.

        The arguments are those of `convert`. Raises MlaToolsError that names the smallest possible budget
        if this one is too small.
        """
        memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
        return [(each, each.workload(memory, threads)) for each in self]


@dataclass(frozen=True)
class Progress:
    """The progress of one folder: bytes of the tensor data that this process writes.

    Data from an earlier run counts as done, so `done` is `total` at the end.
    """

    folder: Path
    done: int
    total: int

    @property
    def share(self) -> float:
        """The fraction that is done, from 0 to 1."""
        return self.done / self.total if self.total else 1.0


@dataclass(frozen=True)
class Written:
    """A complete folder: its plan, its workload, and whether there was anything to do."""

    plan: Plan
    workload: Workload
    folder: Path
    anything: bool


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: the folder of the model and, with `keep_mtp`, that of its MTP layers.

    `rank` is the number of this process among those that share the work; 0 where there is one. `tokenizer`
    is what the user must know of the tokenizer: that mlx-lm cannot open it, or that it was not tried; empty
    if it opens it.
    """

    model: Written
    mtp: Written | None = None
    rank: int = 0
    tokenizer: str = ""

    def __iter__(self) -> Iterator[Written]:
        yield self.model
        if self.mtp is not None:
            yield self.mtp


def inspect(source: str | os.PathLike[str], *, revision: str | None = None, download: bool = False) -> Survey:
    """Return a survey of a checkpoint, with everything that is wrong in `problems`; only headers are read.

    `revision` is the branch, tag or commit of a repository; `download` brings it into the hub's cache first.
    Raises MlaToolsError if there is no such source, and CheckpointError if it has no config or no weights.
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

    `keep_mtp`: the MTP layers of DeepSeek V4 become a second model, with a second plan. Raises
    CheckpointError that lists everything that is wrong with the checkpoint, MlaToolsError if there is no
    such source, and UsageError for options that match nothing in it.
    """
    checkpoint = _opened(source, revision, download)
    model = make_plan(checkpoint, options)
    return Plans(model, make_mtp_plan(checkpoint, options) if keep_mtp else None)


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
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Converted:
    """Write a folder that mlx_lm.load opens, and return what was written.

    `output` must not exist, except with `resume`, which finishes an unfinished folder of the same plan, or
    `overwrite`, which replaces one that this tool made. With `keep_mtp` the MTP layers go to a second folder,
    OUTPUT-mtp. `max_memory` is the most memory that the process may take, in bytes or as "4GB"; the default
    of `threads` is 2, or 8 over a network; the default of `device` is MLX's. `check_source` first compares
    the weight files with the hub's hashes. With `trust_remote_code`, the code of the checkpoint's tokenizer
    runs in a child process, to see whether it opens; no other code of it ever runs.

    `progress` is called in the caller's thread, when the writing of a folder begins and after each piece. An
    exception in it ends the conversion, as any error does. Under `mlx.launch` each process calls this with
    the same arguments and writes its share; only the first one calls `progress`.

    The folder is complete only after the model class of the installed mlx-lm has agreed. Raises what `plan`
    raises, before anything is written. Any later error, also Ctrl-C, leaves the folder visibly unfinished;
    the error has a note on how to resume (here with `resume=True`).
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
    with (
        _class_check(plans.model, group) as check,
        _tokenizer_check(plans.model, group, trusted=trust_remote_code) as opens,
    ):
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
        with _complete(folder):
            tokenizer = opens.said() if opens else ""
    model, *mtp = written
    return Converted(model, mtp[0] if mtp else None, group.rank, tokenizer)


def verify(folder: str | os.PathLike[str], *, quick: bool = False) -> Verified:
    """Return what an output of `convert` holds, if all of its files are unchanged.

    `quick` does not read the data of the weight files. Raises CheckpointError that lists all differences, and
    MlaToolsError for a folder that is unfinished or not an output of this tool.
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
def _tokenizer_check(model: Plan, group: Group, *, trusted: bool) -> Iterator[TokenizerCheck | None]:
    """Open the tokenizer as mlx-lm does, in the first process alone."""
    with ExitStack() as stack:
        check = None
        if group.rank == 0:
            from mla_tools.verify import TokenizerCheck

            check = TokenizerCheck(model.config, model.copied, trusted=trusted)
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
def _complete(folder: Path) -> Iterator[None]:
    """Say in a note that an interruption ended nothing but the check of the tokenizer."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"{folder} is complete; only the check of its tokenizer was interrupted")
        raise


@contextmanager
def _resumable(folder: Path, overwrite: bool) -> Iterator[None]:
    """Say in a note how to resume after an interruption."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_unfinished(folder):
            error.add_note(how_to_resume(folder, overwrite=overwrite))
        raise
