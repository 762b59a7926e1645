"""Whether an output may begin in a folder, be resumed there, or replace what lies there."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from mla_tools.distributed import Group, together
from mla_tools.errors import DamagedError, MlaToolsError
from mla_tools.files.directory import Directory, longest_name, partial_name, sync
from mla_tools.files.place import identity_of, leaf_of, shown
from mla_tools.files.writer import sha256_in
from mla_tools.output.found import Found, find_record
from mla_tools.output.journal import (
    CLEARING,
    Journal,
    State,
    journals,
    line_of,
    lock,
    other_plan,
    read_journals,
)
from mla_tools.output.record import CONFIG, INDEX, RECORD, Record, differences
from mla_tools.plan import OutputFile, Plan

__all__ = [
    "begin",
    "check_kept",
    "check_output",
    "how_to_resume",
    "how_to_start_again",
    "is_complete",
    "is_unfinished",
    "refuse_source",
]

# config.json, the index and the record: more than these ever took.
SMALL_FILES = 64 << 20


def check_output(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise MlaToolsError if an output folder cannot be made there.

    What can be said before there is a plan; `begin` looks closer.
    """
    try:
        if os.path.lexists(path):
            with _open(path) as folder:
                _check(folder, Found.of(folder), resume=resume, overwrite=overwrite)
    except OSError as error:
        raise _unusable(path, error) from error


def _check(folder: Directory, found: Found, *, resume: bool, overwrite: bool) -> None:
    allowed = resume or overwrite
    refused = f"Cannot save to the path {folder.path} as it already exists."
    if found.unfinished:
        if not allowed:
            raise MlaToolsError(
                f"{folder.path} is an unfinished output: finish it with --resume, or start again with"
                " --overwrite."
            )
    elif found.journals and found.record is None:
        names = _first(sorted(found.journals))
        raise MlaToolsError(f"{refused} It holds a journal that is damaged or of another version ({names}).")
    elif found.record is not None:
        if not allowed:
            raise MlaToolsError(
                f"{refused} It is an output of this tool: choose another path to save to, or replace it with"
                " --overwrite."
            )
    elif not (allowed and not found.names):  # a run that was ended at once leaves an empty folder
        raise MlaToolsError(f"{refused} It is not an output of this tool: choose another path to save to.")


def is_unfinished(path: Path) -> bool:
    """Return whether a folder is an output of this tool that was begun and is not complete."""
    with suppress(OSError, MlaToolsError), Directory(path) as folder:
        return Found.of(folder).unfinished
    return False


def how_to_resume(path: Path, *, overwrite: bool = False) -> str:
    """Return a sentence for somebody whose output is unfinished; `overwrite`: it was begun with that."""
    instead = " instead of --overwrite" if overwrite else ""
    return f"{path} is unfinished: run the same command with --resume{instead} to finish it"


def how_to_start_again(path: Path) -> str:
    """Return a sentence for somebody whose output is unfinished, and would remain so."""
    return f"{path} is unfinished, and --resume would fail again: start again with --overwrite"


def is_complete(folder: Directory, provenance: Mapping[str, Any]) -> bool:
    """Return whether a folder is the complete output of this provenance, as far as is looked at quickly."""
    record = find_record(folder)
    if record is None or _differences(record, provenance):
        return False
    # A run that was interrupted at its very end is built on; what was complete for long is for `verify`.
    return not _damaged(folder, record, whole=bool(journals(folder)))


def _differences(record: Record, provenance: Mapping[str, Any]) -> list[str]:
    return differences({key: record.value.get(key) for key in provenance}, provenance)


def _damaged(folder: Directory, record: Record, *, whole: bool = False) -> list[str]:
    """Return the files of a complete folder that are not what they were.

    All are looked at, small ones are read, and weight files too if `whole`.
    """
    damaged = []
    for name, (nbytes, sha256) in record.files.items():
        status = folder.status(name)
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
            damaged.append(name)
        elif whole or record.header_digest(name) is None:
            damaged += [name] if sha256_in(folder, name) != sha256 else []
    return damaged


