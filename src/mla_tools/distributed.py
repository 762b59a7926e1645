"""Work that several processes share, on one machine or on several.

A conversion is split by output file: each rank plans for itself, which takes seconds and gives every rank
the same plan, writes the files that are its own to shared storage, and rank 0 completes the folder.
mlx.distributed is the engine; `mlx.launch` starts the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Alone", "Group", "launched", "shares"]


class Group(Protocol):
    """The processes that share a piece of work."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, ok: bool) -> bool:
        """Return whether all ranks say so, as soon as all have come here."""


class Alone:
    """A process that does all of the work."""

    rank = 0
    size = 1

    def agree(self, ok: bool) -> bool:
        return ok


class _Launched:
    """The processes of one `mlx.launch`."""

    def __init__(self) -> None:
        import mlx.core as mx

        self._group = mx.distributed.init(strict=True)

    @property
    def rank(self) -> int:
        return int(self._group.rank())

    @property
    def size(self) -> int:
        return int(self._group.size())

    def agree(self, ok: bool) -> bool:
        import mlx.core as mx

        # Sockets are a matter of the CPU, whatever device computes.
        voices = mx.distributed.all_sum(mx.array(int(ok)), group=self._group, stream=mx.cpu)
        return bool(voices.item() == self.size)


# What mlx.launch sets for a rank, and what the launchers of MPI do.
_LAUNCHERS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched() -> Group:
    """Return the group in which this process was started; alone, where nothing started several."""
    return _Launched() if any(name in os.environ for name in _LAUNCHERS) else Alone()


def shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return the rank of each of the files of these sizes: runs of about equal bytes, in order."""
    total, reached, owners = max(1, sum(sizes)), 0, []
    for size in sizes:
        owners.append(min(ranks - 1, (reached + size // 2) * ranks // total))
        reached += size
    return owners
