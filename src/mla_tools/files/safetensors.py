"""safetensors files: the checked header, reads by range, and a writer whose file has its full size at once.

A file is 8 bytes of header length, a JSON header, and the data without holes. Nothing here trusts the
header: it is checked as a whole before any of its numbers is used, and nothing larger than the file is
ever allocated. Source: the safetensors format description.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mla_tools.errors import CheckpointError, MlaToolsError, Problem, clipped
from mla_tools.files.place import AGAIN, Bytes, File, OpenFile, as_file, shown
from mla_tools.spec import DType, Spec

__all__ = [
    "Entry",
    "Header",
    "Layout",
    "NotJsonError",
    "Reader",
    "Writer",
    "layout",
    "parse_object",
    "read_header",
]

METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER = 100_000_000  # what the safetensors library accepts
_MAX_NAME = 4096
_MAX_AXES = 64  # numpy's limit; it also bounds the work that a product of the axes can make
_MAX_NUMBER = 1 << 63
_MAX_PROBLEMS = 10_000
_HASHED_AT_ONCE = 1 << 20
_MAX_TRANSFER = 1 << 30  # macOS refuses a single write of 2 GiB and more

_KEYS = {"dtype", "shape", "data_offsets"}
_DTYPES = DType.__members__
_INT = {int}  # compared with type(), because a bool is an int to isinstance
# Control characters would garble a terminal, and surrogates cannot be encoded at all.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor of a file; `offset` counts from the start of the file."""

    spec: Spec
    offset: int


@dataclass(frozen=True)
class Header:
    """The checked header of one file: what it holds and where.

    `size` is that of the file in bytes, `digest` the sha256 of the header's JSON as it stands there, in hex.
    """

    file: File
    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int
    digest: str


def read_header(file: File | str | os.PathLike[str]) -> Header:
    """Return the header of a safetensors file, after checking all of it against the file's size.

    Raises CheckpointError with every problem of the file. No tensor data is read.
    """
    source = as_file(file)
    name = shown(source.name)
    opened = source.open()
    try:
        size = opened.size
        raw = _read_raw_header(opened, name)
    finally:
        opened.close()
    try:
        if not raw.startswith(b"{"):
            raise ValueError("does not start with '{'")
        table, twice = parse_object(raw)
    except ValueError as error:
        problem = Problem(name, f"is not a safetensors file: its header {error}", cause=AGAIN)
        raise CheckpointError([problem]) from error
    problems = [Problem(name, f"the header has the key {shown(key)} twice", cause=AGAIN) for key in twice]
    # mx.save_safetensors writes null where it is given no metadata.
    metadata = table.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    entries = _check_entries(table, name, _LENGTH_BYTES + len(raw), size, problems)
    if type(metadata) is not dict or not all(map(_is_text, [*metadata, *metadata.values()])):
        found = clipped(metadata)
        problems.append(Problem(name, f"{METADATA} is not an object of strings", found=found, cause=AGAIN))
    if problems:
        if len(problems) > _MAX_PROBLEMS:
            more = f"has {len(problems) - _MAX_PROBLEMS:,} more problems than are listed here"
            problems[_MAX_PROBLEMS:] = [Problem(name, more)]
        raise CheckpointError(problems)
    return Header(source, entries, metadata, size, hashlib.sha256(raw).hexdigest())


def _read_raw_header(opened: OpenFile, file: str) -> bytes:
    """Return the bytes of the JSON header; its length is compared with the file's size first."""
    size = opened.size
    head = opened.read(0, min(64, size)).tobytes()
    problem = None
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if head.startswith(b"version https://git-lfs"):
        problem = Problem(
            file,
            "is a Git LFS pointer, not the weights",
            cause='Run "git lfs pull" in the folder, or download the file with "hf download".',
        )
    elif len(head) < _LENGTH_BYTES:
        problem = Problem(
            file,
            "is too short to be a safetensors file",
            needed="8 bytes that give the length of the header",
            found=f"{size} bytes",
            cause=AGAIN,
        )
    elif not 2 <= length <= _MAX_HEADER:
        problem = Problem(
            file,
            "is not a safetensors file: it does not start with the length of a header",
            needed=f"a length from 2 to {_MAX_HEADER:,}",
            found=f"{length:,} (the file starts with {head[:16]!r})",
            cause=AGAIN,
        )
    elif _LENGTH_BYTES + length > size:
        problem = Problem(
            file,
            f"is truncated inside its header: {_LENGTH_BYTES + length - size:,} bytes of it are missing",
            needed=f"{_LENGTH_BYTES + length:,} bytes for the header",
            found=f"a file of {size:,} bytes",
            cause=AGAIN,
        )
    if problem:
        raise CheckpointError([problem])
    return opened.read(_LENGTH_BYTES, length).tobytes()


