"""What of an unfinished output is on disk for good: a line each time more of it is, each with a checksum.

A line that is damaged or was cut off says nothing, and what it recorded is written again. What a sound line
calls done is compared with the checksums that it gives before anything is built on it.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mla_tools.errors import MlaToolsError
from mla_tools.files.directory import Directory, sync, write_all
from mla_tools.files.parsing import parse_object
from mla_tools.files.writer import Range
from mla_tools.output.record import compact, differences, sha256_hex
from mla_tools.plan import Target

__all__ = [
    "CLEARING",
    "Journal",
    "State",
    "done_line",
    "journals",
    "line_of",
    "lock",
    "other_plan",
    "read_journals",
]

# The journal of each rank, and the one that is there while --overwrite removes what was there before.
_NAME = re.compile(r"mla_tools\.journal-([0-9]{5,9}|clearing)\.jsonl")
CLEARING = "mla_tools.journal-clearing.jsonl"

# Together; the journals of an output of terabytes take a few of these.
_MAX_BYTES = 256 << 20

# Characters of a line that are its checksum: the first of a sha256.
_CHECKSUM = 16

# Differences that are listed before "and so many more".
_LISTED = 12


# By name, the first line of each journal and the others; the first is None if it says nothing.
Journals = dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]]


def journals(folder: Directory) -> list[str]:
    """Return the names of the journals in a folder; none, if it is no output that is being written."""
    return [name for name in folder.names() if _NAME.fullmatch(name)]


def line_of(value: Mapping[str, Any]) -> bytes:
    """Return a line of a journal with its checksum."""
    text = compact(value)
    return sha256_hex(text)[:_CHECKSUM].encode() + b" " + text + b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None if it was damaged or cut off."""
    checksum, _, text = line.partition(b" ")
    if checksum != sha256_hex(text)[:_CHECKSUM].encode():
        return None
    with suppress(ValueError):
        return parse_object(text)[0]
    return None


def read_journals(folder: Directory) -> Journals:
    """Return what the journals in a folder say."""
    found: Journals = {}
    left = _MAX_BYTES
    for name in journals(folder):
        data = folder.read(name, left)
        if data is None:  # its process has just ended it
            continue
        left -= len(data)
        first, *rest = data.split(b"\n")
        lines = [line for line in map(parse_line, rest) if line is not None]
        head = _begun(name, first)
        found[name] = (head, lines) if head is not None else (None, [])
    return found


def _begun(name: str, first: bytes) -> dict[str, Any] | None:
    """Return what a journal began with; None if its first line was damaged, or is another one."""
    found = parse_line(first)
    # Only the journal of a removal says nothing of what was converted.
    return found if found is not None and ("provenance" in found) == (name != CLEARING) else None


