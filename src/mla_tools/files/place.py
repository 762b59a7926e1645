"""Where the files of a checkpoint lie: a folder here, or a repository that is read by ranges of bytes.

All that reads checkpoints goes through `File` and `Place`, so that a folder and a repository are checked by
the same code. The folder is here, the repository in `hub`.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mla_tools.errors import CheckpointError, Problem

__all__ = [
    "AGAIN",
    "Bytes",
    "File",
    "Folder",
    "LocalFile",
    "OpenFile",
    "Place",
    "as_file",
    "copy",
    "cut_short",
    "read_whole",
    "shown",
]

AGAIN = "Download the file again; an interrupted download leaves files like this."

Bytes = NDArray[np.uint8]
Kind = Literal["file", "link", "folder", "gone", "other"]

_MAX_TRANSFER = 1 << 30  # macOS refuses a single read of 2 GiB and more
_COPIED_AT_ONCE = 8 << 20


class OpenFile(Protocol):
    """A file that is being read; any thread may read, and nothing is read after `close`."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, nbytes: int, into: Bytes | None = None) -> Bytes:
        """Return a range of bytes, in `into` if that is given; CheckpointError if the file ends before."""

    def close(self) -> None: ...


class File(Protocol):
    """One file of a checkpoint, as a value that can be hashed and compared."""

    @property
    def name(self) -> str: ...

    def open(self) -> OpenFile:
        """Raises CheckpointError if it is not there or no regular file."""


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
        """Return the plain names of what lies there, in order, without hidden files."""

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
    """A file of this machine."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> OpenFile:
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise CheckpointError([_unreadable(self.name, error)]) from error
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return _OpenLocalFile(self.name, fd, status.st_size)
        os.close(fd)
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError([Problem(shown(self.name), "is not a regular file", found=found)])


class _OpenLocalFile:
    __slots__ = ("_fd", "_name", "size")

    def __init__(self, name: str, fd: int, size: int) -> None:
        self._name, self._fd, self.size = name, fd, size

    def read(self, offset: int, nbytes: int, into: Bytes | None = None) -> Bytes:
        check_range(self._name, offset, nbytes, self.size)
        data = np.empty(nbytes, np.uint8) if into is None else into
        view, done = data.data, 0
        while done < nbytes:
            try:
                count = os.preadv(self._fd, [view[done : done + _MAX_TRANSFER]], offset + done)
            except OSError as error:
                raise CheckpointError([_unreadable(self._name, error)]) from error
            if count == 0:
                raise CheckpointError([cut_short(self._name, offset, nbytes, offset + done)])
            done += count
        return data

    def close(self) -> None:
        os.close(self._fd)


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
            return sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            problem = Problem(str(self), "there is no such folder", cause="Check the path.")
        except NotADirectoryError:
            cause = "Give the folder that holds config.json and the weights."
            problem = Problem(str(self), "is not a folder", cause=cause)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            problem = Problem(shown(str(self)), "cannot be read", found=text or type(error).__name__)
        raise CheckpointError([problem])

    def kind(self, name: str) -> Kind:
        path = self.path / name
        if path.is_file():
            return "link" if path.is_symlink() and self._leads_out(path) else "file"
        if path.is_dir():
            return "folder"
        return "gone" if path.is_symlink() and not path.exists() else "other"

    def _leads_out(self, path: Path) -> bool:
        """Return whether a link leads out of the folder, other than to the blobs of a hub cache."""
        folder, target = self.path.resolve(), path.resolve()
        homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
        return not any(target.is_relative_to(home) for home in homes)

    def file(self, name: str) -> File:
        return LocalFile(self.path / name)

    def tag(self, name: str) -> str:
        return ""

    def stop(self) -> None:
        pass


def as_file(file: File | str | os.PathLike[str]) -> File:
    """Return a path as the file that it names, and a file as it is."""
    return LocalFile(Path(file)) if isinstance(file, (str, os.PathLike)) else file


def read_whole(file: File, limit: int) -> bytes:
    """Return the bytes of a file of at most `limit` bytes; raises CheckpointError otherwise."""
    opened = file.open()
    try:
        if opened.size > limit:
            needed, found = f"at most {limit:,} bytes", f"{opened.size:,} bytes"
            raise CheckpointError([Problem(shown(file.name), "is too large for what it is", needed, found)])
        return opened.read(0, opened.size).tobytes()
    finally:
        opened.close()


def copy(file: File, path: Path) -> None:
    """Write the bytes of a file to a new one; OSError where it cannot be written."""
    source = file.open()
    try:
        with path.open("xb") as target:
            for offset in range(0, source.size, _COPIED_AT_ONCE):
                target.write(source.read(offset, min(_COPIED_AT_ONCE, source.size - offset)).data)
    finally:
        source.close()


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
        return Problem(file, "is not there", cause="Check the path; a link may lead to a file that is gone.")
    text = error.strerror if isinstance(error, OSError) else str(error)
    cause = "Check the permissions and the disk that holds it."
    return Problem(file, "cannot be read", found=text or type(error).__name__, cause=cause)
