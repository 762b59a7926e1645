"""A safetensors file that has its full size from the start and is filled in any order, by any thread."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from mla_tools.errors import DamagedError, MlaToolsError
from mla_tools.files.directory import Directory, partial_name, sync
from mla_tools.files.place import shown
from mla_tools.files.safetensors import Layout

__all__ = ["Range", "Writer", "sha256_in"]

_READ_AT_ONCE = 1 << 20
_STOPPED_AFTER = 64 << 20
_MAX_TRANSFER = 1 << 30  # macOS refuses a single write of 2 GiB and more

# Bytes of a tensor that were written at once: from, to, and their CRC-32.
Range = tuple[int, int, int]


class Writer:
    """Writes a safetensors file.

    The bytes go to `<path>.partial`, which takes the final name in `finish`, when every byte of every
    tensor was written exactly once. A partial file that an earlier run left is replaced, unless `done`
    gives the ranges of the tensors that it holds already: then these are compared with their checksums,
    and the file is resumed. Leaving the context without `finish` removes the partial file; `suspend` keeps
    it. `folder` is the open folder of the path, if there is one. Raises MlaToolsError, also for a full disk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Layout,
        done: Mapping[str, Sequence[Range]] | None = None,
        folder: Directory | None = None,
    ) -> None:
        self.path = Path(path)
        self._name, self._partial = self.path.name, partial_name(self.path.name)
        self.partial = self.path.with_name(self._partial)
        self._layout = layout
        self._ranges: dict[str, list[Range]] = {name: [] for name in layout.offsets}
        self._left = dict(layout.nbytes)  # bytes of each tensor that are still to come
        self._order = list(layout.offsets)
        self._gapless = 0  # so many tensors of the file are written, from the first one on
        self._digest = _Digest()
        self._idle = threading.Condition()
        self._busy = 0
        self._open = True  # whether `write` is still allowed
        # A file system writes to a file for one thread at a time, and the others would spin meanwhile.
        self._turn = threading.Lock()
        self._fd = -1
        self._own_folder = folder is None
        try:
            self._folder = Directory(self.path.parent) if folder is None else folder
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._refuse_existing()
            if done is None:
                self._start()
            else:
                self._resume(done)
        except OSError as error:
            # What an earlier run wrote must not go, because it could not be opened once.
            (self.abort if done is None else self.suspend)()
            raise self._failed(error) from error
        except BaseException:
            self.suspend()
            raise

    def _start(self) -> None:
        # A new file, not the old one emptied: a run that still writes the old one must not hit ours.
        self._folder.remove(self._partial)
        self._fd = self._folder.create(self._partial)
        self._folder.sync()  # or a power cut would take the name, whatever of the bytes was synced
        os.ftruncate(self._fd, self._layout.size)
        self._write_at(memoryview(self._layout.header), 0)

    def _resume(self, done: Mapping[str, Sequence[Range]]) -> None:
        advice = "start again with --overwrite"
        try:
            self._fd = self._folder.open(self._partial, write=True)
        except FileNotFoundError as error:
            raise DamagedError(f"{self.partial} is gone, so it cannot be resumed; {advice}") from error
        header = self._layout.header
        if os.fstat(self._fd).st_size != self._layout.size or os.pread(self._fd, len(header), 0) != header:
            raise DamagedError(f"{self.partial} is not the file that was begun; {advice}")
        for name, ranges in done.items():
            for start, end, checksum in ranges:
                if self._checksum(self._layout.offsets[name] + start, end - start) != checksum:
                    raise DamagedError(
                        f"{self.partial} is damaged: bytes {start:,} to {end:,} of {shown(name)} have"
                        f" changed since they were written; {advice}"
                    )
                self._note(name, (start, end, checksum))

    def _checksum(self, offset: int, nbytes: int) -> int:
        """Return the CRC-32 of a range of the file."""
        buffer, checksum, done = memoryview(bytearray(min(_READ_AT_ONCE, nbytes))), 0, 0
        while done < nbytes and (count := os.preadv(self._fd, [buffer[: nbytes - done]], offset + done)):
            checksum = zlib.crc32(buffer[:count], checksum)
            done += count
        return checksum

    def write(self, name: str, start: int, data: Any) -> None:
        """Write a contiguous buffer at byte `start` of a tensor; any thread may call this.

        numpy lends no buffer of an ml_dtypes array: pass its `view(np.uint8)`.
        """
        if name not in self._layout.nbytes:
            raise MlaToolsError(f"{shown(name)}: {self.path.name} has no place for this tensor")
        view = memoryview(data)
        end, nbytes = start + view.nbytes, self._layout.nbytes[name]
        if not 0 <= start <= end <= nbytes:
            raise MlaToolsError(f"{shown(name)}: bytes {start}..{end} are outside of its {nbytes} bytes")
        if start == end:
            return
        with self._idle:
            if not self._open:
                raise MlaToolsError(f"{self.path.name} is closed; nothing more can be written to it")
            self._busy += 1
        try:
            held = view.cast("B")
            checksum = zlib.crc32(held)
            self._write_at(held, self._layout.offsets[name] + start)
            with self._idle:
                self._note(name, (start, end, checksum))
        except OSError as error:
            raise self._failed(error) from error
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _note(self, name: str, written: Range) -> None:
        start, end, _ = written
        if start < end:
            self._ranges[name].append(written)
            self._left[name] -= end - start

    def ranges(self, name: str) -> list[Range]:
        """Return what is written of a tensor, in order."""
        with self._idle:
            return sorted(self._ranges[name])

    def hash(self) -> None:
        """Begin with the sha256: hash what has been written from the start of the file without a gap.

        One thread at a time may call this, or `seal`, which then has less left to do.
        """
        while self._gapless < len(self._order) and not self._left[self._order[self._gapless]]:
            self._gapless += 1
        offsets = [*self._layout.offsets.values(), self._layout.size]
        try:
            self._digest.update(self._fd, offsets[self._gapless])
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Return when all that is written so far is on disk for good."""
        try:
            sync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Give the file its final name, on disk for good; refused unless it was written completely.

        After a refusal only `abort` is left.
        """
        self._complete()
        try:
            sync(self._fd)
            self._refuse_existing()
            if not self._is_ours():
                raise MlaToolsError(f"{self.partial} was removed or replaced while it was written")
            self._folder.rename(self._partial, self._name)
            self._folder.sync()
            self._close()
        except OSError as error:
            raise self._failed(error) from error

    def seal(self) -> str:
        """Return the sha256 of the complete file, on disk for good but still under its partial name.

        Refused like `finish`, which it takes the place of where several files become final together.
        """
        self._complete()
        try:
            sync(self._fd)
            self._digest.update(self._fd, self._layout.size)
            if not self._is_ours():
                raise MlaToolsError(f"{self.partial} was removed or replaced while it was written")
            self._close()
        except OSError as error:
            raise self._failed(error) from error
        return self._digest.hexdigest()

    def _complete(self) -> None:
        """End writing, and raise unless every byte was written exactly once."""
        with self._idle:
            if not self._open:
                raise MlaToolsError(f"{self.path.name} is closed already")
        self._stop_writes()
        if faults := self._faults():
            more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
            lines = "\n  ".join(faults[:20])
            raise MlaToolsError(f"{self.path.name} was not written exactly once:\n  {lines}{more}")

    def suspend(self) -> None:
        """Close the file and leave what is written of it, to be resumed."""
        self._stop_writes()
        with suppress(OSError):
            self._close()

    def abort(self) -> None:
        """Remove the partial file, after the writes that are under way; nothing happens after `finish`."""
        self._stop_writes()
        if self._fd >= 0:
            with suppress(OSError):
                if self._is_ours():
                    self._folder.remove(self._partial)
        with suppress(OSError):
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()

    def _stop_writes(self) -> None:
        # A descriptor closed under a write could by then be that of another file.
        with self._idle:
            self._open = False
            self._idle.wait_for(lambda: self._busy == 0)

    def _write_at(self, view: memoryview, offset: int) -> None:
        done = 0
        with self._turn:
            while done < len(view):
                done += os.pwrite(self._fd, view[done : done + _MAX_TRANSFER], offset + done)

    def _faults(self) -> list[str]:
        faults = []
        for name, ranges in self._ranges.items():
            reached = 0
            for start, end, _ in sorted(ranges):
                if start > reached:
                    faults.append(f"{shown(name)}: bytes {reached}..{start} were not written")
                elif start < reached:
                    faults.append(f"{shown(name)}: bytes {start}..{min(reached, end)} were written twice")
                reached = max(reached, end)
            if reached < (nbytes := self._layout.nbytes[name]):
                faults.append(f"{shown(name)}: bytes {reached}..{nbytes} were not written")
        return faults

    def _refuse_existing(self) -> None:
        self._folder.check_free(self._name)

    def _is_ours(self) -> bool:
        status = self._folder.status(self._partial)
        return status is not None and os.path.samestat(os.fstat(self._fd), status)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            if fd >= 0:
                os.close(fd)
        finally:
            if self._own_folder:
                self._folder.close()

    def _failed(self, error: OSError) -> MlaToolsError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = f"it needs {self._layout.size:,} bytes; free some space or choose another disk"
        else:
            advice = "check the folder, its permissions and the disk"
        return MlaToolsError(f"{self.path} cannot be written: {error.strerror}; {advice}")


def sha256_in(folder: Directory, name: str, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the sha256 of a file in a folder in hexadecimal; of a part of it, once it is stopped."""
    digest = _Digest()
    fd = folder.open(name)
    try:
        size = os.fstat(fd).st_size
        for end in range(_STOPPED_AFTER, size + _STOPPED_AFTER, _STOPPED_AFTER):
            if stopped():
                break
            digest.update(fd, min(end, size))
    finally:
        os.close(fd)
    return digest.hexdigest()


class _Digest:
    """The sha256 of a file as far as it was read."""

    def __init__(self) -> None:
        self._sha256, self._reached = hashlib.sha256(), 0

    def update(self, fd: int, end: int) -> None:
        """Continue to byte `end`, or to the end of the file; nothing if that was reached before."""
        buffer = memoryview(bytearray(min(_READ_AT_ONCE, max(0, end - self._reached))))
        while count := os.preadv(fd, [buffer[: end - self._reached]], self._reached):
            self._sha256.update(buffer[:count])
            self._reached += count

    def hexdigest(self) -> str:
        """Return the sha256 in hexadecimal."""
        return self._sha256.hexdigest()
