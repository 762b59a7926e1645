"""The plan as a value: everything that a conversion will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mla_tools.architectures import Family
from mla_tools.files.checkpoint import Checkpoint, Planned
from mla_tools.files.safetensors import total_bytes
from mla_tools.options import Options
from mla_tools.plan.files import OutputFile
from mla_tools.plan.memory import MAX_MEMORY, NETWORK_THREADS, THREADS, Workload, workload
from mla_tools.plan.notes import EmbedQCost, embed_q_costs
from mla_tools.steps import Drop, Step

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do."""

    checkpoint: Checkpoint
    family: Family
    options: Options
    steps: tuple[Step, ...]
    drops: tuple[Drop, ...]
    files: tuple[OutputFile, ...]
    config: Mapping[str, Any]
    config_changes: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: int
    vision: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """The bytes of tensor data that will be written."""
        return sum(spec.nbytes for file in self.files for spec in file.tensors.values())

    @property
    def source_nbytes(self) -> int:
        """The bytes of tensor data in the checkpoint."""
        return total_bytes(stored.spec for stored in self.checkpoint.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that mlx-lm's model class must declare as parameters, with their shapes."""
        written = {name: spec.shape for file in self.files for name, spec in file.tensors.items()}
        return {name: shape for name, shape in written.items() if name not in self.vision}

    @property
    def copied(self) -> tuple[Planned, ...]:
        """The files of the source that go beside the weights as they are."""
        return tuple(file for file in self.checkpoint.companions if file.name not in self.added)

    @property
    def added(self) -> dict[str, str]:
        """The files that are written beside the weights and are not the checkpoint's, with their text."""
        return self.family.added()

    @property
    def embed_q_costs(self) -> tuple[EmbedQCost, ...]:
        """What the K halves of packed kv_b_proj become, in bytes and precision."""
        return embed_q_costs(self.steps)

    def workload(self, max_memory: int = MAX_MEMORY, threads: int | None = None) -> Workload:
        """Return how to work within so many bytes of memory, with at most so many threads.

        Left out, these are 2, or 8 where data comes over a network. Raises MlaToolsError that names the
        smallest budget, if this one is too small.
        """
        threads = threads or (THREADS if self.checkpoint.place.local else NETWORK_THREADS)
        return workload(self.steps, len(self.checkpoint.tensors), max_memory, threads)
