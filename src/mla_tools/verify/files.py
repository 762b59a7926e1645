"""The files of an output, compared with its record: the same bytes, nothing gone, nothing more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.directory import Directory
from mla_tools.files.place import Folder, OpenFile, pieces, read_whole, shown
from mla_tools.output import RECORD, Record, journals
from mla_tools.output.record import MAX_RECORD
from mla_tools.verify.tokenizer import NO_TOKENIZER, has_tokenizer

__all__ = ["Verified", "verify_output"]

AGAIN = "Convert again, or copy the file again from an intact copy."

_WEIGHTS = ".safetensors"

# What people and systems put beside a model, and no reader of models opens.
_DOCUMENTS = ("README", "LICENSE", "NOTICE")
_PICTURES = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg")
_OPENED = (_WEIGHTS, ".py", ".json", ".jinja")  # a reader that looks for these may find hidden ones


@dataclass(frozen=True)
class Verified:
    """An unchanged output: its files, their bytes, and what else is in the folder."""

    files: int
    nbytes: int
    notes: tuple[str, ...]


def verify_output(
    path: Path, *, quick: bool = False, progress: Callable[[int], None] = lambda nbytes: None
) -> Verified:
    """Return what an output is, if all of its files are unchanged.

    Headers and index are read, sizes and the sha256 of every file compared with mla_tools.json; `quick`
    leaves out the sha256 of the weight files, but not that of their headers. Anything else in the folder that
    a reader could open is a problem. `progress` is called with the number of bytes just read. Raises
    CheckpointError that lists everything that differs, and MlaToolsError for a folder that is no output of
    this tool.
    """
    folder = Folder(path)
    record = _record(folder)
    problems = []
    total = 0
    there = frozenset(folder.names())
    for name, (nbytes, _) in sorted(record.files.items()):
        total += nbytes
        problem = _file_problem(folder, there, record, name, quick)
        if problem is not None:
            problems.append(problem)
        progress(nbytes)
    if not problems:  # what else is wrong follows from that
        try:
            problems += open_checkpoint(folder).problems
        except CheckpointError as error:
            problems += error.problems
    strays, notes = _beside(folder, record)
    if problems or strays:
        found = CheckpointError([*problems, *strays])
        if not problems:
            found.add_note(f"All {len(record.files)} files of the conversion are unchanged.")
        for note in notes:
            found.add_note(note)
        raise found
    if not has_tokenizer(record.files):
        notes = (*notes, NO_TOKENIZER)
    return Verified(len(record.files), total, notes)


def _record(folder: Folder) -> Record:
    """Return the sound record of a folder; CheckpointError or MlaToolsError without one."""
    there = folder.names()
    try:
        with Directory(folder.path) as opened:
            unfinished = bool(journals(opened))
    except OSError as error:
        raise MlaToolsError(f"{folder} cannot be read: {error.strerror}") from error
    if unfinished:
        raise MlaToolsError(
            f"{folder} is unfinished: finish it with mla-sanitize convert --resume, with its original options"
        )
    if RECORD not in there:
        raise MlaToolsError(
            f"{folder} holds no {RECORD}, so there is nothing to compare it with: it is not a complete"
            f" output of this tool. mla-sanitize inspect accepts any checkpoint."
        )
    try:
        return Record.parse(read_whole(folder.file(RECORD), MAX_RECORD))
    except ValueError as error:
        raise MlaToolsError(
            f"{RECORD} in {folder} {error}, so there is nothing to compare it with. Convert again, to another"
            " folder."
        ) from error


def _beside(folder: Folder, record: Record) -> tuple[list[Problem], tuple[str, ...]]:
    """Return problems and notes on what lies in a folder and is not of the conversion."""
    problems, notes = [], []
    for name in sorted([*folder.names(), *folder.others()]):
        if name in record.files or name == RECORD:
            continue
        if _is_beside(name):
            notes.append(f"{shown(name)} was not written by the conversion")
        else:
            loads = fnmatchcase(name, f"model*{_WEIGHTS}")  # whatever the index says
            what = "was not written by the conversion" + (", and mlx-lm would load it" if loads else "")
            problems.append(
                Problem(
                    shown(name),
                    what,
                    cause="A model loader may open it: remove it, or move it elsewhere.",
                )
            )
    return problems, tuple(notes)


def _is_beside(name: str) -> bool:
    """Return whether a file is of a kind that no reader of models opens."""
    suffix = Path(name).suffix
    if name.startswith("."):
        return not name.endswith(_OPENED)
    return suffix in _PICTURES or (name.startswith(_DOCUMENTS) and suffix in ("", ".txt"))


def _file_problem(
    folder: Folder, there: Collection[str], record: Record, name: str, quick: bool
) -> Problem | None:
    """Return in what a file is not what it was, or None; `there` are the names in the folder."""
    nbytes, sha256 = record.files[name]
    kind = folder.kind(name) if name in there else "gone"
    if kind == "gone":
        return Problem(shown(name), "is missing", cause=AGAIN)
    if kind == "link":
        return Problem(shown(name), "is a link out of the folder", cause=AGAIN)
    try:
        opened = folder.file(name).open()
    except CheckpointError as error:
        return error.problems[0]
    try:
        if opened.size != nbytes:
            found = f"{opened.size:,} bytes"
            return Problem(shown(name), "has another size", f"{nbytes:,} bytes", found, AGAIN)
        header = record.header_digest(name)
        if header is not None and (found := _header_digest(opened)) != header:
            return Problem(shown(name), "has another header", f"sha256 {header}", found, AGAIN)
        if quick and header is not None:
            return None
        if (found := _digest(opened, nbytes)) != sha256:
            return Problem(shown(name), "was changed since it was written", f"sha256 {sha256}", found, AGAIN)
    except CheckpointError as error:
        return error.problems[0]
    finally:
        opened.close()
    return None


def _header_digest(opened: OpenFile) -> str:
    """Return the sha256 of the header of a weight file, its length included, or of what stands there."""
    length = int.from_bytes(opened.read(0, min(8, opened.size)).tobytes(), "little")
    return _digest(opened, min(8 + length, opened.size))


def _digest(opened: OpenFile, nbytes: int) -> str:
    """Return the sha256 of the first bytes of a file."""
    digest = hashlib.sha256()
    for piece in pieces(opened, nbytes):
        digest.update(piece)
    return digest.hexdigest()
