"""Builders of files and folders, sound and hostile, made without the code under test."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

WIDTHS = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "U32": 4, "F32": 4, "I64": 8}


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file with this header as it is; `length` is what the first 8 bytes claim instead."""
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def table(header: object, data: bytes = b"") -> bytes:
    """Return a file with any JSON value as its header."""
    return packed(json.dumps(header).encode(), data)


def entry(dtype: object, shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sound(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None) -> bytes:
    """Return a sound file of zeros, the tensors in the order given."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    reached = 0
    for name, (dtype, shape) in tensors.items():
        end = reached + prod(shape) * WIDTHS[dtype]
        header[name] = entry(dtype, shape, [reached, end])
        reached = end
    return table(header, bytes(reached))


def shard(folder: Path, file: str, *names: str) -> None:
    """Write a sound file of small BF16 tensors of these names into a folder."""
    (folder / file).write_bytes(sound({name: ("BF16", [2, 4]) for name in names}))


def index(
    folder: Path,
    places: object,
    file: str = "model.safetensors.index.json",
    *,
    total_size: object = None,
) -> None:
    """Write an index."""
    content = {"metadata": {"total_size": total_size}, "weight_map": places}
    (folder / file).write_text(json.dumps(content))


SHARDS = tuple(f"model-{k:05}-of-00003.safetensors" for k in (1, 2, 3))


def folder_with_shards(folder: Path, config: str = '{"model_type": "deepseek_v3"}') -> Path:
    """Return a new folder with a config, three shards of two layers each, and the index of them."""
    folder_with_config(folder, config)
    places = {}
    for number, file in enumerate(SHARDS):
        names = [f"model.layers.{2 * number + k}.weight" for k in (0, 1)]
        shard(folder, file, *names)
        places.update(dict.fromkeys(names, file))
    index(folder, places)
    return folder


def folder_with_config(folder: Path, config: str = '{"model_type": "deepseek_v3"}') -> Path:
    """Return a new folder that holds a config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    return folder
