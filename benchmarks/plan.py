"""Seconds to plan a checkpoint as large as DeepSeek-V3.2 (92,425 stored tensors) from its headers.

    python benchmarks/plan.py

The listing is that of tests/headers; reading 163 headers from disk is measured on files of that shape
without data.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from listing import load

from mla_tools.files.safetensors import layout, read_header
from mla_tools.plan import Options, make_steps
from mla_tools.spec import Spec

SHARDS = 163


def main() -> None:
    """Measure and print."""
    listing = load("deepseek_v32")
    best = {"plan": float("inf"), "headers": float("inf")}
    for _ in range(5):
        start = time.process_time()
        made = make_steps(listing.stored, listing.config, Options())
        best["plan"] = min(best["plan"], time.process_time() - start)
        assert not made.problems
    with tempfile.TemporaryDirectory() as folder:
        paths = write_headers(Path(folder), listing.stored)
        for _ in range(3):
            start = time.process_time()
            count = sum(len(read_header(path).entries) for path in paths)
            best["headers"] = min(best["headers"], time.process_time() - start)
            assert count == len(listing.stored)
    print(f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} cores, {platform.system()}")
    print(
        f"reading {SHARDS} headers: {best['headers']:.2f} s, planning {count:,} tensors: {best['plan']:.2f} s"
    )


def write_headers(folder: Path, stored: dict[str, Spec]) -> list[Path]:
    """Write sparse files with the headers of a checkpoint and holes for its data."""
    names = list(stored)
    paths = []
    for number in range(SHARDS):
        held = {name: stored[name] for name in names[number::SHARDS]}
        laid = layout(held, {})
        path = folder / f"model-{number:05d}.safetensors"
        with path.open("wb") as file:
            file.write(laid.header)
            file.truncate(laid.size)
        paths.append(path)
    return paths


if __name__ == "__main__":
    main()
