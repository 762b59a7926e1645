"""Reads of ranges of files, from any thread, with few files open at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from mla_tools.errors import MlaToolsError
from mla_tools.files.place import Bytes, File, OpenFile, as_file, shown

__all__ = ["Reader"]


class _Used:
    """An open file of a Reader, and how many reads use it now."""

    __slots__ = ("opened", "users")

    def __init__(self, opened: OpenFile) -> None:
        self.opened, self.users = opened, 0


class Reader:
    """Reads ranges of files from any thread; keeps the `limit` files used last open."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._files: OrderedDict[File, _Used] = OrderedDict()
        self._closed = False

    def read(
        self, file: File | str | os.PathLike[str], offset: int, nbytes: int, into: Bytes | None = None
    ) -> Bytes:
        """Return `nbytes` bytes from byte `offset` of a file, in a buffer of that size if one is given.

        Raises CheckpointError if the file ends before.
        """
        with self._use(as_file(file)) as opened:
            return opened.read(offset, nbytes, into)

    def close(self) -> None:
        """Close every file; reads that are under way end first, later ones are refused."""
        with self._lock:
            self._closed, self._limit = True, 0
            self._trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _use(self, file: File) -> Iterator[OpenFile]:
        with self._lock:
            if self._closed:
                raise MlaToolsError(f"{shown(file.name)} cannot be read: the reader is closed")
            used = self._files.get(file)
            if used is None:
                used = self._files[file] = _Used(file.open())
            else:
                self._files.move_to_end(file)
            used.users += 1
            self._trim()
        try:
            yield used.opened
        finally:
            with self._lock:
                used.users -= 1
                self._trim()

    def _trim(self) -> None:
        # A file in use stays open: its descriptor, once closed, could be given to another file.
        excess = len(self._files) - self._limit
        if excess > 0:
            idle = [file for file, used in self._files.items() if not used.users]
            for file in idle[:excess]:
                self._files.pop(file).opened.close()
