"""Seconds and memory of `sanitize` on the weights of DeepSeek-V3, beside those of mlx-lm's own class.

    python benchmarks/sanitize.py

The 91,991 arrays have the names, shapes and dtypes of the real checkpoint (tests/headers) and are lazy, as
`mx.load` gives them; nothing is evaluated. Each call has a process of its own, and they take turns. Seconds
are those of the processor. The second call of ours gets the result of the first.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ROUNDS = 5


def main() -> None:
    """Measure and print, or make one of the measurements."""
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
        return
    found: dict[str, list[dict[str, float]]] = {"mlx-lm": [], "mla-tools": []}
    for _ in range(ROUNDS):
        for which, results in found.items():
            done = subprocess.run(
                [sys.executable, __file__, which], capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout))
    print(f"{datetime.date.today()}  {platform.machine()}, {os.cpu_count()} cores, {platform.system()}")
    theirs, ours = (
        {key: statistics.median(result[key] for result in results) for key in results[0]}
        for results in found.values()
    )
    for key, unit in (("seconds", "s"), ("megabytes", "MB")):
        print(f"{theirs[key]:7.2f} {unit} mlx-lm {ours[key]:7.2f} {unit} mla-tools", end="")
        print(f"   ratio {ours[key] / theirs[key]:.2f}")
    print(f"{ours['again']:7.3f} s  mla-tools on its own result")


def measure(which: str) -> dict[str, float]:
    """Return the seconds and the growth in megabytes of one call, in this process."""
    import mlx.core as mx
    from listing import load
    from mlx_lm.models import deepseek_v3

    from mla_tools.weights import sanitize

    listing = load("deepseek_v3")
    weights = {
        name: mx.zeros(spec.shape, getattr(mx, spec.dtype.mlx)) for name, spec in listing.stored.items()
    }
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(listing.config))
    before, start = resident(), time.process_time()
    made = model.sanitize(dict(weights)) if which == "mlx-lm" else sanitize(weights, listing.config)
    seconds, grown = time.process_time() - start, resident() - before
    found = {"seconds": seconds, "megabytes": grown}
    if which != "mlx-lm":
        start = time.process_time()
        again = sanitize(made, listing.config)
        found["again"] = time.process_time() - start
        assert again.keys() == made.keys()
    return found


def resident() -> float:
    """Return the megabytes of this process in memory."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    done = subprocess.run(["ps", "-o", "rss=", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6


if __name__ == "__main__":
    main()
