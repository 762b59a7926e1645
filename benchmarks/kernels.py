"""MB/s of our encoders beside `mx.quantize` on one CPU core, for each mode and dtype, in one run.

    python benchmarks/encoders.py [--elements 8388608] [--rounds 5] [--json FILE]

MLX computes on a CPU in one thread for each stream, and here there is one stream, so one core works at a
time. What counts is the CPU time of the process (user and system, all threads), which other processes on
the machine disturb less than the wall clock. The tools alternate, and the best round of each counts. The
array has the elements of a slab, 0.02 times normal noise; MB are those of the input, in its own dtype.
Affine and mxfp8 are left to MLX, and are measured for the record.

2026-11-21, AMD EPYC (Zen 3, virtual, shared), mlx 0.32.4, pinned to one core with taskset, 3 rounds:

    mode    dtype        mx.quantize          ours   ratio   peak bytes an element
    mxfp4   bfloat16         22 MB/s      422 MB/s    18.7   41.4 -> 1.3
    mxfp4   float16           8 MB/s      250 MB/s    31.3   41.4 -> 1.6
    mxfp4   float32          50 MB/s      581 MB/s    11.7   77.3 -> 1.9
    nvfp4   bfloat16         24 MB/s      491 MB/s    20.6   77.1 -> 1.4
    nvfp4   float16          21 MB/s      284 MB/s    13.6   77.1 -> 2.0
    nvfp4   float32          49 MB/s      608 MB/s    12.3   77.1 -> 2.1
    mxfp8   bfloat16        354 MB/s             -       -   5.9
    mxfp8   float16         110 MB/s             -       -   5.9
    mxfp8   float32         648 MB/s             -       -   9.8
    affine  bfloat16        555 MB/s             -       -   0.6
    affine  float16         346 MB/s             -       -   0.6
    affine  float32        1298 MB/s             -       -   0.6
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mla_tools.kernels import encode_mxfp4, encode_nvfp4

OURS = {"mxfp4": encode_mxfp4, "nvfp4": encode_nvfp4}
WIDTH = 2048


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of one call, evaluated."""
    start = time.process_time()
    mx.eval(work())
    return time.process_time() - start


def peak(work: Callable[[], Any]) -> int:
    """Return the bytes that one call holds at its peak, its result included."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return mx.get_peak_memory() - before


def processor() -> str:
    """Return the name of the processor as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(array: mx.array, mode: str, rounds: int) -> dict[str, float]:
    """Return MB/s and peak bytes per element of MLX and, where there is one, of our encoder."""
    mx.eval(array)

    def theirs() -> Any:
        return mx.quantize(array, mode=mode)

    tools: dict[str, Callable[[], Any]] = {"mlx": theirs}
    if mode in OURS:
        tools["ours"] = lambda: OURS[mode](array)
        weight, scales = theirs()
        parts = OURS[mode](array)
        assert mx.array_equal(parts["weight"], weight)
        assert mx.array_equal(parts["scales"], scales)
        del weight, scales, parts
    row = {
        f"{tool}_peak_bytes_per_element": round(peak(work) / array.size, 1) for tool, work in tools.items()
    }
    best = dict.fromkeys(tools, float("inf"))
    for _ in range(rounds):
        for tool, work in tools.items():
            best[tool] = min(best[tool], seconds(work))
    return row | {f"{tool}_mb_per_s": round(array.nbytes / best[tool] / 1e6, 1) for tool in tools}


def main() -> None:
    """Measure and print one row for each mode and dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=1 << 23)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    noise = 0.02 * mx.random.normal((args.elements // WIDTH, WIDTH))
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "mlx": importlib.metadata.version("mlx"),
        "elements": noise.size,
    }
    print(f"{figures['date']}  {figures['machine']}, mlx {figures['mlx']}; CPU time, one MLX stream")
    print(f"{'mode':<8}{'dtype':<10}{'mx.quantize':>14}{'ours':>14}{'ratio':>8}   peak bytes an element")
    for mode in ("mxfp4", "nvfp4", "mxfp8", "affine"):
        for dtype in (mx.bfloat16, mx.float16, mx.float32):
            name = str(dtype).split(".")[-1]
            row = figures[f"{mode} {name}"] = measure(noise.astype(dtype), mode, args.rounds)
            ours, ratio, memory = "-", "-", f"{row['mlx_peak_bytes_per_element']:.1f}"
            if mode in OURS:
                row["ratio"] = round(row["ours_mb_per_s"] / row["mlx_mb_per_s"], 1)
                ours, ratio = f"{row['ours_mb_per_s']:.0f} MB/s", f"{row['ratio']:.1f}"
                memory += f" -> {row['ours_peak_bytes_per_element']:.1f}"
            theirs = f"{row['mlx_mb_per_s']:.0f} MB/s"
            print(f"{mode:<8}{name:<10}{theirs:>14}{ours:>14}{ratio:>8}   {memory}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
