"""A checkpoint folder, read from its config, its index and the headers of its shards alone.

The headers say what is there, the index only what should be: real indexes omit tensors (ModelOpt), count
elements instead of bytes, and name shards that an interrupted download never brought. Everything wrong is
collected, so that one look at a folder tells all of it.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from mla_tools.errors import ChangedError, CheckpointError, MlaToolsError, Problem
from mla_tools.files.directory import partial_name
from mla_tools.files.place import AGAIN, File, Folder, Place, pieces, read_whole, shown
from mla_tools.files.safetensors import Header, NotJsonError, parse_object, read_header
from mla_tools.names import fold_names
from mla_tools.spec import Spec

__all__ = [
    "Checkpoint",
    "Planned",
    "Shard",
    "Stored",
    "check_content",
    "check_unchanged",
    "no_collector",
    "open_checkpoint",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

_MAX_CONFIG = 16 << 20
_MAX_INDEX = 64 << 20
_MAX_DEPTH = 64  # a config is copied and compared by recursion
_NO_NUMBER = "Other readers of JSON refuse the file or read something else: correct the number."
_COMPANIONS = ("*.json", "*.jsonl", "*.py", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.model")

# What this package wrote about an output is not true of another one that is made of it.
_RECORDS = "mla_tools.*"

# Sections on quantization beside config.json: mlx-lm reads the first for the output's own.
_OTHER_FORMATS = frozenset({"hf_quant_config.json", "quantize_config.json", "quant_config.json"})
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Of what is copied; a larger file is left out, and a note says so.
_MAX_COMPANION = 1 << 30

# Of a name in bytes, on every file system that is in use.
_LONGEST_NAME = 255

_LOCAL_READERS = 2

_SET = re.compile(r"(.*)-(\d{1,18})-of-(\d{1,18})\.safetensors", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one stored tensor lies: its file, and its offset in bytes from the start of that file."""

    file: File
    offset: int
    spec: Spec


@dataclass(frozen=True, slots=True)
class Planned:
    """A file that a conversion will read, and its size in bytes; it opens only while it is what it was."""

    file: File
    size: int

    @property
    def name(self) -> str:
        """The plain name of the file."""
        return self.file.name


@dataclass(frozen=True, slots=True)
class Shard(Planned):
    """One weight file, and by what else it is known again: the sha256 of its header.

    `tag` is the hash that the hub gives for the content: the sha256 of a large file, the git object id of a
    small one; empty where nothing is known of the hub.
    """

    digest: str
    tag: str


@dataclass(frozen=True, slots=True)
class Index:
    """An index as it stands there: tensor name -> file name, and the whole number that it gives as size."""

    name: str
    places: dict[str, str]
    total_size: int | None


