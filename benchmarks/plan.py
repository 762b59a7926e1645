"""Seconds and memory to plan the largest checkpoints: DeepSeek-V3.2, Kimi K2.5, and one of Kimi K3's size.

    python benchmarks/plan.py

The listings are those of tests/headers. Reading the 163 headers of DeepSeek-V3.2 from disk is measured on
files of that shape without data, and so is the whole command `mla-sanitize plan`, from its call to its end.
Kimi K3's names are those of its table, with 896 experts in MXFP4: 497,052 stored tensors in 96 files.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from listing import load

from mla_tools.architectures import table_of
from mla_tools.codecs import part_name
from mla_tools.files.safetensors import layout, read_header
from mla_tools.options import Options
from mla_tools.plan import make_steps
from mla_tools.samples import format_of, sample_config
from mla_tools.spec import Spec

SHARDS = 163

# The size of Kimi K3: 93 layers, of which every fourth and the last have full attention.
K3_LAYERS = 93
K3 = {
    "num_hidden_layers": K3_LAYERS,
    "num_experts": 896,
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "routed_expert_hidden_size": 3584,
    "num_attention_heads": 96,
}


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
    stored, config = kimi_k3()
    for name, held, keys, files in (
        ("deepseek_v32", listing.stored, listing.config, SHARDS),
        ("kimi_k3", stored, config, 96),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write_headers(Path(folder), held, files)
            (Path(folder) / "config.json").write_text(json.dumps(keys))
            seconds, peak = command(folder)
        print(
            f"mla-sanitize plan, {name}, {len(held):,} stored tensors: {seconds:.2f} s, {peak / 1e6:.0f} MB"
        )


def command(folder: str) -> tuple[float, int]:
    """Return the seconds from a call of `mla-sanitize plan` to its end, best of three, and its peak bytes."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(["mla-sanitize", "plan", folder], check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - start)
    child = subprocess.run([sys.executable, "-c", PEAK, folder], check=True, capture_output=True, text=True)
    return best, int(child.stderr) * 1024


# Linux counts into ru_maxrss what the process was before it became the command, VmHWM does not.
PEAK = """
import sys
from mla_tools.cli import main
main(["plan", sys.argv[1]])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def kimi_k3() -> tuple[dict[str, Spec], dict[str, Any]]:
    """Return the stored tensors and the config of a checkpoint of Kimi K3's size."""
    config = sample_config("kimi_k3")
    text = config["text_config"]
    text |= K3
    full = [n for n in range(1, K3_LAYERS + 1) if n % 4 == 0 or n == K3_LAYERS]
    rest = [n for n in range(1, K3_LAYERS + 1) if n not in full]
    text["linear_attn_config"] |= {"num_heads": 96, "kda_layers": rest, "full_attn_layers": full}
    family, table = table_of(config)
    found: dict[str, Spec] = {}
    for name, (shape, _) in table.aimed("hub").targets().items():
        fmt = "ct-mxfp4" if ".experts." in name else "bf16"
        codec, dtype = format_of(name, shape, family, fmt)
        found |= {part_name(name, part): spec for part, spec in codec.encoded(Spec(shape, dtype)).items()}
    return found, config


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


def write_headers(folder: Path, stored: dict[str, Spec], count: int = SHARDS) -> list[Path]:
    """Write sparse files with the headers of a checkpoint and holes for its data."""
    names = list(stored)
    paths = []
    for number in range(count):
        held = {name: stored[name] for name in names[number::count]}
        laid = layout(held, {})
        path = folder / f"model-{number:05d}.safetensors"
        with path.open("wb") as file:
            file.write(laid.header)
            file.truncate(laid.size)
        paths.append(path)
    return paths


if __name__ == "__main__":
    main()
