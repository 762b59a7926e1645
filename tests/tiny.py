"""A conversion that takes a hundredth of a second, for tests that need many of them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import pytest

from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import Plan, Workload, make_plan
from mla_tools.plan import files as plan_files
from mla_tools.samples import write_sample

# Three files of SHARD_BYTES.
TINY = {
    "vocab_size": 20,
    "hidden_size": 144,
    "intermediate_size": 136,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 132,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
SHARD_BYTES = 200_000
JOURNALS = "mla_tools.journal-*.jsonl"

# The command, with output files and checkpoints of a size that fits the model, and no question to mlx-lm.
CHILD = f"""
import sys
from mla_tools import __main__, verify
from mla_tools.output import folder, writing
from mla_tools.plan import files
files.SHARD_BYTES = {SHARD_BYTES}
writing.CHECKPOINT_BYTES = 1
folder.SMALL_FILES = 0
class Agrees:
    def __init__(self, *given, **named): pass
    def look(self): pass
    def wait(self): pass
    def cancel(self): pass
    def said(self): return ""
verify.ManifestCheck = verify.TokenizerCheck = Agrees
sys.exit(__main__.main())
"""


def uninterrupted(source: Path, out: Path) -> dict[str, str]:
    """Return what a conversion that nothing interrupts writes: names and sha256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_files, "SHARD_BYTES", SHARD_BYTES)
        execute(planned(source), out)
    return digests(out)


def write_tiny(folder: Path, dims: Mapping[str, int] = TINY) -> None:
    """Write a checkpoint of a DeepSeek-V3 with these dimensions."""
    write_sample("deepseek_v3", folder, "bf16", changes=dims)


def planned(source: Path, **options: Any) -> Plan:
    """Return the plan of a conversion."""
    return make_plan(open_checkpoint(source), Options(**options))


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


class StopError(Exception):
    """Ends a conversion, as the end of its process would."""


def begun(plan: Plan, out: Path, share: float = 0.5) -> Path:
    """Convert until so much is written, and return the journal of the unfinished folder."""
    written: list[int] = []

    def stop(nbytes: int) -> None:
        written.append(nbytes)
        if sum(written) > plan.nbytes * share:
            raise StopError

    with pytest.raises(StopError):
        execute(plan, out, workload=Workload(1, 4000, 10**9), progress=stop)
    (journal,) = out.glob(JOURNALS)
    assert len(journal.read_text().splitlines()) > 2
    return journal


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """Return what the lines of a journal say, each after its checksum."""
    return [json.loads(line.partition(" ")[2]) for line in journal.read_text().splitlines()]


def child(*argv: str, code: str = CHILD) -> list[str]:
    """Return how the command is started, with these arguments."""
    return [sys.executable, "-c", code, *argv]


class AtOnce:
    """In the place of a pool of threads: what happens has one order."""

    def __init__(self, threads: int, *, initializer: Callable[[], None] | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *given: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*given))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        pass


def computing_here(patch: pytest.MonkeyPatch) -> None:
    """Compute in the thread of the test; what waits for the disk still has threads of its own."""
    patch.setattr("mla_tools.execute.ThreadPoolExecutor", AtOnce)
