"""Seconds to plan the largest checkpoints from their headers: DeepSeek-V3.2 and Kimi K2.5 in int4.

    python benchmarks/plan.py

The listings are those of tests/headers; reading the 163 headers of DeepSeek-V3.2 from disk is measured on
files of that shape without data.
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
from mla_tools.options import Options
from mla_tools.plan import make_steps
from mla_tools.spec import Spec

SHARDS = 163


def main() -> None:
    """Measure and print."""
    listing = load("deepseek_v32")
    headers = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_headers(Path(folder), listing.stored)
        for _ in range(3):
            start = time.process_time()
            count = sum(len(read_header(path).entries) for path in paths)
            headers = min(headers, time.process_time() - start)
            assert count == len(listing.stored)
    print(f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} cores, {platform.system()}")
    print(f"reading {SHARDS} headers: {headers:.2f} s")
    for name in ("deepseek_v32", "kimi_k25_int4"):
        count, seconds = len(load(name).stored), planning(name)
        print(f"planning {name}, {count:,} stored tensors: {seconds:.2f} s")


def planning(name: str) -> float:
    """Return the seconds of one core that the plan of a listing takes, the best of five times."""
    listing = load(name)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        made = make_steps(listing.stored, listing.config, Options())
        best = min(best, time.process_time() - start)
        assert not made.problems
    return best


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