class Journal:
    """What is on disk for good, a line each time more of it is; each rank has its own.

    Raises MlaToolsError if it is that of another plan, or of a run that is still active.
    """

    def __init__(self, folder: Directory, rank: int, begun: Mapping[str, Any]) -> None:
        self._folder, self.name = folder, CLEARING.replace("clearing", f"{rank:05d}")
        try:
            self._fd = folder.create(self.name, append=True)
        except FileExistsError:
            self._fd = folder.open(self.name, append=True)
        try:
            lock(folder, self.name, self._fd)
            for first, _ in read_journals(folder).values():
                if first is not None:
                    _refuse_other(folder, first, begun)
            own = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
            # What was cut off stays a line of its own.
            self._torn = bool(own) and not own.endswith(b"\n")
            if _begun(self.name, own.partition(b"\n")[0]) is None:
                os.ftruncate(self._fd, 0)
                self._torn = False
                self.append(begun)
                folder.sync()
        except BaseException:
            self.close()
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, on disk for good; one thread at a time."""
        text = (b"\n" if self._torn else b"") + line_of(line)
        self._torn = True
        write_all(self._fd, text)
        sync(self._fd)
        self._torn = False

    def close(self) -> None:
        """Let go of the journal, for another process to take."""
        os.close(self._fd)


def lock(folder: Directory, name: str, fd: int) -> None:
    """Raise MlaToolsError if another process has the lock of an open journal, or has just removed it."""
    busy = MlaToolsError(f"{folder.path} is being written by another process")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    except OSError:
        return  # some network file systems have no locks
    status = folder.status(name)
    if status is None or not os.path.samestat(os.fstat(fd), status):
        raise busy


def _refuse_other(folder: Directory, first: Mapping[str, Any], begun: Mapping[str, Any]) -> None:
    """Raise MlaToolsError if a journal was begun with another plan, or with a source that has changed."""
    if changed := differences(first.get("provenance"), begun["provenance"]):
        raise other_plan(folder, "was begun with another plan, so it cannot be resumed", changed)
    # Times and inodes say nothing about a copy that another machine reads.
    if first.get("host") == begun["host"] and (changed := differences(first.get("seen"), begun["seen"])):
        what = "was begun with another source, so it cannot be resumed; files of it were changed or replaced"
        raise other_plan(folder, what, changed)


def other_plan(folder: Directory, what: str, changed: Sequence[str]) -> MlaToolsError:
    """Return the error for an output that cannot be resumed, with the first of what is different."""
    more = [f"and {len(changed) - _LISTED} more"] if len(changed) > _LISTED else []
    lines = "\n  ".join([*changed[:_LISTED], *more])
    return MlaToolsError(
        f"{folder.path} {what}:\n  {lines}\n  Start again with --overwrite, or use the original source and"
        f" options."
    )


@dataclass
class State:
    """What the journals of a folder say is done.

    `done`: number of a target -> the ranges of each of its stored tensors, with their checksums;
    `sealed`: complete files with their sha256.
    """

    done: dict[int, tuple[tuple[Range, ...], ...]] = field(default_factory=dict)
    sealed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, journals: Journals) -> State:
        """Return what all journals of a folder say together."""
        state = cls()
        for _, lines in journals.values():
            for line in lines:
                match line:
                    case {"done": [*entries]}:
                        state.done |= dict(_entries(entries))
                    case {"file": str(name), "sha256": str(digest)}:
                        state.sealed[name] = digest
        return state

    def kept(self, targets: Sequence[Target]) -> dict[int, dict[str, tuple[Range, ...]]]:
        """Return, for each target that is whole, the ranges of its stored tensors by name."""
        kept = {}
        for number, held in self.done.items():
            stored = targets[number].stored() if 0 <= number < len(targets) else {}
            sizes = [spec.nbytes for spec in stored.values()]
            if len(sizes) == len(held) and all(map(_tile, held, sizes)):
                kept[number] = dict(zip(stored, held, strict=True))
        return kept


def _entries(values: Iterable[object]) -> Iterator[tuple[int, tuple[tuple[Range, ...], ...]]]:
    """Yield what a line says of each target, without what has another shape than it should."""
    for value in values:
        match value:
            case [int(number), [*tensors]]:
                held = [_ranges(ranges) for ranges in tensors]
                if None not in held:
                    yield number, tuple(ranges for ranges in held if ranges is not None)


def _ranges(values: object) -> tuple[Range, ...] | None:
    found = []
    for value in values if isinstance(values, list) else [None]:
        match value:
            case [int(start), int(end), int(checksum)] if 0 <= start < end:
                found.append((start, end, checksum))
            case _:
                return None
    return tuple(found)


def _tile(ranges: Sequence[Range], nbytes: int) -> bool:
    """Return whether ranges are all bytes of a tensor, each once."""
    reached = 0
    for start, end, _ in ranges:
        if start != reached:
            return False
        reached = end
    return reached == nbytes


def done_line(targets: Iterable[tuple[int, Iterable[Sequence[Range]]]]) -> dict[str, Any]:
    """Return the line that calls targets done, each with the ranges of its stored tensors."""
    return {"done": [[number, [list(map(list, ranges)) for ranges in held]] for number, held in targets]}
