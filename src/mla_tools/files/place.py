"""Where the files of a checkpoint lie: a folder here, or a repository that is read by ranges of bytes.

All that reads checkpoints goes through `File` and `Place`, so that a folder and a repository are checked by
the same code. The folder is here, the repository in `hub`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from mla_tools.errors import ChangedError, CheckpointError, Problem

__all__ = [
    "AGAIN",
    "TEMPLATES",
    "Bytes",
    "File",
    "Folder",
    "Identity",
    "LocalFile",
    "OpenFile",
    "Part",
    "Place",
    "as_file",
    "cut_short",
    "identity_of",
    "leaf_of",
    "pieces",
    "read_whole",
    "shown",
]

AGAIN = "Download the file again; an interrupted download leaves files like this."

# A buffer of single bytes.
Bytes = memoryview

# The one folder beside the weights whose files belong to a model: transformers reads templates in it.
# A name is that of a file at the top, or of one in it: "additional_chat_templates/tool_use.jinja".
TEMPLATES = "additional_chat_templates"
Kind = Literal["file", "link", "folder", "gone", "other"]

_MAX_TRANSFER = 1 << 30  # macOS refuses a single read of 2 GiB and more

# A hash that a hub gives a file: the sha256 of a large one, the git object id of a small one.
_HASH = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")
_MAX_METADATA = 4096
_PIECE = 8 << 20

# By what a file is known again: device, inode, size and time of its last change.
Identity = tuple[int, int, int, int]


class Part(NamedTuple):
    """Bytes of a file that were read, by what they are known again."""

    offset: int
    nbytes: int
    sha256: str


def leaf_of(name: str) -> str:
    """Return the last component of a name, which is all of it but for files in the one folder."""
    return name.removeprefix(f"{TEMPLATES}/")


def identity_of(status: os.stat_result) -> Identity:
    """Return by what a file is known again."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class OpenFile(Protocol):
    """A file that is being read; any thread may read, and nothing is read after `close`."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, nbytes: int, into: Bytes | None = None) -> Bytes:
        """Return a range of bytes, in `into` if that is given; CheckpointError if the file ends before."""

    def pin(self, part: Part | None = None) -> File:
        """Return the file as one that opens only while it is what it is now, this part of it included."""

    def close(self) -> None: ...


class File(Protocol):
    """One file of a checkpoint, as a value that can be hashed and compared."""

    @property
    def name(self) -> str: ...

    @property
    def stamp(self) -> str:
        """By what a pinned file is known on this machine, and nothing where its content is pinned."""

    def open(self) -> OpenFile:
        """Raises CheckpointError if it is not there, no regular file, or not what was pinned."""


class Place(Protocol):
    """What holds the files of one checkpoint; `str` of it is its name in messages and reports.

    `revision` is the commit of a repository, and empty for a folder. `local` says whether the user can put
    files there; `readers`, how many files are best opened at a time.
    """

    @property
    def local(self) -> bool: ...

    @property
    def readers(self) -> int: ...

    @property
    def revision(self) -> str: ...

    def names(self) -> list[str]:
        """Return the names of what lies there, in order, without hidden files."""

    def others(self) -> list[str]:
        """Return, in order, what else lies there: hidden files, and folders that `names` lacks ("code/")."""

    def kind(self, name: str) -> Kind:
        """Return what lies there by this name; "gone" is a link that leads nowhere, and "link" one to a
        file that is no part of the place."""

    def file(self, name: str) -> File: ...

    def tag(self, name: str) -> str:
        """Return what the place itself says about a file's content (a hash), or nothing."""

    def stop(self) -> None:
        """End reads that wait for a network with an error, and all later ones: nobody wants the answer."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine; pinned, when it is known what it must be."""

    path: Path
    identity: Identity | None = None
    part: Part | None = None
    known: str = ""

    @property
    def name(self) -> str:
        return self.known or self.path.name

    @property
    def stamp(self) -> str:
        if self.identity is None:
            return ""
        _, inode, _, changed = self.identity
        return f"inode {inode}, modified {_moment(changed)}"

    def open(self) -> OpenFile:
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise CheckpointError([_unreadable(self.name, error)]) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
                raise CheckpointError([Problem(shown(self.name), "is not a regular file", found=found)])
            opened = _OpenLocalFile(self, fd, identity_of(status))
            opened.check()
        except BaseException:
            os.close(fd)
            raise
        return opened


