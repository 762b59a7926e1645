"""mla_tools.json: what an output was made from, and what each of its files must be.

It carries the sha256 of itself, so that no bit of it changes unnoticed. That is no signature: who can write
to the folder can write another record.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tools.errors import clipped
from mla_tools.files.index import CONFIG, INDEX
from mla_tools.files.parsing import parse_object
from mla_tools.files.place import Place, leaf_of, shown
from mla_tools.plan import Plan

__all__ = [
    "CONFIG",
    "FORMAT",
    "INDEX",
    "LISTED",
    "MAX_RECORD",
    "RECORD",
    "Record",
    "begun",
    "compact",
    "differences",
    "made",
    "names_of",
    "pretty",
    "provenance",
    "record_of",
    "sha256_hex",
]

RECORD = "mla_tools.json"

FORMAT = 2

# Where a provenance lists the files of an output: weights, those of the source, and those of ours.
LISTED = ("files", "copied", "added")

# More than a record of millions of dropped tensors takes.
MAX_RECORD = 128 << 20

_DIGEST = "sha256"


def provenance(plan: Plan, device: str) -> dict[str, Any]:
    """Return all that the bytes of an output depend on, as plain values."""
    from importlib.metadata import version

    name, revision = _source(plan.checkpoint.place)
    return {
        "format": FORMAT,
        "tools": {"mla-tools": version("mla-tools"), "mlx": version("mlx")},
        "device": device,
        "options": plan.options.described(),
        "source": {
            "name": name,
            "revision": revision,
            "config_sha256": sha256_hex(compact(plan.checkpoint.config)),
            "files": {
                shard.name: {"bytes": shard.size, "header_sha256": shard.digest, "hub_hash": shard.tag}
                for shard in plan.checkpoint.shards
            },
        },
        "output": {
            "config_sha256": sha256_hex(compact(plan.config)),
            "added": {name: sha256_hex(text.encode()) for name, text in plan.added.items()},
            "copied": sorted(companion.name for companion in plan.copied),
            "files": {file.name: sha256_hex(file.layout.header) for file in plan.files},
        },
    }


def begun(plan: Plan, device: str) -> dict[str, Any]:
    """Return what a journal begins with: the provenance, and how the source looks on this machine now."""
    seen = {shard.name: shard.file.stamp for shard in plan.checkpoint.shards}
    return {"provenance": provenance(plan, device), "host": platform.node(), "seen": seen}


def _source(place: Place) -> tuple[str, str]:
    """Return a name of the source that does not depend on where it lies on this machine, and its commit."""
    if "://" in str(place):
        return str(place).rpartition("@")[0] or str(place), place.revision
    path = Path(str(place)).resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return "hf://" + "/".join(path.parent.parent.name.split("--")[1:]), path.name
    return path.name, place.revision


@dataclass(frozen=True)
class Record:
    """A sound record: its values, and the size and the sha256 of each file of the output."""

    value: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Return the record in the bytes of a file; ValueError that says why there is none in them."""
        value, _ = parse_object(data)
        if value.get("format") != FORMAT:
            raise ValueError(f"is of format {clipped(value.get('format'))}, and this version reads {FORMAT}")
        try:
            sound = record_of(value) == data
        except (ValueError, RecursionError):  # numbers and depths that no record has
            sound = False
        if not sound:
            raise ValueError("is damaged: it does not match its own sha256")
        listed = value.get("files")
        if not isinstance(listed, dict) or not isinstance(value.get("output"), dict):
            raise ValueError("is not a record of an output")
        files = {}
        for name, entry in listed.items():
            nbytes, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (0, 0)
            if not _is_plain(name) or type(nbytes) is not int or type(sha256) is not str:
                raise ValueError(
                    f"is not a record of an output: its entry {clipped(name)} does not describe a file"
                )
            files[name] = (nbytes, sha256)
        if missing := sorted({CONFIG, INDEX, *names_of(value["output"], *LISTED)} - files.keys()):
            named = ", ".join(map(shown, missing[:4])) + (", ..." if len(missing) > 4 else "")
            raise ValueError(f"is not a record of an output: its files lack {named}")
        return cls(value, files)

    def header_digest(self, name: str) -> str | None:
        """Return the sha256 of the header of a weight file, None for any other file."""
        headers = self.value["output"].get("files")
        found = headers.get(name) if isinstance(headers, dict) else None
        return found if isinstance(found, str) else None


def _is_plain(name: str) -> bool:
    """Return whether a text can be the name of a file of an output, on any system."""
    name = leaf_of(name)
    try:
        name.encode(errors="surrogateescape")  # as names that are no UTF-8 are read
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not set("/\\\0") & set(name)


def names_of(output: object, *keys: str) -> set[str]:
    """Return the names of the files that the part "output" of a provenance lists under these keys."""
    listed = [output.get(key) for key in keys] if isinstance(output, dict) else []
    return {
        name for names in listed if isinstance(names, (dict, list)) for name in names if type(name) is str
    }


def record_of(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record, with the sha256 of the rest of it in the place of any that it has."""
    rest = {key: item for key, item in value.items() if key != _DIGEST}
    return pretty({**rest, _DIGEST: sha256_hex(pretty(rest))})


def made(plan: Plan, files: Mapping[str, tuple[int, str]], checked: bool) -> dict[str, Any]:
    """Return what was left out and why, whether the source was checked, and each file with its sha256."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for drop in plan.drops:
        reasons[drop.reason] += drop.source.parts.values()
    return {
        "dropped": {reason: sorted(names) for reason, names in sorted(reasons.items())},
        "notes": list(plan.notes),
        "source_checked": checked,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
    }


def differences(old: object, new: Mapping[str, Any], place: str = "") -> list[str]:
    """Return a line for each value that is another one now."""
    lines = []
    before = old if isinstance(old, Mapping) else {}
    for key in [*new, *(key for key in before if key not in new)]:
        was, where = before.get(key), f"{place}{shown(key)}"
        if key not in new:
            lines.append(f"{where}: is gone")
        elif isinstance(new[key], Mapping) and isinstance(was, Mapping):
            lines += differences(was, new[key], f"{where}.")
        elif was != new[key]:
            lines.append(f"{where}: was {clipped(was)}, is {clipped(new[key])}")
    return lines


def compact(value: Any) -> bytes:
    """Return a value as JSON in one line, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def pretty(value: Any) -> bytes:
    """Return a value as JSON for people."""
    return (json.dumps(value, indent=4, allow_nan=False) + "\n").encode()


def sha256_hex(data: bytes) -> str:
    """Return the sha256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
