"""The index of a checkpoint, config.json beside it, and which files and tensors they promise."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice

from mla_tools.errors import CheckpointError, Problem
from mla_tools.files.parsing import NotJsonError, parse_object
from mla_tools.files.place import AGAIN, Place, read_whole, shown
from mla_tools.files.safetensors import total_bytes
from mla_tools.names import fold_names
from mla_tools.spec import Spec

__all__ = [
    "CONFIG",
    "INDEX",
    "MAX_CONFIG",
    "SUFFIX",
    "Index",
    "holes",
    "losing",
    "place_tensors",
    "read_index",
    "read_json",
    "size_note",
    "some",
    "tensors_text",
    "without_index",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

MAX_CONFIG = 16 << 20
_MAX_INDEX = 64 << 20
_MAX_DEPTH = 64  # a config is copied and compared by recursion
_NO_NUMBER = "Other readers of JSON refuse the file or read something else: correct the number."

_SET = re.compile(r"(.*)-(\d{1,18})-of-(\d{1,18})\.safetensors", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Index:
    """An index as it stands there: tensor name -> file name, and the integer that it gives as size."""

    name: str
    places: dict[str, str]
    total_size: int | None


def read_json(
    place: Place, names: Iterable[str], name: str, limit: int, problems: list[Problem]
) -> dict[str, object]:
    """Return the object in a JSON file; a duplicate key is a problem, no object an error."""
    if name not in names:
        cause = "Give the folder that holds config.json and the weights."
        if "snapshots" in names and place.kind("snapshots") == "folder":
            cause = "This is a hub cache: give one of the folders in its folder snapshots."
        elif any(fnmatchcase(name, "mla_tools.journal-*") for name in names):
            cause = "This is an unfinished output of mla-sanitize: convert --resume finishes it."
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
        problems.append(Problem(name, f"has a duplicate key: {shown(key)}", cause=cause))
    return value


def _depth(value: object) -> int:
    """Return how many objects and lists lie in one another; a plain value has 0."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def read_index(place: Place, names: Sequence[str], problems: list[Problem]) -> Index | None:
    """Return the index, None without a usable one."""
    found = [name for name in names if name.endswith(f"{SUFFIX}.index.json")]
    if not found:
        return None
    if INDEX in found:
        found = [INDEX]
    if len(found) > 1:
        cause = f"Keep the one that belongs to the model, as {INDEX}."
        problems.append(Problem(str(place), "has several indexes", INDEX, some(found), cause))
        return None
    (index,) = found
    try:
        content = read_json(place, names, index, _MAX_INDEX, problems)
    except CheckpointError as error:
        problems += error.problems
        return None
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict):
        problems.append(
            Problem(index, "has no object weight_map", "tensor names with their files", cause=AGAIN)
        )
        return None
    usual = set(map(type, weight_map.values())) <= {str}
    strange = [] if usual else [name for name, file in weight_map.items() if not isinstance(file, str)]
    if strange:
        what = f"weight_map gives no file name for {some(strange)}"
        problems.append(Problem(index, what, "the name of a file in the folder", cause=AGAIN))
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(
        index,
        {name: file for name, file in weight_map.items() if isinstance(file, str)} if strange else weight_map,
        size if type(size) is int else None,
    )


def size_note(index: Index, specs: Sequence[Spec]) -> list[str]:
    """Return a note on a total_size that is not the bytes of the tensors; some index files count elements."""
    size = index.total_size
    if size is None or size == (nbytes := total_bytes(specs)):
        return []
    elements = sum(spec.size for spec in specs)
    counts = {elements: ", the number of elements", 2 * elements: ", two bytes for each element"}
    given = f"{size:,}" if abs(size) < 10**18 else "absurd"
    return [
        f"total_size in {shown(index.name)} is {given}{counts.get(size, '')};"
        f" the tensors have {nbytes:,} bytes, and this number is used"
    ]


def place_tensors(
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
            what = f"the index names this file, but it {fault}"
            needed = "the plain name of a .safetensors file in the folder"
            problem = Problem(shown(file), what, needed, cause="Correct the index or download it again.")
            reason = f"the index names the file {shown(file)} for it, but that {fault}"
            del placed[file]
        elif file not in there:
            reason = f"{shown(file)} is listed in the index but is not in the folder"
            problem = Problem(
                shown(file),
                "is listed in the index but is not in the folder",
                cause=f"Download it into {place}." if place.local else "The repository is incomplete.",
            )
        else:
            continue
        problems.append(losing(problem, reason, tensors))
        lost.update(dict.fromkeys(tensors, reason))
    return dict(sorted(placed.items()))


def losing(problem: Problem, reason: str, names: Iterable[str]) -> Problem:
    """Return a problem as one by which tensors are lost, with the reason that is given for each of them."""
    return replace(problem, reason=reason, lost=tuple(map(shown, names)))


def _file_fault(file: str) -> str:
    """Return why a value of the index cannot be a shard of this folder, or nothing."""
    if not file or "\0" in file:
        return "is not a file name"
    if "/" in file or "\\" in file or file in (".", ".."):
        return "is not in the folder"
    if file.startswith("."):
        return "is a hidden file"
    if not file.endswith(SUFFIX):
        return "is not a safetensors file"
    return ""


def without_index(weights: Sequence[str], notes: list[str]) -> list[str]:
    """Return the files of the model when no index tells: model*, else the others, else consolidated*."""
    own = [name for name in weights if name.startswith("model")]
    merged = [name for name in weights if name.startswith("consolidated")]
    rest = [name for name in weights if name not in merged and not name.startswith("adapter")]
    chosen = own or rest or merged
    if chosen and (left_out := [name for name in weights if name not in chosen]):
        notes.append(f"{some(left_out)}: not part of {some(chosen)}, left out")
    return chosen


def holes(files: Sequence[str]) -> list[Problem]:
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
            what = f"{count:,} of {int(total):,} files are missing"
            problem = Problem(
                shown(f"{prefix}-*-of-{total}{SUFFIX}"),
                what,
                needed=", ".join(listed) + more,
                found=f"{len(numbers):,} of {int(total):,}",
                cause="Download the missing files.",
            )
            problems.append(losing(problem, what, ()))
    return problems


def some(names: Sequence[str]) -> str:
    """Return a list of names for a sentence, the first few of many."""
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    return ", ".join(map(shown, names[:4])) + more


def tensors_text(names: Sequence[str]) -> str:
    """Return "3 tensors (a.{0..2}.weight)" for a sentence, with the first few kinds of many."""
    lines = fold_names(map(shown, names))
    more = ", ..." if len(lines) > 3 else ""
    count = "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
    return f"{count} ({', '.join(lines[:3])}{more})"