class _OpenLocalFile:
    __slots__ = ("_fd", "_file", "_identity")

    def __init__(self, file: LocalFile, fd: int, identity: Identity) -> None:
        self._file, self._fd, self._identity = file, fd, identity

    @property
    def size(self) -> int:
        return self._identity[2]

    def check(self) -> None:
        """Raise CheckpointError if the file is not what was pinned."""
        file = self._file
        if file.identity is None:
            return
        if self._identity != file.identity:
            raise _changed(file, _described(file.identity), _described(self._identity))
        if file.part is not None:
            offset, nbytes, wanted = file.part
            found = hashlib.sha256(self.read(offset, nbytes)).hexdigest()
            if found != wanted:
                raise _changed(file, f"a header with sha256 {wanted}", found)

    def read(self, offset: int, nbytes: int, into: Bytes | None = None) -> Bytes:
        name = self._file.name
        check_range(name, offset, nbytes, self.size)
        data = memoryview(bytearray(nbytes)) if into is None else into
        done = 0
        while done < nbytes:
            try:
                count = os.preadv(self._fd, [data[done : done + _MAX_TRANSFER]], offset + done)
            except OSError as error:
                raise CheckpointError([_unreadable(name, error)]) from error
            if count == 0:
                raise CheckpointError([cut_short(name, offset, nbytes, offset + done)])
            done += count
        return data

    def pin(self, part: Part | None = None) -> File:
        return replace(self._file, identity=self._identity, part=part)

    def close(self) -> None:
        os.close(self._fd)


def _changed(file: LocalFile, needed: str, found: str) -> ChangedError:
    what = "was changed or replaced after the conversion was planned"
    cause = "The output is not complete. Do not change the source, and start again with --overwrite."
    return ChangedError([Problem(shown(file.name), what, needed, found, cause)])


def _described(identity: Identity) -> str:
    _, inode, size, changed = identity
    return f"{size:,} bytes, modified {_moment(changed)}, inode {inode}"


