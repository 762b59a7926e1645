"""MB/s of our kernels for a CPU beside MLX's own on one core, in one run.

    python benchmarks/kernels.py [--elements 4194304] [--rounds 5] [--json FILE]

MLX computes on a CPU in one thread for each stream, and here there is one stream, so one core works at a
time. What counts is the CPU time of the process (user and system, all threads), which other processes on
the machine disturb less than the wall clock. The tools alternate, and the best round of each counts. The
array has the elements of a slab, 0.02 times normal noise; MB are those of the input, in its own dtype.
Affine is 4 bits in groups of 64. E2M1, for which MLX has no function, is beside looking a table up.

2026-11-21, AMD EPYC (virtual, shared), mlx 0.32.4, pinned to one core with taskset:

                                 MLX          ours   ratio   peak bytes for each byte
    mxfp4 bfloat16           26 MB/s      471 MB/s    18.2   20.7 -> 1.0
    mxfp4 float16             7 MB/s      232 MB/s    31.0   20.7 -> 1.3
    mxfp4 float32            67 MB/s      690 MB/s    10.3   19.3 -> 0.8
    nvfp4 bfloat16           32 MB/s      631 MB/s    20.0   38.5 -> 1.1
    nvfp4 float16            27 MB/s      362 MB/s    13.6   38.5 -> 1.4
    nvfp4 float32            49 MB/s      516 MB/s    10.6   19.3 -> 0.9
    affine bfloat16         445 MB/s      899 MB/s     2.0   0.3 -> 1.1
    affine float16          287 MB/s      567 MB/s     2.0   0.3 -> 1.1
    affine float32         1087 MB/s     1533 MB/s     1.4   0.2 -> 0.5
    E4M3 to float32         324 MB/s      650 MB/s     2.0   4.0 -> 9.0
    E2M1 to float32          56 MB/s      189 MB/s     3.4   12.0 -> 16.0
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mla_tools.kernels import decode_e2m1, decode_e4m3, encode_affine, encode_mxfp4, encode_nvfp4

Work = Callable[[], Sequence[mx.array]]

ENCODERS: dict[str, Callable[[mx.array], dict[str, mx.array]]] = {
    "mxfp4": encode_mxfp4,
    "nvfp4": encode_nvfp4,
    "affine": lambda array: encode_affine(array, 64, 4),
}
WIDTH = 2048


def seconds(work: Work) -> float:
    """Return the CPU seconds of one call, evaluated."""
    start = time.process_time()
    mx.eval(work())
    return time.process_time() - start


def peak(work: Work) -> int:
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


def measure(name: str, theirs: Work, ours: Work, nbytes: int, rounds: int) -> dict[str, Any]:
    """Print and return MB/s and peak bytes of MLX and of our kernel, after a look whether they agree."""
    pairs = list(zip(theirs(), ours(), strict=True))
    assert all(mx.array_equal(expected, found) for expected, found in pairs)
    del pairs
    tools = {"mlx": theirs, "ours": ours}
    peaks = {tool: peak(work) / nbytes for tool, work in tools.items()}
    best = dict.fromkeys(tools, float("inf"))
    for _ in range(rounds):
        for tool, work in tools.items():
            best[tool] = min(best[tool], seconds(work))
    rates = {tool: nbytes / best[tool] / 1e6 for tool in tools}
    ratio = rates["ours"] / rates["mlx"]
    columns = "".join(f"{rates[tool]:>9.0f} MB/s" for tool in tools)
    print(f"{name:<18}{columns}{ratio:>8.1f}   {peaks['mlx']:.1f} -> {peaks['ours']:.1f}", flush=True)
    return {"mb_per_s": rates, "peak_bytes_per_byte": peaks, "ratio": ratio}


def main() -> None:
    """Measure and print one row for each operation and dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    noise = 0.02 * mx.random.normal((args.elements // WIDTH, WIDTH), key=mx.random.key(0))
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "mlx": importlib.metadata.version("mlx"),
        "elements": noise.size,
    }
    print(f"{figures['date']}  {figures['machine']}, mlx {figures['mlx']}; CPU time, one MLX stream")
    print(f"{'':<18}{'MLX':>14}{'ours':>14}{'ratio':>8}   peak bytes for each byte")
    for mode, encode in ENCODERS.items():
        for dtype in (mx.bfloat16, mx.float16, mx.float32):
            array = noise.astype(dtype)
            mx.eval(array)
            name = f"{mode} {str(dtype).split('.')[-1]}"
            figures[name] = measure(
                name,
                partial(mx.quantize, array, mode=mode),
                lambda encode=encode, array=array: tuple(encode(array).values()),  # type: ignore[misc]
                array.nbytes,
                args.rounds,
            )
    # Every code but NaN, which is not equal to itself.
    codes = mx.random.randint(0, 127, noise.shape, key=mx.random.key(1)).astype(mx.uint8)
    table = mx.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    mx.eval(codes, table)

    def looked_up() -> mx.array:
        return table[mx.stack([codes & 15, codes >> 4], axis=-1)].reshape(len(codes), -1)

    decoders: dict[str, tuple[Work, Work]] = {
        "E4M3 to float32": (lambda: [mx.from_fp8(codes, mx.float32)], lambda: [decode_e4m3(codes)]),
        "E2M1 to float32": (lambda: [looked_up()], lambda: [decode_e2m1(codes)]),
    }
    for name, (theirs, ours) in decoders.items():
        figures[name] = measure(name, theirs, ours, codes.nbytes, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
