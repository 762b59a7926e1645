"""Header listings of real checkpoints at full size, as checkpoints whose files do not exist.

`tests/headers/*.json` hold where they are from (`source`), a config, the totals that are published of
the checkpoint (`published`), how many tensors a plan drops, by how the reason begins (`dropped`), and the
stored tensors in a short form (`tensors`): {pattern: [dtype, shape]}, where a group in braces is a comma list
of words and of ranges a-b or, in steps of s, a-b/s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mla_tools.files.checkpoint import Checkpoint, Stored
from mla_tools.files.place import Folder
from mla_tools.spec import DType, Spec

__all__ = ["LISTINGS", "Listing", "checkpoint", "expand", "load"]

FOLDER = Path(__file__).parent / "headers"

LISTINGS = sorted(path.stem for path in FOLDER.glob("*.json"))
assert LISTINGS, "without them, the tests of each of them would test nothing"

# How many bytes a made-up shard holds, and where the data of each begins.
_SHARD = 5_000_000_000
_HEADER = 4096


@dataclass(frozen=True)
class Listing:
    """What a checkpoint on the hub holds: its config, its stored tensors, and the totals it is known by.

    `dropped`: how many tensors a plan leaves out, by how the reason begins.
    """

    name: str
    config: dict[str, Any]
    stored: dict[str, Spec]
    published: dict[str, Any]
    dropped: dict[str, int]


@cache
def load(name: str) -> Listing:
    """Return the listing in tests/headers/<name>.json, every pattern written out."""
    value = json.loads((FOLDER / f"{name}.json").read_text())
    stored: dict[str, Spec] = {}
    for pattern, (dtype, shape) in value["tensors"].items():
        spec = Spec(tuple(shape), DType[dtype])
        for tensor in expand(pattern):
            assert tensor not in stored, f"{tensor} is listed twice"
            stored[tensor] = spec
    return Listing(name, value["config"], stored, value["published"], value.get("dropped", {}))


def expand(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern stands for, the last group fastest."""
    text, *rest = pattern.split("{")
    groups, between = [], [text]
    for piece in rest:
        group, text = piece.split("}")
        groups.append([word for item in group.split(",") for word in _words(item)])
        between.append(text)
    for words in product(*groups):
        yield between[0] + "".join(word + text for word, text in zip(words, between[1:], strict=True))


def _words(item: str) -> list[str]:
    first, dash, last = item.partition("-")
    last, _, step = last.partition("/")
    return [str(number) for number in range(int(first), int(last) + 1, int(step or 1))] if dash else [item]


@cache
def checkpoint(listing: str) -> Checkpoint:
    """Return a listing as a sound checkpoint whose shards are names only."""
    found = load(listing)
    tensors: dict[str, Stored] = {}
    folder = Path("hub") / listing
    shards = [folder / "model-1.safetensors"]
    offset = _HEADER
    for name, spec in found.stored.items():
        if offset > _SHARD:
            shards.append(folder / f"model-{len(shards) + 1}.safetensors")
            offset = _HEADER
        tensors[name] = Stored(shards[-1], offset, spec)
        offset += spec.nbytes
    return Checkpoint(Folder(folder), found.config, tensors, tuple(shards), (), (), (), {})
