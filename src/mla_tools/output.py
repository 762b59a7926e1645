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
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mla_tools.distributed import Group, shares
from mla_tools.errors import MlaToolsError
from mla_tools.files.place import copy
from mla_tools.files.safetensors import Writer, partial_path, sha256_of, sync, sync_folder
from mla_tools.plan import OutputFile, Plan, Target

__all__ = [
    "INDEX",
    "JOURNALS",
    "RECORD",
    "Output",
    "begin",
    "check_output",
    "identity",
    "is_complete",
    "journals",
    "read_record",
]

RECORD = "mla_tools.json"
INDEX = "model.safetensors.index.json"
JOURNALS = "mla_tools.journal-*.jsonl"

_FORMAT = 1

# So many bytes at most are written twice when a conversion is gone on with.
CHECKPOINT_BYTES = 1 << 30

# config.json, the index and the record: more than these ever took.
_SMALL_FILES = 64 << 20


def identity(plan: Plan, device: str) -> dict[str, Any]:
    """Return all that the bytes of an output depend on, as plain values."""
    place = plan.checkpoint.place
    return {
        "format": _FORMAT,
        "tools": {"mla-tools": version("mla-tools"), "mlx": version("mlx")},
        "device": device,
        "options": plan.options.described(),
        "source": {
            "name": _source_name(str(place)),
            "revision": place.revision,
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


def _source_name(place: str) -> str:
    """Return a name of the source that does not depend on where it lies on this machine."""
    if "://" in place:
        return place.rpartition("@")[0] or place
    path = Path(place).resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return "hf://" + "/".join(path.parent.parent.name.split("--")[1:])
    return path.name


def check_output(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise MlaToolsError if an output folder cannot be made there.

    What can be said before there is a plan; `begin` looks closer.
    """
    if not (folder.exists() or folder.is_symlink()):
        return
    if not folder.is_dir():
        raise MlaToolsError(f"Cannot save to the path {folder} as it already exists and is not a folder.")
    if journals(folder):
        if not (resume or overwrite):
            raise MlaToolsError(
                f"{folder} is an unfinished output: go on with --resume, or start again with --overwrite."
            )
    elif (folder / RECORD).is_file():
        if not (resume or overwrite):
            raise MlaToolsError(
                f"Cannot save to the path {folder} as it already exists."
                " Please delete it, specify a new path to save to, or replace it with --overwrite."
            )
    else:
        raise MlaToolsError(
            f"Cannot save to the path {folder} as it already exists."
            " Please delete the file/directory or specify a new path to save to."
        )


def is_complete(folder: Path, plan: Plan, device: str) -> bool:
    """Return whether a folder is the complete output of this very plan."""
    if journals(folder) or not (folder / INDEX).is_file():
        return False
    record = _read_json(folder / RECORD)
    return record is not None and not _differences(record, identity(plan, device))


def begin(
    plan: Plan, folder: Path, device: str, group: Group, *, resume: bool = False, overwrite: bool = False
) -> Output:
    """Return the output folder of a plan, made or found again, ready to be written.

    Raises MlaToolsError if it cannot be: there is another folder, it is of another plan, the disk is full.
    """
    told = identity(plan, device)
    error = None
    if group.rank == 0:
        try:
            check_output(folder, resume=resume, overwrite=overwrite)
            _refuse_source(plan, folder)
            if overwrite and not resume and folder.exists():
                _clear(folder)
            _make(folder)
            Journal(folder, 0, told).close()
            _check_room(plan, folder)
        except OSError as fault:
            text = f"The output folder {folder} cannot be made: {fault.strerror}"
            error = MlaToolsError(text)
        except MlaToolsError as fault:
            error = fault
    everyone = group.agree(error is None)
    if error is not None:
        raise error
    if not everyone:
        raise MlaToolsError("another process of this run could not begin; see its message")
    return Output(plan, folder, told, group)


def _refuse_source(plan: Plan, folder: Path) -> None:
    place = plan.checkpoint.place
    if place.local and folder.resolve() == Path(str(place)).resolve():
        raise MlaToolsError(f"{folder} is the source itself; choose another folder for the output")


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _clear(folder: Path) -> None:
    """Remove an output of this tool, and nothing that it did not make."""
    ours = {RECORD, INDEX, "config.json"}
    known = [_read_json(folder / RECORD), *(first for first, _ in map(_read_journal, journals(folder)))]
    for told in known:
        output = (told or {}).get("output")
        if isinstance(output, dict):
            ours |= {str(name) for key in ("files", "copied", "added") for name in output.get(key) or ()}
    ours |= {partial_path(Path(name)).name for name in ours}
    ours |= {path.name for path in journals(folder)}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in ours or path.is_dir())
    if strange:
        few = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        raise MlaToolsError(
            f"{folder} holds what this tool did not make, so --overwrite leaves it alone: {few}"
        )
    # The index goes first: from here on the folder must not look complete.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name != INDEX, path.name != RECORD)):
        path.unlink()


def _check_room(plan: Plan, folder: Path) -> None:
    """Raise MlaToolsError if the disk has no room for what is still to be written."""
    done = _State.of(folder)
    needed = _SMALL_FILES
    for file in plan.files:
        if file.name not in done.sealed:
            path = partial_path(folder / file.name)
            allocated = path.stat().st_blocks * 512 if path.exists() else 0
            needed += max(0, file.layout.size - allocated)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MlaToolsError(
            f"the disk of {folder} has {free:,} bytes free, and {needed:,} more are needed;"
            " free some space or choose another disk"
        )


# --- the journal -------------------------------------------------------------------------------------


class Journal:
    """What is on disk for good, a line each time more of it is; each rank has its own.

    Raises MlaToolsError if it is that of another plan, or of a run that still goes on.
    """

    def __init__(self, folder: Path, rank: int, told: Mapping[str, Any]) -> None:
        self.path = folder / JOURNALS.replace("*", f"{rank:05d}")
        self._lock = threading.Lock()
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._be_the_only_one()
            for other in journals(folder):
                first, _ = _read_journal(other)
                if first is not None and (changed := _differences(first, told)):
                    lines = "\n  ".join(changed)
                    raise MlaToolsError(
                        f"{folder} was begun with another plan, so it cannot be gone on with:\n  {lines}\n"
                        "  Start again with --overwrite, or give what it was begun with."
                    )
            size = os.fstat(self._fd).st_size
            if _read_journal(self.path)[0] is None:
                os.ftruncate(self._fd, 0)
                self.append(told)
                sync_folder(folder)
            elif os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(self._fd, b"\n")  # what was cut off stays a line of its own
        except BaseException:
            self.close()
            raise

    def _be_the_only_one(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MlaToolsError(f"{self.path.parent} is being written by another process") from error
        except OSError:
            return  # some network file systems have no locks

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, on disk for good."""
        with self._lock:
            os.write(self._fd, _json(line) + b"\n")
            sync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


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
        with suppress(ValueError):
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
    """What the journals of a folder say is done: numbers of targets, and whole files with their sha256."""

    def __init__(self) -> None:
        self.done: set[int] = set()
        self.sealed: dict[str, str] = {}

    @classmethod
    def of(cls, folder: Path) -> _State:
        state = cls()
        for path in journals(folder):
            for line in _read_journal(path)[1]:
                for first, last in line.get("done", ()):
                    state.done.update(range(first, last))
                if "file" in line:
                    state.sealed[line["file"]] = line["sha256"]
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

    Targets are counted through the steps of the plan. `write` may be called by any thread, everything
    else by one.
    """

    def __init__(self, plan: Plan, folder: Path, told: Mapping[str, Any], group: Group) -> None:
        self._plan, self.folder, self._told = plan, folder, told
        owners = shares([file.layout.size for file in plan.files], group.size)
        self._files: dict[str, OutputFile] = {
            file.name: file for file, rank in zip(plan.files, owners, strict=True) if rank == group.rank
        }
        self._homes = {name: file for file in self._files.values() for name in file.tensors}
        state = _State.of(folder)
        self._sealed = set(state.sealed) & self._files.keys()
        self._targets = [target for step in plan.steps for target in step.targets]
        homes = [self._home(target) for target in self._targets]
        mine = {number for number, home in enumerate(homes) if home is not None}
        self.todo = {
            number for number in mine if number not in state.done and homes[number] not in self._sealed
        }
        self._left = Counter(homes[number] for number in self.todo)
        self._begun: dict[str, list[str]] = defaultdict(list)
        for number in mine & state.done:
            self._begun[str(homes[number])] += self._targets[number].parts.values()
        self._writers: dict[str, Writer] = {}
        self._lock = threading.Lock()
        self._fresh: list[int] = []
        self._fresh_bytes = 0
        self._journal = Journal(folder, group.rank, told)
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

    @property
    def total_bytes(self) -> int:
        """The bytes of this rank's tensors."""
        return sum(spec.nbytes for file in self._files.values() for spec in file.tensors.values())

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
            self._kept.pop(0).result()

    def _save(self, numbers: Collection[int]) -> None:
        names = {self._home(self._targets[number]) for number in numbers} - self._sealed
        for name in names:
            if name is not None:
                self._writer(name).sync()
        self._journal.append({"done": _runs(numbers)})

    def _seal(self, name: str) -> None:
        digest = self._writer(name).seal()
        self._sealed.add(name)
        self._journal.append({"file": name, "sha256": digest})

    def complete(self) -> None:
        """Return when all of this rank's files are on disk for good, under their temporary names."""
        self._look(wait=True)
        if left := sorted(self._files.keys() - self._sealed):
            raise MlaToolsError(f"{self.folder} was not written completely: {', '.join(left)}")

    def suspend(self) -> None:
        """Leave the folder unfinished, with as much done as can be kept."""
        with suppress(MlaToolsError, OSError):
            self._checkpoint()
            self._look(wait=True)
        self._keeper.shutdown()
        for writer in self._writers.values():
            writer.suspend()

    def close(self) -> None:
        """Let go of the folder; what is unfinished stays so."""
        self.suspend()
        self._journal.close()

    def publish(self) -> None:
        """Make the folder complete: final names, the files beside the weights, the index last."""
        sealed = _State.of(self.folder).sealed
        for file in self._plan.files:
            path = self.folder / file.name
            if partial_path(path).exists():
                partial_path(path).rename(path)
        for companion in self._plan.copied:
            partial = partial_path(self.folder / companion.name)
            partial.unlink(missing_ok=True)
            copy(companion, partial)
            partial.rename(self.folder / companion.name)
        for name, text in self._plan.added.items():
            _write(self.folder / name, text.encode())
        _write_json(self.folder / "config.json", self._plan.config)
        index = partial_path(self.folder / INDEX)
        index.write_bytes(_pretty(_index(self._plan)))
        beside = [
            "config.json",
            *sorted(self._plan.added),
            *sorted(file.name for file in self._plan.copied),
        ]
        files = {file.name: (self.folder / file.name, sealed.get(file.name)) for file in self._plan.files}
        files |= {name: (self.folder / name, None) for name in beside} | {INDEX: (index, None)}
        _write_json(self.folder / RECORD, {**self._told, **_made(self._plan, files)})
        sync_folder(self.folder)
        index.rename(self.folder / INDEX)
        sync_folder(self.folder)
        for path in journals(self.folder):
            path.unlink()


def _nbytes(target: Target) -> int:
    return sum(spec.nbytes for spec in target.stored().values())


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {name: file.name for file in plan.files for name in file.tensors}
    metadata = {"total_size": plan.nbytes, "total_parameters": plan.parameters}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _made(plan: Plan, files: Mapping[str, tuple[Path, str | None]]) -> dict[str, Any]:
    """Return what was left out and why, and each file with its size and its sha256."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for drop in plan.drops:
        reasons[drop.reason] += drop.source.parts.values()
    return {
        "dropped": {reason: sorted(names) for reason, names in sorted(reasons.items())},
        "notes": list(plan.notes),
        "files": dict(_fingerprints(files)),
    }


def _fingerprints(
    files: Mapping[str, tuple[Path, str | None]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (path, digest) in files.items():
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield name, {"bytes": size, "sha256": digest or sha256_of(file.fileno())}


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, _pretty(value))


def _write(path: Path, data: bytes) -> None:
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())
    partial.rename(path)
