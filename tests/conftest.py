"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from oracle import unchanged

# The tests run in as many processes as there are cores, and on tiny models: threads in which torch and the
# BLAS of both libraries wait for one another would double the time. Read when they are imported.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# A slow machine is no defect: speed is measured in benchmarks.
settings.register_profile("mla-tools", deadline=None)
settings.load_profile("mla-tools")

# What takes longest begins first, so that no process is left with a long file at the end; measured, the
# longest first.
LONGEST = (
    "models/test_deepseek_v4.py",
    "test_convert_deepseek_v4.py",
    "attacks/test_fuzzers.py",
    "test_convert_nvfp4.py",
    "integrations/test_mlx_lm.py",
    "test_convert_transformers.py",
    "models/test_bundle.py",
    "models/test_deepseek_v4_cache.py",
    "models/test_deepseek_v4_training.py",
    "test_examples_mlx_lm.py",
    "test_plan.py",
    "test_matrix.py",
    "test_golden.py",
    "test_console.py",
    "test_output.py",
    "test_samples.py",
    "test_distributed.py",
    "test_overflow.py",
    "test_memory.py",
    "attacks/test_outputs.py",
    "test_sanitize.py",
    "test_convert_mlx_lm.py",
    "test_precision.py",
    "test_isolation.py",
    "test_convert_integers.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="whole products instead of pairs; writes docs/matrix.md"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a run of everything has, and bring the longest files to the front."""
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    if not config.getoption("--all"):
        rare = ["only_in_all", "oracle"] if unchanged() else ["only_in_all"]
        left_out = {item for item in items if any(map(item.get_closest_marker, rare))}
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Keep the collector of garbage away from what is there for good: all modules, and all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Let no test wait for a disk: what a sync is good for, the power cuts in forgetful.py show."""
    with pytest.MonkeyPatch.context() as patch:
        # What is no open file is an error still.
        patch.setattr(os, "fsync", lambda fd: os.fstat(fd) and None)
        yield


class Opens:
    """In the place of the child process that opens a tokenizer, for which it imports transformers."""

    def __init__(self, config: Any, companions: Any, *, trusted: bool) -> None:
        pass

    def said(self) -> str:
        return ""

    def cancel(self) -> None:
        pass


@pytest.fixture(autouse=True)
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open no tokenizer in a conversion of this process; test_verify_tokenizer.py puts the check back."""
    monkeypatch.setattr("mla_tools.verify.TokenizerCheck", Opens)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give each test the same random numbers of MLX, and none a state that a thread of another one has left.

    To evaluate such a state, whose stream is gone, ends the process.
    """
    if mlx := sys.modules.get("mlx.core"):
        mlx.random.seed(0)


@pytest.fixture
def agreeable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the child process that asks mlx-lm, and return what was called on it."""
    calls: list[str] = []

    class Check:
        def __init__(self, config: Any, stored: Any) -> None:
            calls.append("start")

        def look(self) -> None:
            pass

        def wait(self) -> None:
            calls.append("wait")

        def cancel(self) -> None:
            calls.append("cancel")

    monkeypatch.setattr("mla_tools.verify.ManifestCheck", Check)
    return calls
