"""A family's sample: its tiny config, and random values for every tensor that its table knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.architectures.geometry import OPEN
from mla_tools.codecs import FORMATS
from mla_tools.errors import MlaToolsError, UsageError
from mla_tools.names import template
from mla_tools.ops import Indices
from mla_tools.rules import Drop, Param
from mla_tools.samples.checkpoint import write_checkpoint
from mla_tools.table import Table

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

__all__ = ["sample_config", "write_sample"]

_CONFIGS = Path(__file__).with_name("configs")


def sample_config(family: str) -> dict[str, Any]:
    """Return the config of a family's sample, by a model_type of the family: a tiny one as on the hub.

    Raises UsageError for an unknown family.
    """
    if family not in MODEL_TYPES:
        raise UsageError(f"{family}: no such family; known are {', '.join(MODEL_TYPES)}")
    text = (_CONFIGS / f"{MODEL_TYPES[family].name}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def write_sample(
    family: str,
    folder: Path,
    fmt: str = "bf16",
    *,
    seed: int = 0,
    shards: int = 2,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder of a family: config, weights in shards with an index, tokenizer.

    `changes` are keys of the config that get another value. The same arguments give the same bytes. Raises
    UsageError for an unknown family or format, and MlaToolsError if the folder exists.
    """
    config = {**sample_config(family), **(changes or {})}
    if fmt not in FORMATS:
        raise UsageError(f"{fmt}: no such format; known are {', '.join(FORMATS)}")
    if folder.exists():
        raise MlaToolsError(f"{folder} already exists; a sample is written to a new folder.")
    found, table = table_of(config)
    write_checkpoint(folder, config, _tensors(table, found.numbers(config), seed), fmt, shards=shards)


def _tensors(table: Table, config: Mapping[str, Any], seed: int) -> dict[str, mx.array]:
    """Return random values for every tensor that a checkpoint of this config holds, the floats in float32."""
    import mlx.core as mx
    import numpy as np

    def values(tensor: str, shape: tuple[int, ...], param: Param) -> mx.array:
        return mx.array(_values(np.random.default_rng([seed, crc32(tensor.encode())]), tensor, shape, param))

    known = table.targets()
    tensors: dict[str, mx.array] = {}
    for route in (route.inverse() for route in table.routes if route.first):
        for key in route.applications():
            if isinstance(route.op, Indices):
                (name,) = route.sources(key)
                rng = np.random.default_rng([seed, crc32(name.encode())])
                arrays = [mx.array(rng.integers(route.op.below, size=known[name][0]))]
            else:
                arrays = [values(name, *known[name]) for name in route.sources(key)]
            tensors |= zip(route.targets(key), route.op.apply(arrays), strict=True)
    for drop in table.drops:
        for tensor in drop.inside if drop.usual else ():
            # What a dropped module is made of is nobody's business here: the names are enough.
            tensors[f"{drop.source}.{tensor}"] = values(f"{drop.source}.{tensor}", (64,), Param())
        if drop.usual and drop.shape is not None:
            for tensor in _dropped(drop, config):
                tensors[tensor] = values(tensor, drop.shape, Param())
    return tensors


def _dropped(drop: Drop, config: Mapping[str, Any]) -> list[str]:
    """Return the names that a drop stands for in a checkpoint whose MTP layers the config counts."""
    count = config.get("num_nextn_predict_layers", 1)
    parsed = template(drop.source)
    # An open range is one of MTP layers.
    domains = [
        range(domain.start, domain.start + count)
        if isinstance(domain, range) and domain.stop == OPEN
        else sorted(domain)
        for domain in (drop.where[index] for index in parsed.indices)
    ]
    return [parsed.format(dict(zip(parsed.indices, values, strict=True))) for values in product(*domains)]


def _values(
    rng: np.random.Generator, tensor: str, shape: tuple[int, ...], param: Param
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return values of a size at which a random model's logits stay finite and differ."""
    import numpy as np

    values = rng.standard_normal(shape, dtype=np.float32)
    if tensor.endswith("A_log"):
        return np.log(1 + 15 * rng.random(shape, dtype=np.float32))
    if tensor.endswith("norm.weight"):
        return 1 + values / np.float32(10)
    if len(shape) < 2:
        return values / np.float32(10)
    return values / np.float32(math.sqrt(shape[-1]))
