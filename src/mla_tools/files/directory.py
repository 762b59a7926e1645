"""A folder that is open: everything in it is reached through its descriptor, and never through a link.

A path can lead elsewhere the next time that it is used, and a name in a folder can be a link to a file of
somebody else. So a folder that is written, or trusted, is opened once; a name in it stands for a regular
file that has no other name, or it is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from mla_tools.errors import MlaToolsError
from mla_tools.files.place import TEMPLATES, Identity, identity_of, leaf_of, shown

__all__ = ["Directory", "longest_name", "partial_name", "sync", "write_all"]

# What the name of a file ends with until the file is complete.
_PARTIAL = ".partial"

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a named pipe would wait for its writer

# Of a name in bytes, where the file system does not say.
_LONGEST_NAME = 255


def partial_name(name: str) -> str:
    """Return the name that a file has until it is complete."""
    return name + _PARTIAL


def longest_name(folder: Path) -> int:
    """Return how many bytes a name in a folder, which need not be there yet, may have."""
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError, ValueError):
            return os.pathconf(path, "PC_NAME_MAX")
    return _LONGEST_NAME


def sync(fd: int) -> None:
    """Return when the bytes of a file are on disk for good."""
    if sys.platform == "darwin":  # there, fsync leaves them in the cache of the drive
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of some bytes at the place of a descriptor; OSError if the disk does not take them."""
    view = memoryview(data)
    while view:  # of what a full disk does not take, write says so only when asked again
        view = view[os.write(fd, view) :]


class Directory:
    """An open folder; OSError if there is none at this path.

    What goes wrong with a file in it is an OSError, and MlaToolsError for a name that is a link, no regular
    file, or not the only name of its file: such a file may be anybody's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the folder; a second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return self.status(name) is not None

    def names(self) -> list[str]:
        """Return the names of all that lies there, in order; a folder of ours as the files in it."""
        names = os.listdir(self._fd)  # noqa: PTH208
        if TEMPLATES in names and (fd := self._templates()) is not None:
            try:
                inner = [f"{TEMPLATES}/{name}" for name in os.listdir(fd)]  # noqa: PTH208
            finally:
                os.close(fd)
            names = [*(name for name in names if name != TEMPLATES), *inner]
        return sorted(names)

    def status(self, name: str) -> os.stat_result | None:
        """Return what the file system says about a name, of a link about itself; None if it is not there."""
        try:
            with self._at(name) as (fd, leaf):
                return os.stat(leaf, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file has such a name
                return None
            raise

    def check(self, name: str) -> None:
        """Raise MlaToolsError if a name stands for something that this tool would never make."""
        status = self.status(name)
        if status is not None:
            self._refuse_strange(name, status)

    def check_free(self, name: str) -> None:
        """Raise MlaToolsError if anything has a name that a file is to get."""
        if name in self:
            path = self.path / shown(name)
            raise MlaToolsError(f"{path} exists already; remove it or choose another place")

    def is_path(self) -> bool:
        """Return whether the path still leads to this folder."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._fd))
        except OSError:
            return False

    def open(self, name: str, *, write: bool = False, append: bool = False) -> int:
        """Return a descriptor of a file that is there."""
        flags = (os.O_RDWR if write or append else os.O_RDONLY) | (os.O_APPEND if append else 0)
        try:
            with self._at(name) as (folder, leaf):
                fd = os.open(leaf, flags | _FLAGS, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise self._strange(name, "is a link") from error
            if error.errno in (errno.EISDIR, errno.ENXIO):
                raise self._strange(name, "is not a regular file") from error
            raise
        try:
            self._refuse_strange(name, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create(self, name: str, *, append: bool = False) -> int:
        """Return a descriptor of a new file; FileExistsError if there is anything by that name."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | (os.O_APPEND if append else 0)
        if name != leaf_of(name):
            with suppress(FileExistsError):
                os.mkdir(TEMPLATES, dir_fd=self._fd)
        with self._at(name) as (folder, leaf):
            return os.open(leaf, flags | _FLAGS, 0o666, dir_fd=folder)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a small file, None if it is not there; MlaToolsError if they are too many."""
        try:
            fd = self.open(name)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(fd).st_size
            if size > limit:
                raise self._strange(name, f"is too large ({size:,} bytes, at most {limit:,})")
            data = b""
            while piece := os.pread(fd, size - len(data), len(data)):
                data += piece
            return data
        finally:
            os.close(fd)

    def write(self, name: str, data: bytes) -> None:
        """Write a new small file, on disk for good but for its name."""
        fd = self.create(name)
        try:
            write_all(fd, data)
            sync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name; MlaToolsError if something has that name already."""
        self.check(old)
        self.check_free(new)
        with self._at(old) as (source, before), self._at(new) as (target, after):
            os.rename(before, after, src_dir_fd=source, dst_dir_fd=target)

    def remove(self, name: str, known: Identity | None = None) -> bool:
        """Remove a file, only if it is the one that is known; return whether it is gone."""
        status = self.status(name)
        if status is None:
            return True
        if known is not None and identity_of(status) != known:
            return False
        self._refuse_strange(name, status)
        with suppress(FileNotFoundError), self._at(name) as (folder, leaf):
            os.unlink(leaf, dir_fd=folder)
        if name != leaf_of(name):
            with suppress(OSError):  # it holds more
                os.rmdir(TEMPLATES, dir_fd=self._fd)
        return True

    def sync(self) -> None:
        """Return when the names in the folder are on disk for good."""
        if (fd := self._templates()) is not None:
            try:
                _sync_names(fd)
            finally:
                os.close(fd)
        _sync_names(self._fd)

    def _templates(self) -> int | None:
        """Return a descriptor of the one folder in which there are files of ours, None if it is no folder."""
        try:
            return os.open(TEMPLATES, os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK):
                return None
            raise

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield a descriptor of the folder in which a file lies, and its name there."""
        leaf = _plain(leaf_of(name))
        if leaf == name:
            yield self._fd, leaf
            return
        fd = self._templates()
        if fd is None:
            status = self.status(TEMPLATES)
            if status is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            link = stat.S_ISLNK(status.st_mode)
            raise self._strange(TEMPLATES, "is a link" if link else "is not a folder")
        try:
            yield fd, leaf
        finally:
            os.close(fd)

    def _refuse_strange(self, name: str, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise self._strange(name, "is a link")
        if not stat.S_ISREG(status.st_mode):
            raise self._strange(name, "is not a regular file")
        if status.st_nlink > 1:
            raise self._strange(name, "has another name too (a hard link)")

    def _strange(self, name: str, what: str) -> MlaToolsError:
        return MlaToolsError(
            f"{self.path / shown(name)} {what}, and this tool writes no such files; remove it, or choose"
            " another folder"
        )


def _sync_names(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is safe there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _plain(name: str) -> str:
    """Return a name that stands for something in a folder, and for nothing above or below it."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise MlaToolsError(f"{shown(name)} is not the plain name of a file")
    return name
