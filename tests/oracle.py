"""When the oracle's own tests must run: what it consists of, and what that was when all of them passed.

Its tests (test_reference.py) show that it is right, and nothing of mla_tools takes part in them. They run
for a few families, and for all where anything differs from oracle.lock. `make oracle` runs them all and, if
they pass, writes the lock: `python tests/oracle.py`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["found", "locked", "unchanged"]

TESTS = Path(__file__).parent
LOCK = TESTS / "oracle.lock"
FILES = ("reference.py", "reference_v4.py", "test_reference.py")
# pyproject.toml names one version of the first, so that a difference is somebody's decision.
PINNED = ("mlx-lm", "torch", "transformers")
OTHERS = ("mlx", "numpy", "safetensors")


def found() -> dict[str, dict[str, Any]]:
    """Return what the oracle consists of here: hashes of its files, and versions."""
    return {
        "files": {name: hashlib.sha256((TESTS / name).read_bytes()).hexdigest() for name in FILES},
        "pinned": {name: version(name).partition("+")[0] for name in PINNED},
        "others": {
            **{name: version(name) for name in OTHERS},
            "machine": f"{sys.platform} {platform.machine()}",
        },
    }


def locked() -> dict[str, dict[str, Any]]:
    """Return what the oracle consisted of when all of its tests passed."""
    lock: dict[str, dict[str, Any]] = json.loads(LOCK.read_text())
    return lock


def unchanged() -> bool:
    """Return whether all of its tests passed with the oracle as it is here."""
    return found() == locked()


if __name__ == "__main__":
    LOCK.write_text(json.dumps(found(), indent=2) + "\n")
