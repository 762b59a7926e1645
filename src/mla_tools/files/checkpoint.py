"""A checkpoint folder, read from its config, its index and the headers of its shards alone.

The headers say what is there, the index only what should be: real indexes omit tensors (ModelOpt), count
elements instead of bytes, and name shards that an interrupted download never brought. Everything wrong is
collected, so that all of it is reported at once.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mla_tools.errors import ChangedError, CheckpointError, MlaToolsError, Problem
from mla_tools.files.companions import Planned, Skipped, choose_companions
from mla_tools.files.index import (
    CONFIG,
    MAX_CONFIG,
    SUFFIX,
    holes,
    losing,
    place_tensors,
    read_index,
    read_json,
    size_note,
    some,
    tensors_text,
    without_index,
)
from mla_tools.files.place import AGAIN, Folder, Place, pieces, shown
from mla_tools.files.safetensors import Header, Stored, read_header

__all__ = [
    "Checkpoint",
    "Planned",
    "Shard",
    "Skipped",
    "Stored",
    "check_content",
    "check_unchanged",
    "no_collector",
    "open_checkpoint",
]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_LOCAL_READERS = 2


@dataclass(frozen=True, slots=True)
class Shard(Planned):
    """One weight file, and by what else it is known again: the sha256 of its header.

    `tag` is the hash that the hub gives for the content: the sha256 of a large file, the git object id of a
    small one; empty where nothing is known of the hub.
    """

    digest: str
    tag: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder or a repository of weights, without any of their data.

    `shards` are the weight files that were read, `companions` the files to copy beside converted weights
    (tokenizer, chat template, code), `skipped` is all else that lies there. `lost` says for a tensor that
    should be there why it cannot be read; `blind`, that a file is missing or damaged and no index says what
    it held. With `problems`, the rest is what could be found out in spite of them.
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
    skipped: tuple[Skipped, ...] = ()


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

    Raises CheckpointError when there is nothing to read: no folder, no usable config.json, no safetensors.
    """
    if isinstance(place, (str, os.PathLike)):
        place = Folder(Path(place))
    names = place.names()
    weights = [name for name in names if name.endswith(SUFFIX)]
    problems: list[Problem] = []
    notes: list[str] = []
    fatal: list[Problem] = []
    try:
        config = read_json(place, names, CONFIG, MAX_CONFIG, problems)
    except CheckpointError as error:
        fatal += error.problems
    index = read_index(place, names, problems)
    places = index.places if index else None
    if not weights:
        fatal.append(_no_weights(place, names, places))
    chosen = [] if places is not None else without_index(weights, notes)
    if weights and places is None and not chosen:
        found = some(weights)
        cause = "An adapter is not a model: give the folder of the model, or of the merged model."
        fatal.append(Problem(str(place), "holds adapters but no model", "model*.safetensors", found, cause))
    if fatal:
        raise CheckpointError(fatal + problems)
    lost: dict[str, str] = {}
    if places is None:
        headers = _read_headers(place, chosen, {}, problems, lost)
        problems += holes(chosen)
        tensors = _gather(headers, {}, problems)
    else:
        placed = place_tensors(place, names, places, problems, lost)
        if left_out := [name for name in weights if name not in placed]:
            notes.append(f"{some(left_out)}: not named by the index, ignored")
        present = [name for name in placed if name in names]
        headers = _read_headers(place, present, placed, problems, lost)
        tensors = _gather(headers, places, problems)
        _compare(headers, tensors, places, placed, problems, notes, lost)
        if index and not problems:
            notes += size_note(index, [stored.spec for stored in tensors.values()])
    blind = places is None and bool(problems)
    model = chosen if places is None else present
    companions, skipped = choose_companions(place, names, model, notes, problems)
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
        skipped=skipped,
    )


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
        first, *more = found.problems
        text = first.what if first.subject == shown(file) else f"{first.subject}: {first.what}"
        reason = f"{shown(file)} is damaged or unreadable: {text}"
        problems += [losing(first, reason, placed.get(file, ())), *more]
        lost.update(dict.fromkeys(placed.get(file, ()), reason))
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
        twice = header.entries.keys() & tensors.keys()
        for name in sorted(twice):
            first = tensors[name].file.name
            found = f"{shown(first)} and {shown(file)}"
            cause = "Remove the file that does not belong to this model."
            problems.append(Problem(shown(name), "is stored in two files", "one place", found, cause))
        entries = header.entries
        if twice:
            entries = {
                name: entry
                for name, entry in entries.items()
                if name not in twice or places.get(name) == file
            }
        tensors |= entries
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
            what = f"the index places it in {shown(file)}, but it is not there"
            where = (
                f"in {shown(tensors[name].file.name)}" if name in tensors else "in no file that could be read"
            )
            cause = "The index and the files do not belong together: download them again."
            problem = Problem(shown(name), what, found=where, cause=cause)
            if name not in tensors:
                problem = losing(problem, what, [name])
                lost[name] = what
            problems.append(problem)
        extra = [name for name in header.entries if name not in places]
        if extra:
            notes.append(
                f"{shown(file)} holds tensors that the index does not name; they are used:"
                f" {tensors_text(extra)}"
            )


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
            f"--check-source: the hub's hash is not known for {some(unknown)}. It is known for a repository"
            f" that is read in place, for the hub's cache, and for a folder of `hf download --local-dir`,"
            f" whose .cache has it. The conversion also works without --check-source."
        )

    def check(shard: Shard) -> Problem | None:
        digest = hashlib.sha256() if len(shard.tag) == 64 else hashlib.sha1(b"blob %d\0" % shard.size)
        opened = shard.file.open()
        try:
            for piece in pieces(opened, shard.size):
                digest.update(piece)
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
        found = some(pickles)
        cause = "Pickle files are refused, because loading one can run code: convert to safetensors first."
    elif ggufs:
        found = some(ggufs)
        cause = "A folder of GGUF files is not a safetensors checkpoint: download the safetensors version."
    elif places:
        found = f"an index that names {len(set(places.values())):,} files, none of which is there"
    return Problem(str(place), "holds no safetensors files", "model*.safetensors", found, cause)