@dataclass(frozen=True)
class Checkpoint:
    """A folder or a repository of weights, without any of their data.

    `shards` are the weight files that were read, `companions` the files to copy beside converted weights
    (tokenizer, chat template, code). `lost` says for a tensor that should be there why it cannot be read;
    `blind`, that a file is missing or damaged and no index says what it held.
    With `problems`, the rest is what could be found out in spite of them.
    """

    place: Place
    config: dict[str, object]
    tensors: dict[str, Stored]
    shards: tuple[Shard, ...]
    companions: tuple[Planned, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    lost: dict[str, str]
    blind: bool = False


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep the garbage collector still while hundreds of thousands of small objects are made, all of
    which live: walking them again and again takes as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@no_collector()
def open_checkpoint(place: Place | str | os.PathLike[str]) -> Checkpoint:
    """Return what a folder or a repository holds, with everything that is wrong; only headers are read.

    Raises CheckpointError when there is nothing to go on: no folder, no usable config.json, no safetensors.
    """
    if isinstance(place, (str, os.PathLike)):
        place = Folder(Path(place))
    names = place.names()
    weights = [name for name in names if name.endswith(SUFFIX)]
    problems: list[Problem] = []
    notes: list[str] = []
    fatal: list[Problem] = []
    try:
        config = _read_json(place, names, CONFIG, _MAX_CONFIG, problems)
    except CheckpointError as error:
        fatal += error.problems
    index = _read_index(place, names, problems)
    places = index.places if index else None
    if not weights:
        fatal.append(_no_weights(place, names, places))
    chosen = [] if places is not None else _without_index(weights, notes)
    if weights and places is None and not chosen:
        found = _some(weights)
        cause = "An adapter is no model: give the folder of the model, or of the merged model."
        fatal.append(Problem(str(place), "holds adapters but no model", "model*.safetensors", found, cause))
    if fatal:
        raise CheckpointError(fatal + problems)
    lost: dict[str, str] = {}
    if places is None:
        headers = _read_headers(place, chosen, {}, problems, lost)
        problems += _holes(chosen)
        tensors = _gather(headers, {}, problems)
    else:
        placed = _placed(place, names, places, problems, lost)
        if left_out := [name for name in weights if name not in placed]:
            notes.append(f"{_some(left_out)}: not named by the index, left out")
        present = [name for name in placed if name in names]
        headers = _read_headers(place, present, placed, problems, lost)
        tensors = _gather(headers, places, problems)
        _compare(headers, tensors, places, placed, problems, notes, lost)
        if index and not problems:
            notes += _size_note(index, [stored.spec for stored in tensors.values()])
    blind = places is None and bool(problems)
    companions = _companions(place, names, notes, problems)
    return Checkpoint(
        place=place,
        config=config,
        tensors=tensors,
        shards=tuple(
            Shard(header.file, header.size, header.digest, place.tag(file))
            for file, header in headers.items()
        ),
        companions=companions,
        notes=tuple(notes),
        problems=tuple(problems),
        lost=lost,
        blind=blind,
    )


def _read_json(
    place: Place, names: Iterable[str], name: str, limit: int, problems: list[Problem]
) -> dict[str, object]:
    """Return the object in a JSON file; a key that is there twice is a problem, no object an error."""
    if name not in names:
        cause = "Give the folder that holds config.json and the weights."
        if "snapshots" in names and place.kind("snapshots") == "folder":
            cause = "This is a hub cache: give one of the folders in its folder snapshots."
        elif any(fnmatchcase(name, "mla_tools.journal-*") for name in names):
            cause = "This is an output of mla-sanitize that is not finished: convert --resume finishes it."
        raise CheckpointError([Problem(str(place), f"there is no {name} in it", cause=cause)])
    data = read_whole(place.file(name), limit)
    try:
        value, twice = parse_object(data)
    except ValueError as error:
        cause = _NO_NUMBER if isinstance(error, NotJsonError) else AGAIN
        raise CheckpointError([Problem(name, str(error), cause=cause)]) from error
    if _depth(value) > _MAX_DEPTH:
        raise CheckpointError([Problem(name, "is nested too deeply", f"at most {_MAX_DEPTH} levels")])
    for key in dict.fromkeys(twice):
        cause = "Readers disagree on which of the two counts: remove one."
        problems.append(Problem(name, f"has the key {shown(key)} twice", cause=cause))
    return value


def _depth(value: object) -> int:
    """Return how many objects and lists lie in one another; a plain value has 0."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def _read_index(place: Place, names: Sequence[str], problems: list[Problem]) -> Index | None:
    """Return the index, None without a usable one."""
    found = [name for name in names if name.endswith(f"{SUFFIX}.index.json")]
    if not found:
        return None
    if INDEX in found:
        found = [INDEX]
    if len(found) > 1:
        cause = f"Keep the one that belongs to the model, as {INDEX}."
        problems.append(Problem(str(place), "has several indexes", INDEX, _some(found), cause))
        return None
    (index,) = found
    try:
        content = _read_json(place, names, index, _MAX_INDEX, problems)
    except CheckpointError as error:
        problems += error.problems
        return None
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict):
        problems.append(
            Problem(index, "has no object weight_map", "tensor names with their files", cause=AGAIN)
        )
        return None
    strange = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if strange:
        what = f"weight_map gives no file name for {_some(strange)}"
        problems.append(Problem(index, what, "the name of a file in the folder", cause=AGAIN))
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(
        index,
        {name: file for name, file in weight_map.items() if isinstance(file, str)},
        size if type(size) is int else None,
    )


def _size_note(index: Index, specs: Sequence[Spec]) -> list[str]:
    """Return a note on a total_size that is not the bytes of the tensors; some index files count elements."""
    size, nbytes = index.total_size, sum(spec.nbytes for spec in specs)
    if size is None or size == nbytes:
        return []
    elements = sum(spec.size for spec in specs)
    counts = {elements: ", the number of elements", 2 * elements: ", two bytes for each element"}
    given = f"{size:,}" if abs(size) < 10**18 else "absurd"
    return [
        f"total_size in {shown(index.name)} is {given}{counts.get(size, '')};"
        f" the tensors are {nbytes:,} bytes, which counts"
    ]


def _placed(
    place: Place, names: Sequence[str], places: dict[str, str], problems: list[Problem], lost: dict[str, str]
) -> dict[str, list[str]]:
    """Return file -> the tensors that the index places in it, in order, for the plain file names alone.

    A file that is not there, or whose name leads out of the folder, is one problem and loses its tensors.
    """
    placed: dict[str, list[str]] = defaultdict(list)
    for name, file in places.items():
        placed[file].append(name)
    there = set(names)
    for file in sorted(placed):
        tensors = placed[file]
        if fault := _file_fault(file):
            what = f"the index names this file for {_tensors(tensors)}, and that {fault}"
            needed = "the plain name of a .safetensors file in the folder"
            problem = Problem(shown(file), what, needed, cause="Correct the index or download it again.")
            reason = f"the index names the file {shown(file)} for it, and that {fault}"
            del placed[file]
        elif file not in there:
            reason = f"{shown(file)} is listed in the index but is not in the folder"
            problem = Problem(
                shown(file),
                "is listed in the index but is not in the folder",
                needed=f"the file, with {_tensors(tensors)}",
                cause=f"Download it into {place}." if place.local else "The repository is incomplete.",
            )
        else:
            continue
        problems.append(problem)
        lost.update(dict.fromkeys(tensors, reason))
    return dict(sorted(placed.items()))


def _file_fault(file: str) -> str:
    """Return why a value of the index cannot be a shard of this folder, or nothing."""
    if not file or "\0" in file:
        return "is no file name"
    if "/" in file or "\\" in file or file in (".", ".."):
        return "is not in the folder"
    if file.startswith("."):
        return "is a hidden file"
    if not file.endswith(SUFFIX):
        return "is not a safetensors file"
    return ""


def _without_index(weights: Sequence[str], notes: list[str]) -> list[str]:
    """Return the files of the model when no index tells: model*, else the others, else consolidated*."""
    own = [name for name in weights if name.startswith("model")]
    merged = [name for name in weights if name.startswith("consolidated")]
    rest = [name for name in weights if name not in merged and not name.startswith("adapter")]
    chosen = own or rest or merged
    if chosen and (left_out := [name for name in weights if name not in chosen]):
        notes.append(f"{_some(left_out)}: not part of {_some(chosen)}, left out")
    return chosen


def _holes(files: Sequence[str]) -> list[Problem]:
    """Return a problem for each set "x-00001-of-00003.safetensors" of which members are missing."""
    sets: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for file in files:
        if match := _SET.fullmatch(file):
            prefix, number, total = match.groups()
            sets[prefix, total][int(number)] = number
    problems = []
    for (prefix, total), numbers in sets.items():
        # Some sets count from 0; the count in a name can be absurd, so only what is shown is listed.
        first = 0 if 0 in numbers else 1
        members = range(first, first + int(total))
        count = len(members) - sum(number in members for number in numbers)
        if count:
            digits = len(next(iter(numbers.values())))
            holes = (f"{prefix}-{k:0{digits}}-of-{total}{SUFFIX}" for k in members if k not in numbers)
            listed = [shown(hole) for hole in islice(holes, 8)]
            more = f" and {count - len(listed):,} more" if count > len(listed) else ""
            problems.append(
                Problem(
                    shown(f"{prefix}-*-of-{total}{SUFFIX}"),
                    f"{count:,} of {int(total):,} files are missing",
                    needed=", ".join(listed) + more,
                    found=f"{len(numbers):,} files",
                    cause="Download the missing files.",
                )
            )
    return problems


def _read_headers(
    place: Place,
    files: Iterable[str],
    placed: dict[str, list[str]],
    problems: list[Problem],
    lost: dict[str, str],
) -> dict[str, Header]:
    """Return file -> header for the sound files; a damaged one loses the tensors placed in it."""
    headers = {}
    for file, found in _each_header(place, list(files)):
        if isinstance(found, Header):
            headers[file] = found
            continue
        problems += found.problems
        first = found.problems[0]
        text = first.what if first.subject == shown(file) else f"{first.subject}: {first.what}"
        lost.update(dict.fromkeys(placed.get(file, ()), f"{shown(file)} is damaged or unreadable: {text}"))
    return headers


def _each_header(place: Place, files: Sequence[str]) -> Iterator[tuple[str, Header | CheckpointError]]:
    """Yield each file with its header, or with what is wrong with it."""

    def read(file: str) -> Header | CheckpointError:
        try:
            return read_header(place.file(file))
        except CheckpointError as error:
            return error

    if place.readers == 1:
        yield from ((file, read(file)) for file in files)
        return
    with ThreadPoolExecutor(place.readers) as pool:
        try:
            yield from zip(files, pool.map(read, files), strict=True)
        except BaseException:
            place.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _gather(headers: dict[str, Header], places: dict[str, str], problems: list[Problem]) -> dict[str, Stored]:
    """Return all tensors of the headers; of a tensor that two files hold, the one where the index has it."""
    tensors: dict[str, Stored] = {}
    for file, header in headers.items():
        for name in sorted(header.entries.keys() & tensors.keys()):
            first = tensors[name].file.name
            found = f"{shown(first)} and {shown(file)}"
            cause = "Remove the file that does not belong to this model."
            problems.append(Problem(shown(name), "is stored in two files", "one place", found, cause))
        for name, entry in header.entries.items():
            if name not in tensors or places.get(name) == file:
                tensors[name] = Stored(header.file, entry.offset, entry.spec)
    return tensors


def _compare(
    headers: dict[str, Header],
    tensors: dict[str, Stored],
    places: dict[str, str],
    placed: dict[str, list[str]],
    problems: list[Problem],
    notes: list[str],
    lost: dict[str, str],
) -> None:
    """Append where the headers and the index disagree: a tensor elsewhere or nowhere, one not indexed."""
    for name in lost.keys() & tensors.keys():
        del lost[name]
    for file, header in headers.items():
        for name in placed[file]:
            if name in header.entries:
                continue
            what = f"the index places it in {shown(file)}, and it is not there"
            where = (
                f"in {shown(tensors[name].file.name)}" if name in tensors else "in no file that could be read"
            )
            cause = "The index and the files are not of one download: download them again."
            problems.append(Problem(shown(name), what, found=where, cause=cause))
            if name not in tensors:
                lost[name] = what
        extra = [name for name in header.entries if name not in places]
        if extra:
            notes.append(
                f"{shown(file)} holds tensors that the index does not name, taken: {_tensors(extra)}"
            )


def _companions(
    place: Place, names: Iterable[str], notes: list[str], problems: list[Problem]
) -> tuple[Planned, ...]:
    """Return the files to copy beside the weights, each opened once; a note tells what is not copied."""
    found: list[Planned] = []
    # Where a file system takes no notice of case, one of two such names would replace the other.
    taken = {CONFIG.casefold(): CONFIG, INDEX.casefold(): INDEX}
    for name in sorted(names, key=str.swapcase):  # the one in lower case comes first, and counts
        wanted = any(fnmatchcase(name, pattern) for pattern in _COMPANIONS)
        if not wanted or name == CONFIG or name.endswith(".index.json") or fnmatchcase(name, _RECORDS):
            continue
        if name in _OTHER_FORMATS:
            notes.append(
                f"{shown(name)} describes the quantization that the checkpoint came with, not copied"
            )
            continue
        kind = place.kind(name)
        length = len(os.fsencode(partial_name(name)))
        if kind == "gone":
            notes.append(f"{shown(name)} is a link to a file that is gone, not copied")
        elif kind == "other":
            notes.append(f"{shown(name)} is no regular file, not copied")
        elif kind == "folder":
            pass
        elif length > _LONGEST_NAME:
            most = _LONGEST_NAME - len(partial_name(""))
            notes.append(f"{shown(name)} has a name of more than {most} bytes, not copied")
        elif (other := taken.setdefault(name.casefold(), name)) != name:
            notes.append(
                f"{shown(name)} differs from {shown(other)} in upper and lower case alone, not copied"
            )
        else:
            try:
                opened = place.file(name).open()
            except CheckpointError as error:
                problems += error.problems
                continue
            try:
                if opened.size > _MAX_COMPANION:
                    notes.append(f"{shown(name)} is larger than {_MAX_COMPANION:,} bytes, not copied")
                    continue
                found.append(Planned(opened.pin(), opened.size))
            finally:
                opened.close()
            if kind == "link":
                notes.append(f"{shown(name)} is a link out of the folder, and what it leads to is copied")
    return tuple(sorted(found, key=lambda companion: companion.name))


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError that names every file which is not what it was when the plan was made.

    It is a ChangedError unless nothing is wrong but that files cannot be opened now.
    """
    problems: list[Problem] = []
    changed = False
    planned: Iterable[Planned] = (*checkpoint.shards, *checkpoint.companions)
    for held in planned:
        try:
            held.file.open().close()
        except CheckpointError as error:
            problems += error.problems
            changed = changed or isinstance(error, ChangedError)
    if problems:
        raise ChangedError(problems) if changed else CheckpointError(problems)


def check_content(
    checkpoint: Checkpoint, share: tuple[int, int] = (0, 1), progress: Callable[[int], None] = lambda n: None
) -> None:
    """Read the weight files whole, and raise unless each has the hash that the hub gives for it.

    `share` is (rank, number of ranks), of which each reads its part. `progress` is called, by any thread,
    with the number of bytes just read. Raises CheckpointError that names each file whose content is another
    one, and MlaToolsError if the hub's hash of any file is not known.
    """
    unknown = [shard.name for shard in checkpoint.shards if not shard.tag]
    if unknown:
        raise MlaToolsError(
            f"--check-source: the hash that the hub gives is not known for {_some(unknown)}. It is known for"
            " a repository that is read in place, in the hub's cache, and in a folder of `hf download"
            " --local-dir`, whose .cache has it. Without --check-source the conversion works as well."
        )

    def check(shard: Shard) -> Problem | None:
        digest = hashlib.sha256() if len(shard.tag) == 64 else hashlib.sha1(b"blob %d\0" % shard.size)
        opened = shard.file.open()
        try:
            for piece in pieces(opened, shard.size):
                digest.update(piece.data)
                progress(len(piece))
        finally:
            opened.close()
        found = digest.hexdigest()
        if found == shard.tag:
            return None
        return Problem(shown(shard.name), "is not the hub's file", shard.tag, found, AGAIN)

    rank, ranks = share
    place = checkpoint.place
    with ThreadPoolExecutor(_LOCAL_READERS if place.local else place.readers) as pool:
        try:
            found = list(pool.map(check, checkpoint.shards[rank::ranks]))
        except BaseException:
            place.stop()
            pool.shutdown(cancel_futures=True)
            raise
    if problems := [problem for problem in found if problem is not None]:
        raise CheckpointError(problems)


def _no_weights(place: Place, names: Iterable[str], places: dict[str, str] | None) -> Problem:
    """Return the problem of a place without any safetensors file, and what to do about it."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    found = ""
    cause = (
        "Download the weights into this folder." if place.local else "Name another repository or revision."
    )
    if pickles:
        found = _some(pickles)
        cause = "Pickle files are refused, because loading one can run code: convert to safetensors first."
    elif ggufs:
        found = _some(ggufs)
        cause = "A folder of GGUF files is no safetensors checkpoint: download the safetensors version."
    elif places:
        found = f"an index that names {len(set(places.values())):,} files, none of which is there"
    return Problem(str(place), "holds no safetensors files", "model*.safetensors", found, cause)


def _some(names: Sequence[str]) -> str:
    """Return a list of names for a sentence, the first few of many."""
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    return ", ".join(map(shown, names[:4])) + more


def _tensors(names: Sequence[str]) -> str:
    """Return "3 tensors (a.{0..2}.weight)" for a sentence, with the first few kinds of many."""
    lines = fold_names(map(shown, names))
    more = ", ..." if len(lines) > 3 else ""
    count = "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
    return f"{count} ({', '.join(lines[:3])}{more})"