def _check_entries(
    table: dict[str, Any], file: str, start: int, size: int, problems: list[Problem]
) -> dict[str, Entry]:
    """Return the entries of a header table; whatever is wrong with them is appended to `problems`."""
    entries: dict[str, Entry] = {}
    ranges: list[tuple[int, int, str]] = []
    specs: dict[tuple[str, tuple[int, ...]], tuple[Spec, int]] = {}
    whole = not problems  # without every range, what lies between ranges says nothing

    def report(name: str, what: str, needed: str = "", found: object = None) -> None:
        text = "" if found is None else clipped(found)
        problems.append(Problem(shown(name), what, needed, text, f"It is stored in {file}."))

    for name, entry in table.items():
        if fault := _name_fault(name):
            report(name, f"the name of a tensor {fault}")
        if type(entry) is not dict or entry.keys() != _KEYS:
            found = sorted(entry) if type(entry) is dict else entry
            report(name, "its header entry is not that of a tensor", "dtype, shape, data_offsets", found)
            whole = False
            continue
        offsets, dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        placed = type(offsets) is list and list(map(type, offsets)) == [int, int]
        if placed and 0 <= offsets[0] <= offsets[1] < _MAX_NUMBER:
            begin, end = offsets
            ranges.append((begin, end, name))
        else:
            report(name, "data_offsets is not a range", "two whole numbers in order, from 0 up", offsets)
            whole, begin, end = False, -1, -1
        if type(shape) is not list or not _INT.issuperset(map(type, shape)):
            report(name, "the shape is not one of a tensor", "a list of whole numbers", shape)
            continue
        if type(dtype) is not str or dtype not in _DTYPES:
            report(name, "the dtype is unknown", ", ".join(_DTYPES), dtype)
            continue
        key = (dtype, tuple(shape))
        known = specs.get(key)
        if known is None:
            if len(shape) > _MAX_AXES or not all(0 <= axis < _MAX_NUMBER for axis in shape):
                limits = f"at most {_MAX_AXES} axes, each from 0 to 2^63 - 1"
                report(name, "the shape is not one of a tensor", limits, shape)
                continue
            spec = Spec(key[1], _DTYPES[dtype])
            known = specs[key] = spec, spec.nbytes
        spec, nbytes = known
        if end - begin == nbytes:
            entries[name] = Entry(spec, start + begin)
        elif end >= 0:
            report(
                name,
                "the number of bytes does not fit the shape and the dtype",
                f"{_count(nbytes)} bytes for {dtype} {clipped(shape)}",
                end - begin,
            )
    if whole:
        _check_tiling(ranges, file, size - start, problems)
    return entries


def _check_tiling(ranges: list[tuple[int, int, str]], file: str, size: int, problems: list[Problem]) -> None:
    """Append what keeps the ranges from tiling the data of `size` bytes: gaps, overlaps, a wrong end."""
    ranges.sort()
    reached, owner = 0, ""
    for begin, end, name in ranges:
        if begin > reached:
            before = f"after {shown(owner)}" if owner else "at the start of the data"
            problems.append(
                Problem(file, f"{begin - reached:,} bytes {before} belong to no tensor", cause=AGAIN)
            )
        elif begin < reached:
            text = f"the bytes overlap those of {shown(owner)}"
            problems.append(Problem(shown(name), text, cause=f"It is stored in {file}."))
        if end >= reached:
            reached, owner = end, name
    if reached != size:
        if reached > size:
            what = f"is truncated: {reached - size:,} bytes are missing at the end"
        else:
            what = f"is longer than its tensors: {size - reached:,} bytes at the end belong to none"
        needed, found = f"{reached:,} bytes of data", f"{size:,} bytes"
        problems.append(Problem(file, what, needed, found, AGAIN))


