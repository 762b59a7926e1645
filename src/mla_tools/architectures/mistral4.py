"""Mistral Small 4: the decoder of DeepSeek V3 with fused experts and a softmax router.

On the hub it is the language model of a mistral3 config, beside a vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tools.architectures import blocks
from mla_tools.architectures.family import NOT_FOR_MLX_VLM, Family, wrapped
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import nested_rope, rope_parameters
from mla_tools.errors import Problem
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY", "MULTIMODAL"]


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    hidden, inner = g.dim("hidden_size"), g.dim("moe_intermediate_size")
    dense, sparse = g.moe_layers()
    layers, moe = {"l": g.layers()}, {"l": sparse}
    mlp = "model.layers.{l}.mlp"
    rules, tied = blocks.tied_embeddings(g)
    rules += blocks.decoder_norms(g, layers) + blocks.mla_attention(g, layers)
    rules += blocks.mlp(mlp, hidden, g.dim("intermediate_size"), {"l": dense})
    if sparse:
        count, shared = g.count("n_routed_experts"), g.optional("n_shared_experts")
        rules += blocks.linear(f"{mlp}.gate", (count, hidden), moe)
        rules += blocks.fused_experts(f"{mlp}.experts", f"{mlp}.switch_mlp", count, hidden, inner, moe)
        if shared:
            rules += blocks.mlp(f"{mlp}.shared_experts", hidden, inner * shared, moe)
    return rules, tied + blocks.rotary_buffers(g, usual=False)


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse a rope without the scale of queries by position, which mlx-lm's class asks for when it runs."""
    key, rope = "llama_4_scaling_beta", rope_parameters(config)
    if rope.get(key) is not None:
        return []
    return [Problem("config.json", f"{key} is missing in rope_parameters", key, "no such key")]


_ROPE = {
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

FAMILY = Family(
    "mistral4",
    "mistral4",
    build,
    # transformers has defaults for these; mlx-lm's ModelArgs asks for them.
    defaults={
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _ROPE,
    },
    architectures=("Mistral4ForCausalLM",),
    float32=(),
    required=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "n_shared_experts",
        "n_routed_experts",
        "routed_scaling_factor",
        "kv_lora_rank",
        "q_lora_rank",
        "norm_topk_prob",
        "max_position_embeddings",
        "rms_norm_eps",
        "topk_group",
        "num_experts_per_tok",
        "first_k_dense_replace",
        "n_group",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
    ),
    refuse=refuse,
    nullable=("q_lora_rank", "n_routed_experts", "n_shared_experts"),
    rope="rope_parameters",
    rewrite=nested_rope,
)
MULTIMODAL = wrapped(
    FAMILY,
    "mistral3",
    inside=("mistral4",),
    # Under the names of the files on the hub, and under those of transformers 5 in memory.
    layouts={"transformers": ("model.language_model.", "")},
    vision=NOT_FOR_MLX_VLM,
    dropped={
        "vision_tower": "vision encoder, not part of the language model",
        "multi_modal_projector": "vision projector, not part of the language model",
    },
)
