"""A disk that forgets: what the calls that change a folder leave of it when the power goes.

A process that is killed loses nothing that it wrote, because the system still has it. A power cut loses what
was not synced, or some of it, in an order that is the disk's own. So the calls are recorded while they are
made, and what may be left after any of them is worked out from the record.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

Names = Literal["synced", "all", "newest", "all but the oldest"]
Data = Literal["synced", "sizes", "newest", "all"]

# A path below the root: the bytes of a file, or None for a folder.
Tree = Mapping[str, bytes | None]


class Cut(NamedTuple):
    """What a power cut spares of that which was not synced: changes of names, and bytes of files.

    `sizes`: the files have their sizes, and zeros where they were not synced; `newest`: what was done last
    is there, and what was done before it is not.
    """

    names: Names
    data: Data


FORGETS_ALL = Cut("synced", "synced")
CUTS = (
    FORGETS_ALL,
    Cut("all", "synced"),
    Cut("all", "sizes"),
    Cut("synced", "all"),
    Cut("newest", "synced"),
    Cut("newest", "all"),
    Cut("all but the oldest", "synced"),
    Cut("synced", "newest"),
    Cut("all", "newest"),
)


class KilledError(Exception):
    """Ends what is recorded, as the end of its process would."""


class Event(NamedTuple):
    """A call that changed something: a file or a folder by its number, and what became of it."""

    call: Literal["create", "mkdir", "write", "truncate", "sync", "rename", "unlink"]
    node: int
    name: str = ""
    child: int = -1
    new_name: str = ""
    at: int = 0
    data: bytes = b""


@dataclass
class _File:
    """The bytes that a file has, and those that it had when it was synced."""

    now: bytes = b""
    synced: bytes = b""

    def write(self, at: int, data: bytes) -> None:
        before = self.now.ljust(at, b"\0")
        self.now = before[:at] + data + before[at + len(data) :]

    def left(self, data: Data, newest: bool) -> bytes:
        if data == "all" or (data == "newest" and newest):
            return self.now
        if data == "sizes":
            return self.synced[: len(self.now)].ljust(len(self.now), b"\0")
        return self.synced


@dataclass
class _Folder:
    """The names that a folder had when it was synced, and what has become of them since, one by one."""

    synced: dict[str, int] = field(default_factory=dict)
    since: list[dict[str, int | None]] = field(default_factory=list)

    def left(self, names: Names) -> dict[str, int]:
        of = {
            "synced": [],
            "all": self.since,
            "newest": self.since[-1:],
            "all but the oldest": self.since[1:],
        }
        held: dict[str, int | None] = {**self.synced}
        for change in of[names]:
            held |= change
        return {name: node for name, node in held.items() if node is not None}


class _Disk:
    """All files and folders, as far as they are known after so many events."""

    def __init__(self, folders: Mapping[int, Mapping[str, int]], files: Mapping[int, bytes]) -> None:
        self.folders = {node: _Folder(dict(names)) for node, names in folders.items()}
        self.files = {node: _File(data, data) for node, data in files.items()}
        self._newest = -1

    def do(self, event: Event) -> None:
        node = event.node
        match event.call:
            case "create":
                self.files[event.child] = _File()
                self.folders[node].since.append({event.name: event.child})
            case "mkdir":
                self.folders[event.child] = _Folder()
                self.folders[node].since.append({event.name: event.child})
            case "rename":
                moved = self.folders[node].left("all")[event.name]
                self.folders[node].since.append({event.name: None, event.new_name: moved})
            case "unlink":
                self.folders[node].since.append({event.name: None})
            case "write":
                self.files[node].write(event.at, event.data)
                self._newest = node
            case "truncate":
                self.files[node].now = self.files[node].now[: event.at].ljust(event.at, b"\0")
                self._newest = node
            case "sync" if node in self.folders:
                self.folders[node] = _Folder(self.folders[node].left("all"))
            case "sync":
                self.files[node].synced = self.files[node].now

    def left(self, cut: Cut) -> Tree:
        """Return what a power cut leaves."""
        tree: dict[str, bytes | None] = {}

        def walk(node: int, path: str) -> None:
            if node in self.files:
                tree[path] = self.files[node].left(cut.data, node == self._newest)
                return
            if path:
                tree[path] = None
            for name, below in self.folders[node].left(cut.names).items():
                walk(below, f"{path}/{name}" if path else name)

        walk(0, "")
        return tree

    def torn(self, event: Event) -> Iterator[tuple[str, Tree]]:
        """Yield what is left when the power goes while a line or a small file is written: a part of it."""
        file = self.files[event.node]
        if event.call != "write" or event.at != len(file.now):
            return
        whole, half = file.now, len(event.data) // 2
        parts = {
            "one byte": event.data[:1],
            "half": event.data[:half],
            "all but a byte": event.data[:-1],
            "the second half": bytes(half) + event.data[half:],
        }
        newest, self._newest = self._newest, event.node
        for text, part in parts.items():
            file.now = whole + part
            for names in ("synced", "all"):
                yield f"{text}, names {names}", self.left(Cut(names, "newest"))
        file.now, self._newest = whole, newest


class Record:
    """The calls that change a folder and what is below it, from now on and until `patch` is undone.

    What is there now counts as synced. Nothing is synced in earnest, to be fast. When `ends_after` so many
    calls were made, the next one raises KilledError, and so does every later one.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self.ends_after = -1
        self._lock = threading.RLock()
        self._nodes: dict[tuple[int, int], int] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._files: dict[int, bytes] = {}
        self._count = 0
        self._find(root)
        for name in ("open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "rename", "unlink"):
            patch.setattr(os, name, self._recorded(getattr(self, f"_{name}"), getattr(os, name)))
        if full_sync := getattr(fcntl, "F_FULLFSYNC", None):  # what `sync` asks for on macOS
            control = fcntl.fcntl

            def controlled(fd: int, command: int, *given: Any) -> Any:
                return os.fsync(fd) if command == full_sync else control(fd, command, *given)

            patch.setattr(fcntl, "fcntl", controlled)

    def _find(self, path: Path) -> int:
        node = self._known(path.lstat())
        if path.is_dir():
            self._folders[node] = {below.name: self._find(below) for below in path.iterdir()}
        else:
            self._files[node] = path.read_bytes()
        return node

    def _known(self, status: os.stat_result) -> int:
        """Return the number of a file or folder that is new; its inode may have been another's before."""
        node, self._count = self._count, self._count + 1
        self._nodes[status.st_dev, status.st_ino] = node
        return node

    def _node(self, status: os.stat_result) -> int | None:
        return self._nodes.get((status.st_dev, status.st_ino))

    def _recorded(self, note: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return note(call, *args, **kwargs)

        return recorded

    def _add(self, event: Event) -> None:
        self.events.append(event)

    def _may(self) -> None:
        """Raise KilledError when it is time."""
        if 0 <= self.ends_after <= len(self.events):
            raise KilledError

    def _home(self, path: Any, dir_fd: int | None) -> tuple[int | None, str]:
        """Return the number of the folder of a path, None if it is none of ours, and the name there."""
        above, name = os.path.split(os.fspath(path))
        try:
            status = Path(above or ".").stat() if dir_fd is None else os.fstat(dir_fd)
        except OSError:
            return None, name
        assert dir_fd is None or not above
        return self._node(status), name

    def _open(self, call: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        folder, name = self._home(path, dir_fd)
        made = folder is not None and flags & os.O_CREAT and not self._there(path, dir_fd)
        if made:
            self._may()
        fd: int = call(path, flags, mode, dir_fd=dir_fd)
        if made:
            assert folder is not None
            self._add(Event("create", folder, name, self._known(os.fstat(fd))))
        assert not flags & os.O_TRUNC or self._node(os.fstat(fd)) is None
        return fd

    def _there(self, path: Any, dir_fd: int | None) -> bool:
        try:
            os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _mkdir(self, call: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        folder, name = self._home(path, dir_fd)
        if folder is not None:
            self._may()
        call(path, mode, dir_fd=dir_fd)
        if folder is not None:
            status = os.stat(path, dir_fd=dir_fd)
            self._add(Event("mkdir", folder, name, self._known(status)))

    def _write(self, call: Any, fd: int, data: Any) -> int:
        node = self._node(os.fstat(fd))
        if node is None:
            return int(call(fd, data))
        self._may()
        count = int(call(fd, data))
        at = os.lseek(fd, 0, os.SEEK_CUR) - count
        self._add(Event("write", node, at=at, data=bytes(memoryview(data)[:count])))
        return count

    def _pwrite(self, call: Any, fd: int, data: Any, at: int) -> int:
        node = self._node(os.fstat(fd))
        if node is None:
            return int(call(fd, data, at))
        self._may()
        count = int(call(fd, data, at))
        self._add(Event("write", node, at=at, data=bytes(memoryview(data)[:count])))
        return count

    def _ftruncate(self, call: Any, fd: int, size: int) -> None:
        node = self._node(os.fstat(fd))
        if node is not None:
            self._may()
        call(fd, size)
        if node is not None:
            self._add(Event("truncate", node, at=size))

    def _fsync(self, call: Any, fd: int) -> None:
        node = self._node(os.fstat(fd))
        if node is not None:
            self._may()
            self._add(Event("sync", node))

    def _rename(
        self, call: Any, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        (source, name), (target, new_name) = self._home(old, src_dir_fd), self._home(new, dst_dir_fd)
        assert source == target
        if source is not None:
            self._may()
        call(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if source is not None:
            self._add(Event("rename", source, name, new_name=new_name))

    def _unlink(self, call: Any, path: Any, *, dir_fd: int | None = None) -> None:
        folder, name = self._home(path, dir_fd)
        if folder is not None:
            self._may()
        call(path, dir_fd=dir_fd)
        if folder is not None:
            self._add(Event("unlink", folder, name))

    def left(self, cut: Cut = FORGETS_ALL) -> Tree:
        """Return what a power cut leaves when all is done."""
        disk = _Disk(self._folders, self._files)
        for event in self.events:
            disk.do(event)
        return disk.left(cut)

    def states(self, first: int = 0, last: int | None = None) -> Iterator[tuple[str, Tree]]:
        """Yield whatever a power cut may leave while or after any event from the first to the last."""
        disk = _Disk(self._folders, self._files)
        for number, event in enumerate(self.events[:last]):
            if number >= first and event.node in disk.files:
                for text, tree in disk.torn(event):
                    yield f"in event {number}, {event.call}: {text}", tree
            disk.do(event)
            if number >= first:
                for cut in CUTS:
                    text = f"names {cut.names}, data {cut.data}"
                    yield f"after event {number}, {event.call} {event.name}: {text}", disk.left(cut)


def key_of(tree: Tree) -> str:
    """Return what is the same for equal trees."""
    digest = hashlib.sha256()
    for path, data in sorted(tree.items()):
        digest.update(repr((path, None if data is None else len(data))).encode())
        digest.update(data or b"")
    return digest.hexdigest()


def rebuild(tree: Tree, root: Path) -> None:
    """Write a tree into a folder that is empty."""
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def actual(root: Path) -> Tree:
    """Return what lies in a folder."""
    found = sorted(root.rglob("*"))
    return {
        str(path.relative_to(root)): None if stat.S_ISDIR(path.lstat().st_mode) else path.read_bytes()
        for path in found
    }
