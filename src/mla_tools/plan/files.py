"""Lay out: which file of the output each tensor goes to, and at which byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mla_tools.files.safetensors import Layout, layout
from mla_tools.spec import Spec
from mla_tools.steps import Step

__all__ = ["SHARD_BYTES", "OutputFile", "lay_out"]

# Output files are filled up to this, as mlx-lm does it.
SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class OutputFile:
    """A file of the output and what stands where in it."""

    name: str
    layout: Layout
    tensors: Mapping[str, Spec]


def lay_out(steps: Sequence[Step]) -> tuple[OutputFile, ...]:
    """Return the files, filled in the order of the steps, the parts of a tensor together."""
    shards: list[dict[str, Spec]] = []
    room = 0
    for step in steps:
        for target in step.targets:
            stored = target.stored()
            nbytes = sum(spec.nbytes for spec in stored.values())
            if not shards or nbytes > room:
                shards.append({})
                room = SHARD_BYTES
            shards[-1].update(stored)
            room -= nbytes
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    return tuple(
        OutputFile(name, layout(tensors, {"format": "mlx"}), tensors)
        for name, tensors in zip(names, shards, strict=True)
    )
