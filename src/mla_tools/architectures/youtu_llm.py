"""Youtu-LLM: MLA in a dense decoder; mlx-lm's model class keeps kv_b_proj whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tools.architectures import blocks
from mla_tools.architectures.family import Family, refusal
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import flat_rope, rope_parameters, rope_type
from mla_tools.errors import Problem, clipped
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY", "dense_decoder"]


def dense_decoder(g: Geometry, value: int | None = None) -> list[Rule]:
    """Return the rules of the layers of a decoder without experts, with kv_b_proj as it is.

    `value` is the size of a value head where the config has no v_head_dim.
    """
    where = {"l": g.layers()}
    return [
        *blocks.decoder_norms(g, where),
        *blocks.mla_attention(g, where, split=False, value=value),
        *blocks.mlp("model.layers.{l}.mlp", g.dim("hidden_size"), g.dim("intermediate_size"), where),
    ]


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    rules, tied = blocks.tied_embeddings(g)
    return rules + dense_decoder(g), tied + blocks.rotary_buffers(g, usual=False)


def rewrite(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope keys as mlx-lm's model class calls them."""
    interleaved = config.get("rope_interleave")
    traditional = {} if interleaved is None else {"rope_traditional": interleaved}
    return {**flat_rope(config), **traditional}


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse yarn with mscale_all_dim, by which the attention has to be scaled: mlx-lm 0.32.2 does not.

    Neither a weight nor a key of the config scales both parts of a query without rounding it.
    """
    rope = rope_parameters(config)
    factor = rope.get("factor", 1)
    plain = isinstance(factor, int | float) and factor <= 1
    if rope_type(rope) == "default" or not rope.get("mscale_all_dim") or plain:
        return []
    return [
        refusal(
            "it does not scale the attention by mscale_all_dim",
            needed="rope_scaling without mscale_all_dim, or none",
            found=f"mscale_all_dim {clipped(rope['mscale_all_dim'])} and factor {clipped(factor)} in"
            " rope_scaling",
            cause="This needs an mlx-lm whose youtu_llm applies the scale, as its deepseek_v3 does.",
        )
    ]


FAMILY = Family(
    "youtu_llm",
    "youtu_llm",
    build,
    # What the class of transformers takes where they are missing. Source: YoutuConfig, and PreTrainedConfig
    # for rope_theta.
    defaults={"tie_word_embeddings": True, "rope_theta": 10000.0},
    architectures=("YoutuForCausalLM", "YoutuLLMForCausalLM"),
    rewrite=rewrite,
    refuse=refuse,
)
