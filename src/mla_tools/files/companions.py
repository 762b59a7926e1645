"""What lies beside the weights of a checkpoint: which files are copied, and why each of the others is not."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mla_tools.errors import CheckpointError, Problem
from mla_tools.files.directory import partial_name
from mla_tools.files.index import CONFIG, INDEX, SUFFIX
from mla_tools.files.place import File, Place, leaf_of, shown

__all__ = ["OTHER_WEIGHTS", "Planned", "Skipped", "choose_companions"]

# The names of weights in formats that are not read.
OTHER_WEIGHTS = tuple(
    f"*.{ending}"
    for ending in (
        *("bin", "ckpt", "gguf", "ggml", "h5", "msgpack", "npy", "npz", "onnx", "onnx_data", "ot"),
        *("pb", "pickle", "pkl", "pt", "pth", "tflite"),
    )
)

_QUANTIZATION = "describes the quantization that the checkpoint came with"

# The names of what is not copied, and why; the first that fits counts. All else is copied, because nobody
# knows by what names a tokenizer opens its files.
_NOT_COPIED = (
    (CONFIG, "written anew"),
    (f"*{SUFFIX}.index.json", "written anew"),
    ("*.index.json", "the index of weights in another format"),
    # What this package wrote about an output is not true of another one that is made of it.
    ("mla_tools.*", "describes another output of mla-sanitize"),
    # Sections on quantization beside config.json: mlx-lm reads the first for the output's own.
    ("hf_quant_config.json", _QUANTIZATION),
    ("quantize_config.json", _QUANTIZATION),
    ("quant_config.json", _QUANTIZATION),
    (f"*{SUFFIX}", "weights that are not part of the model"),
    *((pattern, "weights in another format") for pattern in OTHER_WEIGHTS),
)

# Of what is copied; a larger file is left out, and a note says so.
_MAX_COMPANION = 1 << 30

# Of a name in bytes, on every file system that is in use.
_LONGEST_NAME = 255


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
class Skipped:
    """What is neither read nor copied, and why; the name of a folder ends with a slash."""

    name: str
    reason: str


def choose_companions(
    place: Place, names: Iterable[str], model: Collection[str], notes: list[str], problems: list[Problem]
) -> tuple[tuple[Planned, ...], tuple[Skipped, ...]]:
    """Return the files to copy beside the weights, each opened once, and all else but the files of the model.

    A note names each file that should be copied but cannot be.
    """
    found: list[Planned] = []
    skipped = [Skipped(name, _why_not_read(name)) for name in place.others()]
    # Where a file system takes no notice of case, one of two such names would replace the other.
    taken = {CONFIG.casefold(): CONFIG, INDEX.casefold(): INDEX}
    for name in sorted(set(names).difference(model), key=str.swapcase):  # lower case first, and it counts
        kind = place.kind(name)
        if kind == "folder":
            skipped.append(Skipped(f"{name}/", "a folder"))
            continue
        if reason := _why_not_wanted(name):
            skipped.append(Skipped(name, reason))
            if reason == _QUANTIZATION:
                notes.append(f"{shown(name)} {reason}, not copied")
            continue
        length = len(os.fsencode(partial_name(leaf_of(name))))
        why = ""
        if kind == "gone":
            why = "is a link to a missing file"
        elif kind == "other":
            why = "is not a regular file"
        elif length > _LONGEST_NAME:
            why = f"has a name of more than {_LONGEST_NAME - len(partial_name(''))} bytes"
        elif (other := taken.setdefault(name.casefold(), name)) != name:
            why = f"differs from {shown(other)} only in upper and lower case"
        else:
            try:
                opened = place.file(name).open()
            except CheckpointError as error:
                problems += error.problems
                continue
            try:
                if opened.size > _MAX_COMPANION:
                    why = f"is larger than {_MAX_COMPANION:,} bytes"
                else:
                    found.append(Planned(opened.pin(), opened.size))
            finally:
                opened.close()
            if kind == "link" and not why:
                notes.append(
                    f"{shown(name)} is a link out of the folder; the file that it points to is copied"
                )
        if why:
            skipped.append(Skipped(name, why))
            notes.append(f"{shown(name)} {why}, not copied")
    return (
        tuple(sorted(found, key=lambda companion: companion.name)),
        tuple(sorted(skipped, key=lambda each: each.name)),
    )


def _why_not_wanted(name: str) -> str:
    """Return why a file is not copied, whatever it is; nothing for one that is."""
    for pattern, reason in _NOT_COPIED:
        if fnmatchcase(name, pattern):
            return reason
    if name.endswith(partial_name("")):
        return "named as a file that is not complete"
    return "hidden" if leaf_of(name).startswith(".") else ""


def _why_not_read(name: str) -> str:
    """Return why a place does not give something that lies there."""
    if name.startswith("."):
        return "hidden"
    return "a folder" if name.endswith("/") else "a name that some file systems do not allow"
