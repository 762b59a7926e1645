"""Wall time and peak memory of `mla-sanitize convert`, beside mlx-lm and beside copying.

    python benchmarks/convert.py [--layers 4] [--rounds 2] [--routes bf16-q,...] [--folder DIR]

Checkpoints of random bytes in the widths of GLM-4.7-Flash (1.0 GB of bf16 a layer). What `mlx_lm.convert`
can read is measured beside it; what moves codes or only renames is measured beside `cp`: the time to
read the source and to copy the output. Each command runs in a process of its own, the tools in turn,
and the best of the rounds counts. Before each of them as much memory as the files take is used once,
because a virtual machine may have to get it from its host first, which can take longer than the work.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import tempfile
import time
from pathlib import Path

from large import Cost, build, machine, ours, run, theirs, weights

# route -> format of the source, flags, whether mlx-lm can do the same. FP8 it reads as DeepSeek V3 alone.
ROUTES = {
    "bf16-q": ("bf16", ["-q"], True),
    "fp8-q": ("fp8", ["-q"], True),
    "bf16": ("bf16", [], False),
    "int4": ("ct-int4", [], False),
    "fp8-ue8m0": ("fp8-ue8m0", [], False),
    "mxfp4": ("quark-mxfp4", [], False),
}
DEEPSEEK = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}


def main() -> None:
    """Measure and print one line for each route and tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--routes", default=",".join(ROUTES))
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    print(f"{datetime.date.today()}  {machine()}", flush=True)
    for route in args.routes.split(","):
        work = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            _measure(route, args.layers, args.rounds, work)
        finally:
            shutil.rmtree(work)


def _measure(route: str, layers: int, rounds: int, work: Path) -> None:
    fmt, flags, mlx_lm_too = ROUTES[route]
    source, out = work / "source", work / "out"
    build(source, layers, fmt, DEEPSEEK if fmt == "fp8" else None)
    nbytes = weights(source)
    tools = {"mla-sanitize": ours(source, out, *flags)}
    if mlx_lm_too:
        tools["mlx_lm.convert"] = theirs(source, out, *flags)
    best: dict[str, Cost] = {}
    copying = float("inf")
    for _ in range(rounds):
        for tool, command in tools.items():
            shutil.rmtree(out, ignore_errors=True)
            _use_memory(nbytes)
            cost = run(command, out)
            old = best.get(tool, Cost(float("inf"), 0, float("inf")))
            best[tool] = Cost(
                min(cost.seconds, old.seconds), max(cost.peak, old.peak), min(cost.first, old.first)
            )
            if tool == "mla-sanitize":
                written = sum(path.stat().st_size for path in out.iterdir())
                copying = min(copying, _copying(source, out, work))
    print(f"\n{route}: {nbytes / 1e9:.2f} GB to {written / 1e9:.2f} GB; reading and copying: {copying:.1f} s")
    base = best.get("mlx_lm.convert")
    for tool, (seconds, peak, first) in best.items():
        ratio = f"{seconds / copying:.2f} x copying"
        if base is not None:
            ratio += f", {seconds / base.seconds:.2f} x mlx-lm's time, {peak / base.peak:.2f} x its memory"
        begun = f"weights after {first:.1f} s"
        print(f"  {tool:<16} {seconds:6.1f} s  {peak / 1e6:8.0f} MB  {begun}  {ratio}", flush=True)


def _copying(source: Path, out: Path, work: Path) -> float:
    """Return the seconds that it takes to read the source and to copy the output."""
    copy = work / "copy"
    _use_memory(weights(source))
    start = time.perf_counter()
    run(["sh", "-c", f"cat {source}/*.safetensors > /dev/null && cp -r {out} {copy}"])
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def _use_memory(nbytes: int) -> None:
    """Touch and give back twice so much memory, in a process of its own."""
    size = 2 * nbytes // 4096 * 4096
    run([sys.executable, "-c", f"held = bytearray({size}); held[::4096] = bytes({size // 4096})"])


if __name__ == "__main__":
    main()
