"""Wall time and peak memory of `mla-sanitize convert -q` beside `mlx_lm.convert -q` on the same files.

    python benchmarks/convert.py [--layers 4] [--folder DIR] [--json FILE]

The checkpoint has the widths of GLM-4.7-Flash (1.0 GB of bf16 a layer, 64 experts) and random weights;
with 4 layers it takes 4 GB and as much again for the outputs. Each tool runs in a process of its own,
alternating, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mla_tools.architectures import table_of
from mla_tools.files.safetensors import Writer, layout
from mla_tools.sample import write_tokenizer
from mla_tools.spec import DType, Spec

CONFIG = {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def build(folder: Path, layers: int) -> int:
    """Write a checkpoint of random bf16 weights, a shard for each layer; return its bytes."""
    config = {**CONFIG, "num_hidden_layers": layers}
    _, table = table_of(config)
    shards: dict[str, dict[str, Spec]] = {}
    for rule in table.rules:
        if rule.alternative:
            continue
        for key in rule.applications():
            for name, shape in zip(rule.sources(key), rule.source_shapes(), strict=True):
                layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
                dtype = DType.F32 if name.endswith("bias") else DType.BF16
                shards.setdefault(layer, {})[name] = Spec(tuple(map(int, shape)), dtype)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    # One block of noise is cut differently for each tensor: random enough, and quick to write.
    noise = (rng.standard_normal(1 << 24).astype(np.float32) * 0.02).view(np.uint32) >> 16
    pool = noise.astype(np.uint16)
    total = 0
    for number, specs in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with Writer(folder / file, layout(specs, {"format": "pt"})) as writer:
            for name, spec in specs.items():
                if spec.dtype is DType.F32:
                    data = np.zeros(spec.size, np.float32)
                else:
                    start = int(rng.integers(0, pool.size // 2))
                    data = np.resize(pool[start:], spec.size)
                writer.write(name, 0, data.view(np.uint8))
                total += spec.nbytes
            writer.finish()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return total


def run(command: list[str]) -> tuple[float, int]:
    """Run a command; return its wall seconds and its peak resident bytes, children not counted."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit


def main() -> None:
    """Measure and print one row for each tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        source, out = work / "source", work / "out"
        nbytes = build(source, args.layers)
        paths = [str(source), "--mlx-path", str(out), "-q"]
        tools = {
            "mla-sanitize": [sys.executable, "-m", "mla_tools.cli", "convert", *paths],
            "mlx_lm.convert": [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", *paths],
        }
        best: dict[str, tuple[float, int]] = {}
        for _ in range(args.rounds):
            for tool, command in tools.items():
                shutil.rmtree(out, ignore_errors=True)
                seconds, peak = run(command)
                old = best.get(tool, (float("inf"), 0))
                best[tool] = (min(seconds, old[0]), max(peak, old[1]))
        shutil.rmtree(out)
        start = time.perf_counter()
        shutil.copytree(source, out)
        copy = time.perf_counter() - start
    finally:
        shutil.rmtree(work)
    base = best["mlx_lm.convert"]
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "source_bytes": nbytes,
        "cp_seconds": round(copy, 2),
    }
    print(f"{figures['date']}  {figures['machine']}")
    print(f"{nbytes / 1e9:.2f} GB of bf16 to affine 4 bit; copying the source takes {copy:.1f} s")
    for tool, (seconds, peak) in best.items():
        figures[tool] = {"seconds": round(seconds, 2), "peak_bytes": peak}
        ratio = f"{seconds / base[0]:.2f} x time, {peak / base[1]:.2f} x memory"
        print(f"{tool:<16} {seconds:6.1f} s  {peak / 1e6:8.0f} MB  {ratio}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