def begin(
    plan: Plan,
    path: Path,
    begun: Mapping[str, Any],
    group: Group,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Directory | None:
    """Return the open folder of an output, new or found again, or None if nothing is left to do.

    Raises MlaToolsError if it cannot be: there is another folder, it is of another plan, the disk is full.
    Then nothing has changed there, unless it was to be replaced.
    """

    opened: list[Directory] = []

    def prepare() -> bool:
        try:
            if os.path.lexists(path):
                opened.append(_open(path))
                if resume and is_complete(opened[0], begun["provenance"]):
                    _settle(opened[0])
                    end_journals(opened[0])
                    return False
            if group.rank == 0:
                refuse_source(path, _homes(plan))
                _refuse_long_names(plan, path)
                if opened:
                    _find_again(plan, opened[0], begun, resume=resume, overwrite=overwrite)
                else:
                    _check_room(plan, path)
                    opened.append(_make(path))
                _check_journals(plan, opened[0], begun)
        except OSError as error:
            raise _unusable(path, error) from error
        return True

    try:
        if together(group, prepare):
            return opened.pop() if opened else _open(path)
        return None
    finally:
        for folder in opened:
            folder.close()


def _open(path: Path) -> Directory:
    """Return the folder at a path; MlaToolsError if there is something else."""
    try:
        return Directory(path)
    except (FileNotFoundError, NotADirectoryError) as error:  # a file, or a link to nowhere
        raise MlaToolsError(
            f"Cannot save to the path {path} as it already exists and is not a folder."
        ) from error
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> MlaToolsError:
    return MlaToolsError(f"The output folder {path} cannot be made: {error.strerror}")


def _find_again(
    plan: Plan, folder: Directory, begun: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Make room for an output in a folder that is there, or raise MlaToolsError."""
    found = Found.of(folder)
    _check(folder, found, resume=resume, overwrite=overwrite)
    if resume and not found.unfinished:
        _refuse_finished(folder, found, begun["provenance"])
    _settle(folder)
    ours = found.ours() | {partial_name(name) for name in _made(plan)}
    for name in sorted(found.names & (ours | _made(plan))):
        folder.check(name)
    clear = overwrite or found.clearing
    if clear or not found.begun:
        _refuse_strange(folder, found, ours)
    if clear:
        _check_room(plan, folder.path, taken=sum(_allocated(folder, name) for name in found.names))
        _clear(folder, found, ours)
    else:
        _check_room(plan, folder.path, folder, found.state)


def _check_journals(plan: Plan, folder: Directory, begun: Mapping[str, Any]) -> None:
    """Begin the journal, or compare what those that are there call done with what lies there."""
    with closing(Journal(folder, 0, begun)):
        state = State.of(read_journals(folder))
        targets = [target for step in plan.steps for target in step.targets]
        kept = {name for stored in state.kept(targets).values() for name in stored}
        for file in plan.files:
            if file.name in state.sealed or not kept.isdisjoint(file.tensors):
                check_kept(folder, file)


def _made(plan: Plan) -> set[str]:
    """Return the names of all files that a conversion makes."""
    files = {file.name for file in plan.files} | {companion.name for companion in plan.copied}
    return files | set(plan.added) | {RECORD, INDEX, CONFIG}


def _make(path: Path) -> Directory:
    """Return a new folder, which is on disk for good with those above it that were not there."""
    busy = MlaToolsError(f"{path} is being written by another process")
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:  # it was not there just now
        raise busy from error
    folder = Directory(path)
    if folder.names():
        folder.close()
        raise busy
    _sync_above(path)
    return folder


def refuse_source(path: Path, sources: Iterable[Path]) -> None:
    """Raise MlaToolsError if a path leads to one of the folders from which is read."""
    for source in sources:
        with suppress(OSError, ValueError):
            if path.samefile(source):
                raise MlaToolsError(f"{path} is the source itself; choose another folder for the output")


def _homes(plan: Plan) -> set[Path]:
    """Return the folders in which the source lies, by that name and behind links."""
    place = plan.checkpoint.place
    if not place.local:
        return set()
    source = Path(str(place)).resolve()
    return {source, *((source / shard.name).resolve().parent for shard in plan.checkpoint.shards)}


def _refuse_long_names(plan: Plan, path: Path) -> None:
    """Raise MlaToolsError if a file of the output has a longer name than its file system takes."""
    most = longest_name(path)
    long = [name for name in sorted(_made(plan)) if len(os.fsencode(partial_name(leaf_of(name)))) > most]
    if long:
        raise MlaToolsError(
            f"the disk of {path} allows names of up to {most} bytes, and a file has"
            f" {len(partial_name(''))} more while it is written; too long: {', '.join(map(shown, long[:4]))}"
        )


def _refuse_finished(folder: Directory, found: Found, provenance: Mapping[str, Any]) -> None:
    """Raise MlaToolsError for a finished output that is not this one, or not as it was left."""
    record = found.record
    if record is None:
        return
    if changed := _differences(record, provenance):
        raise other_plan(folder, "is the output of another plan, so there is nothing to resume", changed)
    gone = _damaged(folder, record)
    raise MlaToolsError(
        f"{folder.path} has changed since it was written; start again with --overwrite: {_first(gone)}"
    )


def _refuse_strange(folder: Directory, found: Found, ours: set[str]) -> None:
    """Raise MlaToolsError if a folder holds anything that this tool did not make."""
    statuses = {name: folder.status(name) for name in sorted(found.names)}
    strange = [
        name
        for name, status in statuses.items()
        if name not in ours or (status is not None and not stat.S_ISREG(status.st_mode))
    ]
    if strange:
        raise MlaToolsError(
            f"{folder.path} holds files that this tool did not make, so nothing was changed:"
            f" {_first(strange)}."
            " Move them away, or choose another path to save to."
        )


def _first(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(shown, names[:4])) + more


def _clear(folder: Directory, found: Found, ours: set[str]) -> None:
    """Remove an output of this tool: the files that were looked at, and nothing that has come since."""
    statuses = {name: folder.status(name) for name in sorted(found.names & ours)}
    known = {name: identity_of(status) for name, status in statuses.items() if status is not None}
    with ExitStack() as stack:
        for name in found.journals:
            fd = folder.open(name, write=True)
            stack.callback(os.close, fd)
            lock(folder, name, fd)
        # From here on the folder is unfinished, whatever happens, and known as ours.
        if not found.clearing:
            folder.remove(CLEARING, known.get(CLEARING))  # one that was cut off
            folder.write(CLEARING, line_of({"output": {"files": sorted(ours - found.journals)}}))
            folder.sync()
        known.pop(CLEARING, None)
        if INDEX in known:
            folder.remove(INDEX, known.pop(INDEX))
            folder.sync()
        for name, identity in known.items():
            folder.remove(name, identity)
        if left := sorted(set(folder.names()) - {CLEARING}):
            raise MlaToolsError(
                f"{folder.path} was changed while it was being replaced, and still holds:"
                f" {_first(left)}. Move your files away, and run the same command again."
            )
        folder.sync()  # or what is left after a power cut would be nobody's
        folder.remove(CLEARING)


def _settle(folder: Directory) -> None:
    """Return when what is read of a folder is on disk for good.

    A process that was killed has not synced all that it wrote, and what is built on that must outlast it.
    """
    for name in journals(folder):
        with suppress(FileNotFoundError):  # its process has just ended it
            fd = folder.open(name)
            try:
                sync(fd)
            finally:
                os.close(fd)
    folder.sync()
    _sync_above(folder.path)


def _sync_above(path: Path) -> None:
    """Return when a folder's name, and those of the folders above it on its disk, are there for good."""
    disk = path.stat().st_dev
    for above in path.absolute().parents:
        with suppress(PermissionError):
            if above.stat().st_dev != disk:
                break
            with Directory(above) as opened:
                opened.sync()


def end_journals(folder: Directory) -> None:
    """Remove the journals of a folder that is complete: the last thing that its run was about to do."""
    for name in journals(folder):
        folder.remove(name)
    folder.sync()


def _check_room(
    plan: Plan, path: Path, folder: Directory | None = None, state: State | None = None, *, taken: int = 0
) -> None:
    """Raise MlaToolsError if the disk has no room for what is still to be written.

    `folder` is an unfinished output that is resumed, in this state; `taken` are the bytes of one that is
    replaced.
    """
    needed = SMALL_FILES + sum(companion.size for companion in plan.copied)
    for file in plan.files:
        if state is None or file.name not in state.sealed:
            needed += file.layout.size
            if folder is not None:
                needed -= min(file.layout.size, _allocated(folder, partial_name(file.name)))
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    free = shutil.disk_usage(there).free + taken
    if free < needed:
        raise MlaToolsError(
            f"the disk of {path} has {free:,} bytes free, but {needed:,} are needed;"
            " free some space or choose another disk"
        )


def _allocated(folder: Directory, name: str) -> int:
    status = folder.status(name)
    return 0 if status is None else status.st_blocks * 512


def check_kept(folder: Directory, file: OutputFile) -> str:
    """Return the present name of a file of which a journal calls something done.

    Raises MlaToolsError if it has another size or another header than it had.
    """
    partial = partial_name(file.name)
    name = partial if partial in folder else file.name
    header = file.layout.header
    try:
        fd = folder.open(name)
    except FileNotFoundError:
        sound = False
    else:
        try:
            sound = os.fstat(fd).st_size == file.layout.size and os.pread(fd, len(header), 0) == header
        finally:
            os.close(fd)
    if not sound:
        raise DamagedError(
            f"{folder.path / partial} has changed since it was written; start again with --overwrite"
        )
    if name == partial:
        folder.check_free(file.name)
    return name
