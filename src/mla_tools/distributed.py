"""Work that several processes share, on one machine or on several.

A conversion is split by output file: each rank plans for itself, which takes seconds and gives every rank
the same plan, writes the files that are its own to shared storage, and rank 0 completes the folder.
mlx.distributed is the engine; `mlx.launch` starts the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from mla_tools.errors import MlaToolsError

__all__ = ["Alone", "Group", "launched", "shares", "together"]

T = TypeVar("T")


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
        agreed = mx.distributed.all_sum(mx.array(int(ok)), group=self._group, stream=mx.cpu)
        return bool(agreed.item() == self.size)


# What mlx.launch sets for a rank and what the launchers of MPI do, each with where the number of ranks is.
_LAUNCHERS = {
    "MLX_RANK": "",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
}


def launched() -> Group:
    """Return the group in which this process was started; alone, where nothing started several.

    Raises MlaToolsError if the environment speaks of a group that cannot be joined.
    """
    found = [name for name in _LAUNCHERS if name in os.environ]
    if all(os.environ.get(_LAUNCHERS[name]) == "1" for name in found) or _launched_alone():
        return Alone()
    named = ", ".join(found)
    advice = f"Start with mlx.launch or mpirun, or unset {named} to convert in one process."
    try:
        group = _Launched()
    except (RuntimeError, ValueError) as error:
        what = f"is set, as by a launcher of several processes, but MLX cannot join them ({error})."
        raise MlaToolsError(f"{named} {what} {advice}") from error
    sizes = {os.environ[size] for size in map(_LAUNCHERS.__getitem__, found) if size in os.environ}
    if "MLX_RANK" not in found and sizes - {str(group.size)}:
        # With another MPI than the launcher's, each rank would take itself for the only one.
        what = f"is set by a launcher of {' or '.join(sorted(sizes))} processes, but MLX joins {group.size}."
        raise MlaToolsError(f"{named} {what} {advice}")
    return group


def _launched_alone() -> bool:
    """Return whether `mlx.launch -n 1` started this process: its list of hosts is empty."""
    try:
        return not Path(os.environ["MLX_HOSTFILE"]).read_text().strip()
    except (KeyError, OSError, ValueError):
        return False


def together(group: Group, work: Callable[[], T]) -> T:
    """Return what a piece of work gives, when it went well in each process of a group."""
    results: list[T] = []
    error: Exception | None = None
    try:
        results.append(work())
    except Exception as fault:  # whatever it is, the others must not wait for this process
        error = fault
    everyone = group.agree(error is None)
    if error is not None:
        raise error
    if not everyone:
        raise MlaToolsError("another process of this run failed; see its message")
    return results[0]


def shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return the rank of each of the files of these sizes: runs of about equal bytes, in order."""
    total, reached, owners = max(1, sum(sizes)), 0, []
    for size in sizes:
        owners.append(min(ranks - 1, (reached + size // 2) * ranks // total))
        reached += size
    return owners
