"""A small MLA attention: its sizes, arrays of it, and mlx-lm's class for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3
from support import same

from mla_tools.quantization import QuantSpec

__all__ = ["DTYPES", "MODES", "H", "N", "R", "V", "Weights", "random", "same_weights", "tiny_deepseek"]

# Heads, and of each the rows of K and of V; the rank.
H, N, V, R = 4, 64, 32, 128
MODES = [QuantSpec(mode) for mode in ("affine", "mxfp4", "mxfp8", "nvfp4")]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]

Weights = dict[str, mx.array]


def same_weights(left: Weights, right: Weights) -> bool:
    """Return whether two dicts have the same names and, to the bit, the same arrays."""
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def random(*shape: int, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> mx.array:
    """Return numbers as weights are: normal, of 0.05."""
    return (mx.random.normal(shape, key=mx.random.key(seed)) * 0.05).astype(dtype)


def tiny_deepseek() -> Any:
    """Return mlx-lm's class with one layer of these sizes."""
    config = {
        "model_type": "deepseek_v3",
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": H,
        "num_key_value_heads": H,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": V,
        "qk_nope_head_dim": N,
        "kv_lora_rank": R,
    }
    return deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
