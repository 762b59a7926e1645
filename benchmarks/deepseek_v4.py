"""Tokens per second and cache bytes of the DeepSeek V4 model beside mlx-vlm's class, with the same weights.

    python benchmarks/deepseek_v4.py [--prompt 2048] [--decode 64] [--dtype float32] [--json FILE]

The config has the compress ratios, the window and the hyper-connections of V4-Flash, and is small
everywhere else, so that a CPU can run it; the weights are random. Both read the prompt in chunks of
2048 tokens, as mlx_lm.generate does, and then decode token by token. They alternate, and the best of
the rounds counts. mlx-vlm must be installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

CONFIG = {
    "model_type": "deepseek_v4",
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_lora_rank": 64,
    "o_groups": 4,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "num_hash_layers": 3,
    "sliding_window": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 64,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": None,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6,
    "compress_ratios": [0, 0, 4, 128, 4, 128],
}
CHUNK = 2048

Step = Callable[[mx.array, list[Any]], mx.array]


def models(dtype: mx.Dtype) -> dict[str, tuple[Step, Callable[[], list[Any]]]]:
    """Return for each class the function that makes logits, and the one that makes a cache."""
    from mlx_vlm.models.deepseek_v4.config import ModelConfig
    from mlx_vlm.models.deepseek_v4.language import LanguageModel

    from mla_tools.models.deepseek_v4 import Model, ModelArgs

    mx.random.seed(0)
    ours = Model(ModelArgs.from_dict(CONFIG))
    keep = ours.cast_predicate
    experts, top = CONFIG["n_routed_experts"], CONFIG["num_experts_per_tok"]

    def drawn(name: str, array: mx.array) -> mx.array:
        if name.endswith("tid2eid"):
            return mx.argsort(mx.random.uniform(shape=(array.shape[0], experts)))[:, :top].astype(mx.int32)
        if name.endswith(("norm.weight", "scale")):
            values = 1 + 0.1 * mx.random.normal(array.shape)
        else:
            values = mx.random.normal(array.shape) * array.shape[-1] ** -0.5
        # mlx-vlm's norms return the wider of the two dtypes.
        return values.astype(dtype if keep(name) or "norm" in name or "compressor.w" in name else mx.float32)

    weights = {name: drawn(name, array) for name, array in tree_flatten(ours.parameters())}
    ours.load_weights(list(weights.items()))
    theirs = LanguageModel(ModelConfig.from_dict({**CONFIG, "num_nextn_predict_layers": 0}))
    theirs.load_weights(list(weights.items()))
    for model in (ours, theirs):
        model.eval()
        mx.eval(model.parameters())
    return {
        "mla-tools": (ours, ours.make_cache),
        "mlx-vlm": (lambda ids, cache: theirs(ids, cache=cache).logits, theirs.make_cache),
    }


def measure(step: Step, make_cache: Callable[[], list[Any]], prompt: int, decode: int) -> dict[str, float]:
    """Return tokens per second of the prompt and of decoding, and the cache's bytes at the end."""
    cache = make_cache()
    ids = mx.random.randint(0, CONFIG["vocab_size"], (1, prompt + decode))
    mx.eval(ids)
    start = time.perf_counter()
    for begin in range(0, prompt, CHUNK):
        mx.eval(step(ids[:, begin : min(begin + CHUNK, prompt)], cache)[:, -1])
    middle = time.perf_counter()
    for position in range(prompt, prompt + decode):
        mx.eval(step(ids[:, position : position + 1], cache))
    end = time.perf_counter()
    return {
        "prefill": prompt / (middle - start),
        "decode": decode / (end - middle),
        "bytes": float(sum(layer.nbytes for layer in cache)),
    }


def main() -> None:
    """Measure and print one row for each class."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    classes = models(getattr(mx, args.dtype))
    best: dict[str, dict[str, float]] = {}
    for round_ in range(args.rounds + 1):
        for name, (step, make_cache) in classes.items():
            found = measure(step, make_cache, args.prompt, args.decode)
            if round_:  # the first compiles
                best[name] = {key: max(value, best.get(name, found)[key]) for key, value in found.items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    print(f"{datetime.date.today()}  {machine}  {args.dtype}, {args.prompt} tokens, then {args.decode}")
    base = best["mlx-vlm"]
    for name, found in best.items():
        ratios = "  ".join(f"{found[key] / base[key]:.2f} x {key}" for key in found)
        figures = f"{found['prefill']:8.1f} {found['decode']:7.1f} tokens/s {found['bytes'] / 1e6:7.2f} MB"
        print(f"{name:<10} {figures}  {ratios}")
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, **vars(args), **best}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
