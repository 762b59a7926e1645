"""GLM-5: DeepSeek V3.2 in which layers may take over the choice of keys that an earlier layer made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mla_tools.architectures import blocks, deepseek_v3, deepseek_v32
from mla_tools.architectures.family import Family, refusal
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import nested_rope
from mla_tools.errors import Problem
from mla_tools.names import fold_indices
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY"]


def sharing_layers(config: Mapping[str, Any], layers: range) -> frozenset[int]:
    """Return the layers that have no indexer and use the keys that the last layer with one has chosen.

    Source: GlmMoeDsaConfig in transformers. `indexer_types` says it layer by layer, else
    `index_topk_pattern` ("F" and "S"), else every `index_topk_freq`-th layer has an indexer, counted from
    `index_skip_topk_offset` - 1. GLM-5 has none of these keys, and an indexer in each layer.
    """
    types = config.get("indexer_types")
    if types is None:
        types = config.get("index_topk_pattern")
    if isinstance(types, list | str):
        return frozenset(layer for layer, word in zip(layers, types, strict=False) if word in ("shared", "S"))
    every, offset = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
    if not (isinstance(every, int) and isinstance(offset, int)) or every < 1:
        return frozenset()
    return frozenset(layer for layer in layers if max(layer - offset + 1, 0) % every)


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    shared = sharing_layers(g.config, g.layers())

    def attention(g: Geometry, where: blocks.Where) -> list[Rule]:
        own = {"l": frozenset(where["l"]) - shared}
        return blocks.mla_attention(g, where) + deepseek_v32.indexer(g, own)

    rules, drops = deepseek_v3.decoder(g, attention)
    # The MTP layer of GLM-5 has no copies of the embedding and the output head.
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    return rules, [replace(drop, usual=False) if drop.source.endswith(copies) else drop for drop in drops]


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse shared choices: mlx-lm 0.32.2 has an indexer in each layer, which would choose for itself."""
    shared = sharing_layers(config, Geometry(config).layers())
    if not shared:
        return []
    return [
        refusal(
            "it lets each layer choose its keys",
            needed="an indexer in each layer",
            found=f"layers {fold_indices(shared)} use the keys that an earlier layer has chosen",
            cause="An indexer of their own would choose other keys."
            " This needs an mlx-lm whose glm_moe_dsa reads indexer_types.",
        )
    ]


FAMILY = Family(
    "glm_moe_dsa",
    "glm_moe_dsa",
    build,
    # mlx-lm's ModelArgs asks for these keys, which transformers does without.
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    architectures=("GlmMoeDsaForCausalLM",),
    required=(
        "vocab_size",
        "hidden_size",
        "index_head_dim",
        "index_n_heads",
        "index_topk",
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
        "qk_rope_head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "num_experts_per_tok",
        "moe_layer_freq",
        "first_k_dense_replace",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "attention_bias",
    ),
    nullable=("n_routed_experts", "n_shared_experts"),
    rope="rope_parameters",
    rewrite=nested_rope,
    refuse=refuse,
)
