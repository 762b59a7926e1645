"""What holds for all tests."""

from __future__ import annotations

import os

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="whole products instead of pairs; writes docs/matrix.md"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a run of everything has."""
    if not config.getoption("--all"):
        rare = ["only_in_all", "oracle"] if unchanged() else ["only_in_all"]
        left_out = {item for item in items if any(map(item.get_closest_marker, rare))}
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]