def _name_fault(name: str) -> str:
    """Return what is wrong with a tensor's name, or nothing."""
    if not name:
        return "is empty"
    if len(name) > _MAX_NAME:
        return f"has more than {_MAX_NAME} characters"
    # Most names are plain, and isprintable is far cheaper than a search.
    if not name.isprintable() and (unfit := _UNFIT.search(name)):
        return f"contains the character {unfit[0]!a}"
    return ""


def _is_text(value: object) -> bool:
    """Return whether a JSON value is a string that can be written again: without lone surrogates."""
    return type(value) is str and not _SURROGATE.search(value)


def _count(number: int) -> str:
    """Return a number with thousands separators, or its order of magnitude when it is absurd."""
    return f"{number:,}" if number < _MAX_NUMBER else f"about 2^{number.bit_length() - 1}"


class NotJsonError(ValueError):
    """A file holds a number that Python reads and writes, and that JSON does not have."""


def parse_object(data: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON object in `data`, and every key that some object in it has more than once.

    Raises ValueError with the end of a sentence ("is not JSON: …") when there is no object, and its
    NotJsonError for NaN, for infinity, and for a number that is too large to be read as anything else.
    """
    twice: list[str] = []

    def gather(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

    try:
        value = json.loads(
            data.decode(), object_pairs_hook=gather, parse_float=_finite, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start:,})") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except NotJsonError:
        raise
    except ValueError as error:  # also numbers of thousands of digits
        raise ValueError(f"is not JSON: {error}") from error
    if type(value) is not dict:
        raise ValueError("is not a JSON object")
    return value, twice


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise NotJsonError(f"holds the number {shown(text)}, which is read as infinity")
    return number


def _refuse_constant(text: str) -> float:
    raise NotJsonError(f"is not JSON: it holds {text}, and JSON has no such number")


@dataclass(frozen=True)
class Layout:
    """The header of a file to be written, and where each tensor lies in it (bytes from the file's start)."""

    header: bytes
    offsets: dict[str, int]
    nbytes: dict[str, int]
    size: int


def layout(tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> Layout:
    """Return the layout of a file that holds `tensors`; the same tensors always give the same bytes.

    Wide dtypes come first, then names in order, and the data starts at a multiple of 8, so that every
    tensor lies at a multiple of its dtype's width. Raises MlaToolsError for a name that a header cannot
    hold and for a header beyond what the safetensors library opens.
    """
    table: dict[str, object] = {}
    if metadata:
        table[METADATA] = dict(sorted(metadata.items()))
    relative, nbytes, reached = {}, {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.nbytes, name)):
        fault = "is reserved" if name == METADATA else _name_fault(name)
        if fault:
            raise MlaToolsError(f"{shown(name)}: the name of a tensor {fault}, so it cannot be written")
        spec = tensors[name]
        relative[name], nbytes[name] = reached, spec.nbytes
        reached += nbytes[name]
        offsets = [relative[name], reached]
        table[name] = {"dtype": spec.dtype.name, "shape": list(spec.shape), "data_offsets": offsets}
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise MlaToolsError(f"the metadata of a file holds text that is not Unicode: {error}") from error
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER:
        raise MlaToolsError(
            f"a file of {len(tensors):,} tensors needs a header of {len(text):,} bytes, and readers accept "
            f"{_MAX_HEADER:,}; write smaller files"
        )
    start = _LENGTH_BYTES + len(text)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return Layout(
        header, {name: start + offset for name, offset in relative.items()}, nbytes, start + reached
    )


class Writer:
    """A safetensors file that has its full size from the start and is filled in any order, by any thread.

    The bytes go to `<path>.partial`, which takes the final name in `finish`, when every byte of every
    tensor was written exactly once. A partial file that an earlier run left is replaced, unless `done`
    names the tensors that it holds already: then it is gone on with. Leaving the context without `finish`
    removes the partial file; `suspend` keeps it. Raises MlaToolsError, also for a full disk.
    """

    def __init__(
        self, path: str | os.PathLike[str], layout: Layout, done: Collection[str] | None = None
    ) -> None:
        self.path = Path(path)
        self.partial = partial_path(self.path)
        self._layout = layout
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in layout.offsets}
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
        self._refuse_existing()
        try:
            if done is None:
                self._start()
            else:
                self._go_on(done)
        except OSError as error:
            # What an earlier run wrote must not go, because it could not be opened once.
            (self.abort if done is None else self.suspend)()
            raise self._failed(error) from error

    def _start(self) -> None:
        # A new file, not the old one emptied: a run that still writes the old one must not hit ours.
        self.partial.unlink(missing_ok=True)
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._fd, self._layout.size)
        self._write_at(memoryview(self._layout.header), 0)

    def _go_on(self, done: Collection[str]) -> None:
        advice = "start again with --overwrite"
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MlaToolsError(f"{self.partial} is gone, so it cannot be gone on with; {advice}") from error
        header = self._layout.header
        if os.fstat(self._fd).st_size != self._layout.size or os.pread(self._fd, len(header), 0) != header:
            self.suspend()
            raise MlaToolsError(f"{self.partial} is not the file that was begun; {advice}")
        for name in done:
            self._note(name, 0, self._layout.nbytes[name])

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
            self._write_at(view.cast("B"), self._layout.offsets[name] + start)
            with self._idle:
                self._note(name, start, end)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _note(self, name: str, start: int, end: int) -> None:
        if start < end:
            self._ranges[name].append((start, end))
            self._left[name] -= end - start

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
            self.partial.rename(self.path)
            self._close()
            sync_folder(self.path.parent)
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
        """Close the file and leave what is written of it, to be gone on with."""
        self._stop_writes()
        if self._fd >= 0:
            with suppress(OSError):
                self._close()

    def abort(self) -> None:
        """Remove the partial file, after the writes that are under way; nothing happens after `finish`."""
        self._stop_writes()
        if self._fd >= 0:
            with suppress(OSError):
                if self._is_ours():
                    self.partial.unlink()
            with suppress(OSError):
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            for start, end in sorted(ranges):
                if start > reached:
                    faults.append(f"{shown(name)}: bytes {reached}..{start} were not written")
                elif start < reached:
                    faults.append(f"{shown(name)}: bytes {start}..{min(reached, end)} were written twice")
                reached = max(reached, end)
            if reached < (nbytes := self._layout.nbytes[name]):
                faults.append(f"{shown(name)}: bytes {reached}..{nbytes} were not written")
        return faults

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise MlaToolsError(f"{self.path} exists already; remove it or choose another place")

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self.partial.lstat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _failed(self, error: OSError) -> MlaToolsError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = f"it needs {self._layout.size:,} bytes; free some space or choose another disk"
        else:
            advice = "check the folder, its permissions and the disk"
        return MlaToolsError(f"{self.path} cannot be written: {error.strerror}; {advice}")


def partial_path(path: Path) -> Path:
    """Return where the bytes of a file go until it is complete."""
    return path.with_name(path.name + ".partial")


def sync(fd: int) -> None:
    """Return when the bytes of a file are on disk for good."""
    if sys.platform == "darwin":  # there, fsync leaves them in the cache of the drive
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk for good."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is safe there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sha256_of(fd: int) -> str:
    """Return the sha256 of an open file in hexadecimal."""
    digest = _Digest()
    digest.update(fd, os.fstat(fd).st_size)
    return digest.hexdigest()


class _Digest:
    """The sha256 of a file as far as it was read."""

    def __init__(self) -> None:
        self._sha256, self._reached = hashlib.sha256(), 0

    def update(self, fd: int, end: int) -> None:
        """Go on to byte `end`, or to the end of the file; nothing if that was reached before."""
        buffer = memoryview(bytearray(min(_HASHED_AT_ONCE, max(0, end - self._reached))))
        while count := os.preadv(fd, [buffer[: end - self._reached]], self._reached):
            self._sha256.update(buffer[:count])
            self._reached += count

    def hexdigest(self) -> str:
        """Return the sha256 in hexadecimal."""
        return self._sha256.hexdigest()


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