def _moment(nanoseconds: int) -> str:
    """Return a time as people and machines read it, to the nanosecond."""
    try:
        second = datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return f"{nanoseconds} ns"
    return f"{second}.{nanoseconds % 10**9:09d}"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def local(self) -> bool:
        return True

    @property
    def readers(self) -> int:
        return 1  # parsing headers costs more than reading them, and threads do not share it

    @property
    def revision(self) -> str:
        return ""

    def names(self) -> list[str]:
        """Return the names in the folder, without hidden files ("._x" is what macOS adds to archives)."""
        try:
            return sorted(name for name in self._entries() if not name.startswith("."))
        except FileNotFoundError:
            problem = Problem(str(self), "there is no such folder", cause="Check the path.")
        except NotADirectoryError:
            cause = "Give the folder that holds config.json and the weights."
            problem = Problem(str(self), "is not a folder", cause=cause)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            problem = Problem(shown(str(self)), "cannot be read", found=text or type(error).__name__)
        raise CheckpointError([problem])

    def others(self) -> list[str]:
        try:
            return sorted(name for name in self._entries() if name.startswith("."))
        except (OSError, ValueError):
            return []

    def _entries(self) -> list[str]:
        names = {path.name for path in self.path.iterdir()}
        inner = self.path / TEMPLATES
        if TEMPLATES in names and inner.is_dir() and not inner.is_symlink():
            names = names - {TEMPLATES} | {f"{TEMPLATES}/{path.name}" for path in inner.iterdir()}
        return list(names)

    def kind(self, name: str) -> Kind:
        path = self.path / name
        try:
            if path.is_file():
                return "link" if path.is_symlink() and self._leads_out(path) else "file"
            if path.is_dir():
                return "folder"
            return "gone" if path.is_symlink() and not path.exists() else "other"
        except (OSError, RuntimeError):  # a name or a link that the file system cannot follow
            return "other"

    def _leads_out(self, path: Path) -> bool:
        """Return whether a link leads out of the folder, other than to the blobs of a hub cache."""
        folder, target = self.path.resolve(), path.resolve()
        homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
        return not any(target.is_relative_to(home) for home in homes)

    def file(self, name: str) -> File:
        return LocalFile(self.path / name, known=name)

    def tag(self, name: str) -> str:
        """Return the hash that the hub gave when it was asked for the file, where hf keeps it.

        Source: the file names in the folder blobs of a hub cache, and the second line of what
        `hf download --local-dir` notes of each file.
        """
        path = self.path / name
        try:
            target = path.resolve()
            if path.is_symlink() and target.parent.name == "blobs" and _HASH.fullmatch(target.name):
                return target.name
            noted = self.path / ".cache" / "huggingface" / "download" / f"{name}.metadata"
            lines = read_whole(LocalFile(noted), _MAX_METADATA).decode().splitlines()
        except (CheckpointError, OSError, RuntimeError, ValueError):
            return ""
        return lines[1] if len(lines) > 1 and _HASH.fullmatch(lines[1]) else ""

    def stop(self) -> None:
        pass


def as_file(file: File | str | os.PathLike[str]) -> File:
    """Return a path as the file that it names, and a file as it is."""
    return LocalFile(Path(file)) if isinstance(file, (str, os.PathLike)) else file


def pieces(opened: OpenFile, nbytes: int) -> Iterator[Bytes]:
    """Yield the first bytes of an open file, a few megabytes at a time."""
    for offset in range(0, nbytes, _PIECE):
        yield opened.read(offset, min(_PIECE, nbytes - offset))


def read_whole(file: File, limit: int) -> bytes:
    """Return the bytes of a file of at most `limit` bytes; raises CheckpointError otherwise."""
    opened = file.open()
    try:
        if opened.size > limit:
            needed, found = f"at most {limit:,} bytes", f"{opened.size:,} bytes"
            raise CheckpointError([Problem(shown(file.name), "is too large", needed, found)])
        return opened.read(0, opened.size).tobytes()
    finally:
        opened.close()


def check_range(name: str, offset: int, nbytes: int, size: int) -> None:
    """Raise CheckpointError for a range that is not within the `size` bytes of a file."""
    if not (offset >= 0 and nbytes >= 0 and offset + nbytes <= size):
        raise CheckpointError([cut_short(name, offset, nbytes, size)])


def cut_short(name: str, offset: int, nbytes: int, size: int) -> Problem:
    """Return the problem of a file that has `size` bytes and ends before a range that is wanted of it."""
    needed, found = f"bytes {offset:,} to {offset + nbytes:,}", f"{size:,} bytes"
    cause = "It became shorter since its header was read. " + AGAIN
    return Problem(shown(name), "truncated while reading", needed, found, cause)


def shown(name: str) -> str:
    """Return a name as it can stand in a message: itself, or escaped and shortened if it is strange."""
    if name and len(name) <= 256 and name.isprintable():
        return name
    text = ascii(name[:256])
    return text if len(name) <= 256 else f"{text}... ({len(name):,} characters)"


def _unreadable(name: str, error: Exception) -> Problem:
    file = shown(name)
    if isinstance(error, FileNotFoundError):
        return Problem(file, "is not there", cause="Check the path; a link may point to a missing file.")
    text = error.strerror if isinstance(error, OSError) else str(error)
    cause = "Check the permissions and the disk that holds it."
    return Problem(file, "cannot be read", found=text or type(error).__name__, cause=cause)
