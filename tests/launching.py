"""The ranks of a conversion, each a process whose end is seen: mlx.launch ends all of them with the first."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from ports import free_ports

# A rank that waits for another one forever must not hold up the tests.
_SECONDS = 120


def run_ranks(
    command: Sequence[str], folder: Path, ranks: int = 2, env: Mapping[str, str] | None = None
) -> list[tuple[int, str]]:
    """Return the exit code of each rank and what it said, as mlx.launch would start them on this machine.

    Rank 0 and rank 1 have a pipe from one to the other, its end in PIPE.
    """
    first = free_ports(ranks)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(ranks)]))
    reading, writing = os.pipe()
    with ExitStack() as stack:
        started = []
        try:
            for rank in range(ranks):
                pipe = writing if rank == 0 else reading
                given = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "PIPE": str(pipe)}
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, **(env or {}), **given},
                    pass_fds=[pipe],
                )
                stack.callback(process.kill)
                started.append(process)
        finally:
            os.close(reading)
            os.close(writing)
        said = [process.communicate(timeout=_SECONDS)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, said, strict=True)]
