"""The folder of a conversion, from its first byte to the file that completes it.

While it is written, the shards have temporary names and a journal says what of them is on disk for good.
The index comes last. So a folder is either complete or visibly unfinished, and one that was interrupted,
by whatever it was, can be gone on with: what the journal does not name is done again, and as the bytes
depend on nothing but the plan, the result is the same.

A complete folder holds mla_tools.json: what made it from what, and the sha256 of each of its files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from mla_tools.distributed import Group, shares
from mla_tools.errors import MlaToolsError
from mla_tools.files.place import Place, copy
from mla_tools.files.safetensors import Writer, partial_path, sha256_of, sync, sync_folder
from mla_tools.plan import OutputFile, Plan, Target

__all__ = [
    "INDEX",
    "JOURNALS",
    "RECORD",
    "Journal",
    "Output",
    "begin",
    "check_output",
    "how_to_go_on",
    "identity",
    "is_complete",
    "is_unfinished",
    "journals",
    "read_record",
    "together",
]

RECORD = "mla_tools.json"
INDEX = "model.safetensors.index.json"
JOURNALS = "mla_tools.journal-*.jsonl"

_FORMAT = 1
_CONFIG = "config.json"

# A journal of its own while --overwrite removes what was there before.
_CLEARING = JOURNALS.replace("*", "clearing")

T = TypeVar("T")

# Differences that are told before "and so many more".
_TOLD = 12

# So many bytes at most are written twice when a conversion is gone on with.
CHECKPOINT_BYTES = 256 << 20

# config.json, the index and the record: more than these ever took.
_SMALL_FILES = 64 << 20


def identity(plan: Plan, device: str) -> dict[str, Any]:
    """Return all that the bytes of an output depend on, as plain values."""
    name, revision = _source(plan.checkpoint.place)
    return {
        "format": _FORMAT,
        "tools": {"mla-tools": version("mla-tools"), "mlx": version("mlx")},
        "device": device,
        "options": plan.options.described(),
        "source": {
            "name": name,
            "revision": revision,
            "config_sha256": _sha256(_json(plan.checkpoint.config)),
            "files": {
                shard.name: {"bytes": shard.size, "header_sha256": shard.digest, "tag": shard.tag}
                for shard in plan.checkpoint.shards
            },
        },
        "output": {
            "config_sha256": _sha256(_json(plan.config)),
            "added": {name: _sha256(text.encode()) for name, text in plan.added.items()},
            "copied": sorted(file.name for file in plan.copied),
            "files": {file.name: _sha256(file.layout.header) for file in plan.files},
        },
    }


def _source(place: Place) -> tuple[str, str]:
    """Return a name of the source that does not depend on where it lies on this machine, and its commit."""
    if "://" in str(place):
        return str(place).rpartition("@")[0] or str(place), place.revision
    path = Path(str(place)).resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return "hf://" + "/".join(path.parent.parent.name.split("--")[1:]), path.name
    return path.name, place.revision


def together(group: Group, work: Callable[[], T]) -> T:
    """Return what a piece of work gives, when it went well in each process of a group."""
    results: list[T] = []
    error: MlaToolsError | OSError | None = None
    try:
        results.append(work())
    except (MlaToolsError, OSError) as fault:
        error = fault
    everyone = group.agree(error is None)
    if error is not None:
        raise error
    if not everyone:
        raise MlaToolsError("another process of this run failed; see its message")
    return results[0]


def check_output(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise MlaToolsError if an output folder cannot be made there.

    What can be said before there is a plan; `begin` looks closer.
    """
    allowed = resume or overwrite
    try:
        if not os.path.lexists(folder):
            return
        is_folder = folder.is_dir()
        empty = is_folder and not any(folder.iterdir())
    except OSError as error:
        raise _unusable(folder, error) from error
    if not is_folder:
        raise MlaToolsError(f"Cannot save to the path {folder} as it already exists and is not a folder.")
    if is_unfinished(folder):
        if not allowed:
            raise MlaToolsError(
                f"{folder} is an unfinished output: go on with --resume, or start again with --overwrite."
            )
    elif _is_told(_read_json(folder / RECORD)):
        if not allowed:
            raise MlaToolsError(
                f"Cannot save to the path {folder} as it already exists."
                " Please delete it, specify a new path to save to, or replace it with --overwrite."
            )
    elif not (allowed and empty):  # a run that was ended at once leaves an empty folder
        raise MlaToolsError(
            f"Cannot save to the path {folder} as it already exists."
            " Please delete the file/directory or specify a new path to save to."
        )


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder is an output of this tool that was begun and is not complete."""
    return bool(journals(folder))


def how_to_go_on(folder: Path) -> str:
    """Return a sentence for somebody whose output is unfinished."""
    return f"{folder} is unfinished: run the same command with --resume to go on"


def is_complete(folder: Path, told: Mapping[str, Any]) -> bool:
    """Return whether a folder is the complete output that `identity` tells of."""
    record = _read_json(folder / RECORD)
    return (
        (folder / INDEX).is_file()
        and _is_told(record)
        and not _differences(record, told)
        and not _damaged(folder, record)
    )


def _damaged(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the files of a complete folder that are gone or have another size than they had."""
    damaged = []
    for name, made in record["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            size = None
        if not isinstance(made, dict) or made.get("bytes") != size:
            damaged.append(name)
    return damaged


def _is_told(record: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Return whether this is a record that this tool wrote."""
    return record is not None and all(isinstance(record.get(key), dict) for key in ("output", "files"))


def begin(
    plan: Plan,
    folder: Path,
    told: Mapping[str, Any],
    group: Group,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> bool:
    """Make the folder of an output, or find it again; return whether anything is left to do.

    Raises MlaToolsError if it cannot be: there is another folder, it is of another plan, the disk is full.
    Then nothing has changed there, unless it was to be replaced.
    """

    def prepare() -> bool:
        if resume and is_complete(folder, told):
            _end_journals(folder)
            return False
        if group.rank == 0:
            try:
                _prepare(plan, folder, told, resume=resume, overwrite=overwrite)
            except OSError as error:
                raise _unusable(folder, error) from error
        return True

    return together(group, prepare)


def _unusable(folder: Path, error: OSError) -> MlaToolsError:
    return MlaToolsError(f"The output folder {folder} cannot be made: {error.strerror}")


def _prepare(plan: Plan, folder: Path, told: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    check_output(folder, resume=resume, overwrite=overwrite)
    _refuse_source(plan, folder)
    clear = folder.is_dir() and ((overwrite and not resume) or (folder / _CLEARING).exists())
    if resume and not is_unfinished(folder):
        _refuse_finished(folder, told)
    if clear:
        _refuse_strange(folder)
    _check_room(plan, folder, clear)
    if clear:
        _clear(folder)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        if not (resume or overwrite):  # it was not there just now
            raise MlaToolsError(f"{folder} is being written by another process") from error
    with closing(Journal(folder, 0, told)):
        state = _State.of(folder)
        targets = [target for step in plan.steps for target in step.targets]
        kept = {name for number in state.done(len(targets)) for name in targets[number].parts.values()}
        for file in plan.files:
            if file.name in state.sealed or not kept.isdisjoint(file.tensors):
                _check_kept(folder, file)


def _refuse_source(plan: Plan, folder: Path) -> None:
    """Raise MlaToolsError if the folder holds what is to be read, by that name or behind links."""
    place = plan.checkpoint.place
    if not place.local or not folder.is_dir():
        return
    source = Path(str(place)).resolve()
    homes = {source, *((source / shard.name).resolve().parent for shard in plan.checkpoint.shards)}
    if folder.resolve() in homes:
        raise MlaToolsError(f"{folder} is the source itself; choose another folder for the output")


def _refuse_finished(folder: Path, told: Mapping[str, Any]) -> None:
    """Raise MlaToolsError for a finished output that is not this one, or not as it was left."""
    record = _read_json(folder / RECORD)
    if not _is_told(record):
        return
    if changed := _differences(record, told):
        raise _other_plan(folder, "is the output of another plan, so there is nothing to go on with", changed)
    gone = ", ".join(_damaged(folder, record)) or INDEX
    raise MlaToolsError(f"{folder} is not as it was left, start again with --overwrite: {gone}")


def _other_plan(folder: Path, what: str, changed: list[str]) -> MlaToolsError:
    more = [f"and {len(changed) - _TOLD} more"] if len(changed) > _TOLD else []
    lines = "\n  ".join([*changed[:_TOLD], *more])
    return MlaToolsError(
        f"{folder} {what}:\n  {lines}\n  Start again with --overwrite, or give what it was begun with."
    )


def _ours(folder: Path) -> set[str]:
    """Return the names of all files that this tool may have made in an output folder."""
    names = {RECORD, INDEX, _CONFIG}
    firsts = (first for first, _ in map(_read_journal, journals(folder)))
    for told in (_read_json(folder / RECORD), *firsts):
        output = (told or {}).get("output")
        if isinstance(output, dict):
            names |= {str(name) for key in ("files", "copied", "added") for name in output.get(key) or ()}
    return names | {partial_path(Path(name)).name for name in names}


def _refuse_strange(folder: Path) -> None:
    """Raise MlaToolsError if a folder holds anything that this tool did not make."""
    ours = _ours(folder) | {path.name for path in journals(folder)}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in ours or path.is_dir())
    if strange:
        few = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        raise MlaToolsError(
            f"{folder} holds what this tool did not make, so --overwrite leaves it alone: {few}"
        )


def _clear(folder: Path) -> None:
    """Remove an output of this tool."""
    names = {"format": _FORMAT, "output": {"files": sorted(_ours(folder))}}
    with ExitStack() as stack:
        for path in journals(folder):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            _lock(fd, path)
        # From here on the folder is unfinished, whatever happens, and known as ours.
        _write(folder / _CLEARING, _json(names) + b"\n")
        sync_folder(folder)
        (folder / INDEX).unlink(missing_ok=True)
        sync_folder(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == _CLEARING):
            path.unlink()


def _end_journals(folder: Path) -> None:
    """Remove the journals of a folder that is complete: the last thing that its run was about to do."""
    for path in journals(folder):
        path.unlink(missing_ok=True)


def _check_room(plan: Plan, folder: Path, clear: bool) -> None:
    """Raise MlaToolsError if the disk has no room for what is still to be written."""
    sealed = {} if clear else _State.of(folder).sealed
    needed = _SMALL_FILES
    for file in plan.files:
        if file.name not in sealed:
            needed += file.layout.size
            needed -= 0 if clear else min(file.layout.size, _allocated(partial_path(folder / file.name)))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if clear:
        free += sum(map(_allocated, folder.iterdir()))
    if free < needed:
        raise MlaToolsError(
            f"the disk of {folder} has {free:,} bytes free, and {needed:,} are needed;"
            " free some space or choose another disk"
        )


def _allocated(path: Path) -> int:
    return path.lstat().st_blocks * 512 if path.exists() else 0


def _check_kept(folder: Path, file: OutputFile) -> None:
    """Raise MlaToolsError if a file of which the journal calls something done is not what it was."""
    final = folder / file.name
    partial = partial_path(final)
    path = partial if partial.exists() else final
    header = file.layout.header
    try:
        with path.open("rb") as opened:
            sound = (
                os.fstat(opened.fileno()).st_size == file.layout.size and opened.read(len(header)) == header
            )
    except FileNotFoundError:
        sound = False
    if not sound:
        raise MlaToolsError(f"{partial} is not as it was left; start again with --overwrite")
    if path is partial and os.path.lexists(final):
        raise MlaToolsError(f"{final} exists already; remove it or choose another place")


# --- the journal -------------------------------------------------------------------------------------


class Journal:
    """What is on disk for good, a line each time more of it is; each rank has its own.

    Raises MlaToolsError if it is that of another plan, or of a run that still goes on.
    """

    def __init__(self, folder: Path, rank: int, told: Mapping[str, Any]) -> None:
        self.path = folder / JOURNALS.replace("*", f"{rank:05d}")
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(self._fd, self.path)
            for other in journals(folder):
                first, _ = _read_journal(other)
                if first is not None and (changed := _differences(first, told)):
                    what = "was begun with another plan, so it cannot be gone on with"
                    raise _other_plan(folder, what, changed)
            size = os.fstat(self._fd).st_size
            # What was cut off stays a line of its own.
            self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
            if _read_journal(self.path)[0] is None:
                os.ftruncate(self._fd, 0)
                self._torn = False
                self.append(told)
                sync_folder(folder)
        except BaseException:
            self.close()
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, on disk for good; one thread at a time."""
        text = memoryview((b"\n" if self._torn else b"") + _json(line) + b"\n")
        self._torn = True
        while text:  # of what a full disk does not take, write says so only when asked again
            text = text[os.write(self._fd, text) :]
        sync(self._fd)
        self._torn = False

    def close(self) -> None:
        os.close(self._fd)


def _lock(fd: int, path: Path) -> None:
    """Raise MlaToolsError if another process has the lock of an open journal, or has just removed it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(path) from error
    except OSError:
        return  # some network file systems have no locks
    if not (path.exists() and os.path.samestat(os.fstat(fd), path.stat())):
        raise _busy(path)


def _busy(journal: Path) -> MlaToolsError:
    return MlaToolsError(f"{journal.parent} is being written by another process")


def read_record(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Return the size and the sha256 of each file of a complete output, None where that is not told."""
    files = (_read_json(folder / RECORD) or {}).get("files")
    if not isinstance(files, dict) or not files:
        return None
    found = {}
    for name, told in files.items():
        plain = name not in ("", ".", "..") and not set("/\\\0") & set(name)
        nbytes, sha256 = (told.get("bytes"), told.get("sha256")) if isinstance(told, dict) else (None, None)
        if not plain or type(nbytes) is not int or type(sha256) is not str:
            return None
        found[name] = (nbytes, sha256)
    return found


def journals(folder: Path) -> list[Path]:
    """Return the journals of the ranks that write a folder; none, if nobody does."""
    return sorted(folder.glob(JOURNALS))


def _read_journal(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the first line of a journal and the others, without any that was cut off."""
    lines = []
    for text in path.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    if not lines or "format" not in lines[0]:
        return None, []
    return lines[0], lines[1:]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Return a line for each value that is another one now."""
    lines = []
    for key, value in new.items():
        before, where = old.get(key), f"{place}{key}"
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            lines += _differences(before, value, f"{where}.")
            lines += [f"{where}.{gone}: is gone" for gone in before if gone not in value]
        elif before != value:
            lines.append(f"{where}: was {before!r}, is {value!r}")
    return lines


class _State:
    """What the journals of a folder say is done: runs of targets, and whole files with their sha256."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self.sealed: dict[str, str] = {}

    def done(self, count: int) -> set[int]:
        """Return the numbers of the targets that are done, of so many."""
        return {number for first, last in self.runs for number in range(max(0, first), min(last, count))}

    @classmethod
    def of(cls, folder: Path) -> _State:
        state = cls()
        for path in journals(folder):
            for line in _read_journal(path)[1]:
                match line:
                    case {"done": [*runs]}:
                        state.runs += [(first, last) for first, last in runs]
                    case {"file": str(name), "sha256": str(digest)}:
                        state.sealed[name] = digest
        return state


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Return numbers as ranges [first, last + 1]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


# --- the folder --------------------------------------------------------------------------------------


class Output:
    """The folder of a conversion under way: where its tensors go, and what of them is done.

    The journal is this process's own, open, so that nobody else writes what is read here.
    Targets are counted through the steps of the plan. `write` may be called by any thread, everything
    else by one.
    """

    def __init__(
        self, plan: Plan, folder: Path, told: Mapping[str, Any], group: Group, journal: Journal
    ) -> None:
        self._plan, self.folder, self._told = plan, folder, told
        owners = shares([file.layout.size for file in plan.files], group.size)
        self._files: dict[str, OutputFile] = {
            file.name: file for file, rank in zip(plan.files, owners, strict=True) if rank == group.rank
        }
        self._homes = {name: file for file in self._files.values() for name in file.tensors}
        self._journal = journal
        state = _State.of(folder)
        self._sealed = set(state.sealed) & self._files.keys()
        self._targets = [target for step in plan.steps for target in step.targets]
        done = state.done(len(self._targets))
        homes = [self._home(target) for target in self._targets]
        mine = {number for number, home in enumerate(homes) if home is not None}
        self.todo = {number for number in mine if number not in done and homes[number] not in self._sealed}
        self._left = Counter(homes[number] for number in self.todo)
        self._begun: dict[str, list[str]] = defaultdict(list)
        for number in mine & done:
            self._begun[str(homes[number])] += self._targets[number].parts.values()
        self._writers: dict[str, Writer] = {}
        self._lock = threading.Lock()
        self._fresh: list[int] = []
        self._fresh_bytes = 0
        # One thread that waits for the disk, so that those that compute need not.
        self._keeper = ThreadPoolExecutor(1)
        self._kept: list[Future[None]] = []
        for name in self._files:
            if name not in self._sealed and not self._left[name]:
                self._later(self._seal, name)

    @property
    def done_bytes(self) -> int:
        """The bytes of this rank's tensors that need not be written any more."""
        skipped = (target for number, target in enumerate(self._targets) if number not in self.todo)
        return sum(_nbytes(target) for target in skipped if self._home(target) is not None)

    def _home(self, target: Target) -> str | None:
        file = self._homes.get(next(iter(target.parts.values())))
        return None if file is None else file.name

    def write(self, name: str, start: int, data: Any) -> None:
        """Write a contiguous buffer at byte `start` of a stored tensor."""
        self._writer(self._homes[name].name).write(name, start, data)

    def _writer(self, name: str) -> Writer:
        with self._lock:
            if name not in self._writers:
                path = self.folder / name
                self._writers[name] = Writer(path, self._files[name].layout, self._begun.get(name))
            return self._writers[name]

    def finished(self, number: int) -> None:
        """Take note that all of a target is written."""
        target = self._targets[number]
        name = self._homes[next(iter(target.parts.values()))].name
        self.todo.discard(number)
        self._fresh.append(number)
        self._fresh_bytes += _nbytes(target)
        self._left[name] -= 1
        if not self._left[name]:
            self._later(self._seal, name)
        if self._fresh_bytes >= CHECKPOINT_BYTES:
            self._checkpoint()
        self._look(wait=False)

    def _checkpoint(self) -> None:
        fresh, self._fresh, self._fresh_bytes = self._fresh, [], 0
        if fresh:
            self._later(self._save, fresh)

    def _later(self, work: Any, given: Any) -> None:
        self._kept.append(self._keeper.submit(work, given))

    def _look(self, wait: bool) -> None:
        """Raise what went wrong in the thread that waits for the disk."""
        while self._kept and (wait or self._kept[0].done()):
            self._kept[0].result()  # stays where it is when it failed, to be raised again
            self._kept.pop(0)

    def _save(self, numbers: Collection[int]) -> None:
        homes = {self._home(self._targets[number]) for number in numbers} - self._sealed
        writers = [self._writer(name) for name in homes if name is not None]
        for writer in writers:
            writer.sync()
        self._journal.append({"done": _runs(numbers)})
        for writer in writers:
            writer.hash()

    def _seal(self, name: str) -> None:
        digest = self._writer(name).seal()
        self._sealed.add(name)
        self._journal.append({"file": name, "sha256": digest})

    def complete(self) -> None:
        """Return when all of this rank's files are on disk for good, under their temporary names."""
        self._look(wait=True)
        if left := sorted(self._files.keys() - self._sealed):
            raise MlaToolsError(f"{self.folder} was not written completely: {', '.join(left)}")

    def close(self) -> None:
        """Let go of the folder; what is unfinished stays so, with as much done as can be kept."""
        try:
            with suppress(MlaToolsError, OSError):
                self._look(wait=True)  # a disk that failed once is not believed afterwards
                self._checkpoint()
                self._look(wait=True)
        finally:
            self._keeper.shutdown()
            for writer in self._writers.values():
                writer.suspend()

    def publish(self) -> None:
        """Make the folder complete: the files beside the weights, then the final names, the index last."""
        plan, sealed = self._plan, _State.of(self.folder).sealed
        for file in plan.files:
            _check_kept(self.folder, file)
        digests: dict[str, str | None] = {file.name: sealed.get(file.name) for file in plan.files}
        for companion in plan.copied:
            partial = partial_path(self.folder / companion.name)
            partial.unlink(missing_ok=True)
            copy(companion, partial)
            digests[companion.name] = None
        for name, text in plan.added.items():
            _write(partial_path(self.folder / name), text.encode())
            digests[name] = None
        small = {_CONFIG: plan.config, INDEX: _index(plan)}
        for name, value in small.items():
            _write(partial_path(self.folder / name), _pretty(value))
            digests[name] = None
        record = {**self._told, **_made(plan, self.folder, digests)}
        _write(partial_path(self.folder / RECORD), _pretty(record))
        for name in (*sorted(digests.keys() - small.keys()), RECORD, _CONFIG):
            self._rename(name)
        sync_folder(self.folder)
        self._rename(INDEX)
        sync_folder(self.folder)
        _end_journals(self.folder)

    def _rename(self, name: str) -> None:
        path = self.folder / name
        # A weight file has its final name already when an earlier run came as far as this.
        if partial_path(path).exists():
            partial_path(path).rename(path)


def _nbytes(target: Target) -> int:
    return sum(spec.nbytes for spec in target.stored().values())


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: file.name for file in plan.files for name in file.tensors}
    metadata = {"total_size": plan.nbytes, "total_parameters": plan.parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _made(plan: Plan, folder: Path, digests: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what was left out and why, and each file with its size and its sha256."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for drop in plan.drops:
        reasons[drop.reason] += drop.source.parts.values()
    return {
        "dropped": {reason: sorted(names) for reason, names in sorted(reasons.items())},
        "notes": list(plan.notes),
        "files": {name: _fingerprint(folder / name, digest) for name, digest in sorted(digests.items())},
    }


def _fingerprint(path: Path, digest: str | None) -> dict[str, Any]:
    """Return the size and the sha256 of a file, which may still have its temporary name."""
    partial = partial_path(path)
    with (partial if partial.exists() else path).open("rb") as file:
        fd = file.fileno()
        if digest is None:
            sync(fd)
            digest = sha256_of(fd)
        return {"bytes": os.fstat(fd).st_size, "sha256": digest}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=4) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, data: bytes) -> None:
    """Write a small file, on disk for good."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())
