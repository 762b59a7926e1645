"""safetensors files: the checked header, and the layout of a file that is to be written.

A file is 8 bytes of header length, a JSON header, and the data without holes. Nothing here trusts the
header: it is checked as a whole before any of its numbers is used, and nothing larger than the file is
ever allocated. Source: the safetensors format description.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mla_tools.errors import CheckpointError, MlaToolsError, Problem, clipped
from mla_tools.files.parsing import parse_object
from mla_tools.files.place import AGAIN, File, OpenFile, Part, as_file, shown
from mla_tools.spec import DType, Spec

__all__ = [
    "Header",
    "Layout",
    "Stored",
    "layout",
    "read_header",
    "total_bytes",
]

METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER = 100_000_000  # what the safetensors library accepts
_MAX_NAME = 4096
_MAX_AXES = 64  # numpy's limit; it also bounds the work that a product of the axes can make
_MAX_NUMBER = 1 << 63
_MAX_PROBLEMS = 10_000

_KEYS = {"dtype", "shape", "data_offsets"}
_DTYPES = DType.__members__
_INT = {int}  # compared with type(), because a bool is an int to isinstance
# Control characters would garble a terminal, and surrogates cannot be encoded at all.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Stored(NamedTuple):
    """Where one stored tensor lies: its file, and its offset in bytes from the start of that file.

    A tuple, because a checkpoint has half a million of them.
    """

    file: File
    offset: int
    spec: Spec


@dataclass(frozen=True)
class Header:
    """The checked header of one file: what it holds and where.

    `file` opens only while it is what it was; `size` is its size in bytes, `digest` the sha256 of the
    header's JSON as it stands there, in hex.
    """

    file: File
    entries: dict[str, Stored]
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
        digest = hashlib.sha256(raw).hexdigest()
        pinned = opened.pin(Part(_LENGTH_BYTES, len(raw), digest))
    finally:
        opened.close()
    try:
        if not raw.startswith(b"{"):
            raise ValueError("does not start with '{'")
        table, twice = parse_object(raw)
    except ValueError as error:
        problem = Problem(name, f"is not a safetensors file: its header {error}", cause=AGAIN)
        raise CheckpointError([problem]) from error
    problems = [Problem(name, f"the header has a duplicate key: {shown(key)}", cause=AGAIN) for key in twice]
    # mx.save_safetensors writes null where it is given no metadata.
    metadata = table.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    entries = _check_entries(table, pinned, _LENGTH_BYTES + len(raw), size, problems)
    if type(metadata) is not dict or not all(map(_is_text, [*metadata, *metadata.values()])):
        found = clipped(metadata)
        problems.append(Problem(name, f"{METADATA} is not an object of strings", found=found, cause=AGAIN))
    if problems:
        if len(problems) > _MAX_PROBLEMS:
            more = f"has {len(problems) - _MAX_PROBLEMS:,} more problems"
            problems[_MAX_PROBLEMS:] = [Problem(name, more)]
        raise CheckpointError(problems)
    return Header(pinned, entries, metadata, size, digest)


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
    table: dict[str, Any], source: File, start: int, size: int, problems: list[Problem]
) -> dict[str, Stored]:
    """Return the entries of a header table; whatever is wrong with them is appended to `problems`."""
    file = shown(source.name)
    entries: dict[str, Stored] = {}
    specs: dict[tuple[str, tuple[int, ...]], tuple[Spec, int]] = {}
    whole = not problems  # without every range, what lies between ranges says nothing
    new = tuple.__new__  # which is what a NamedTuple calls
    reached = 0  # where the data ends of the entries that follow one another, as most do

    def report(name: str, what: str, needed: str = "", found: object = None) -> None:
        text = "" if found is None else clipped(found)
        problems.append(Problem(shown(name), what, needed, text, f"It is stored in {file}."))

    # Most names are plain, and one look at all of them is far cheaper than a search in each.
    plain = "" not in table and "".join(table).isprintable() and max(map(len, table), default=0) <= _MAX_NAME
    for name, entry in table.items():
        if not plain and (fault := _name_fault(name)):
            report(name, f"the name of a tensor {fault}")
        if type(entry) is not dict or len(entry) != 3 or not _KEYS.issuperset(entry):
            found = sorted(entry) if type(entry) is dict else entry
            report(name, "its header entry does not describe a tensor", "dtype, shape, data_offsets", found)
            whole = False
            continue
        offsets, dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
        if type(begin) is int and type(end) is int and 0 <= begin <= end < _MAX_NUMBER:
            reached = end if begin == reached else -1
        else:
            report(name, "data_offsets is not a range", "two integers in order, 0 or more", offsets)
            whole, begin, end = False, -1, -1
        if type(shape) is not list or not _INT.issuperset(map(type, shape)):
            report(name, "the shape is not valid", "a list of integers", shape)
            continue
        if type(dtype) is not str or dtype not in _DTYPES:
            report(name, "the dtype is unknown", ", ".join(_DTYPES), dtype)
            continue
        key = (dtype, tuple(shape))
        known = specs.get(key)
        if known is None:
            if len(shape) > _MAX_AXES or not all(0 <= axis < _MAX_NUMBER for axis in shape):
                limits = f"at most {_MAX_AXES} axes, each from 0 to 2^63 - 1"
                report(name, "the shape is not valid", limits, shape)
                continue
            spec = Spec(key[1], _DTYPES[dtype])
            known = specs[key] = spec, spec.nbytes
        spec, nbytes = known
        if end - begin == nbytes:
            entries[name] = new(Stored, (source, start + begin, spec))
        elif end >= 0:
            report(
                name,
                "the number of bytes does not fit the shape and the dtype",
                f"{_count(nbytes)} bytes for {dtype} {clipped(shape)}",
                end - begin,
            )
    if whole and reached != size - start:
        ranges = sorted((*entry["data_offsets"], name) for name, entry in table.items())
        _check_tiling(ranges, file, size - start, problems)
    return entries


def _check_tiling(ranges: list[tuple[int, int, str]], file: str, size: int, problems: list[Problem]) -> None:
    """Append what keeps sorted ranges from tiling the data of `size` bytes: gaps, overlaps, a wrong end."""
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
    if unfit := _UNFIT.search(name):
        return f"contains the character {unfit[0]!a}"
    return ""


def _is_text(value: object) -> bool:
    """Return whether a JSON value is a string that can be written again: without lone surrogates."""
    return type(value) is str and not _SURROGATE.search(value)


def _count(number: int) -> str:
    """Return a number with thousands separators, or its order of magnitude when it is absurd."""
    return f"{number:,}" if number < _MAX_NUMBER else f"about 2^{number.bit_length() - 1}"


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


def total_bytes(specs: Iterable[Spec]) -> int:
    """Return the bytes of tensors; most share the spec of thousands of others, which is one object."""
    held = list(specs)
    counts, unlike = Counter(map(id, held)), {id(spec): spec for spec in held}
    return sum(count * unlike[key].nbytes for key, count in counts.items())
