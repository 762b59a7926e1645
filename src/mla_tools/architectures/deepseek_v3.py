"""DeepSeek V3, R1, V3.1, and Kimi K2, which has the same modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mla_tools.architectures import blocks
from mla_tools.architectures.family import Family, refusal
from mla_tools.architectures.geometry import Geometry
from mla_tools.errors import Problem, clipped
from mla_tools.names import Domain
from mla_tools.rules import Drop, Rule

__all__ = ["DEFAULTS", "FAMILY", "decoder", "refuse"]


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse a rope that turns halves, as models trained with transformers may have: mlx-lm's turns pairs."""
    turns_pairs = config.get("rope_interleave", True)
    if turns_pairs is True:
        return []
    found = f"rope_interleave {clipped(turns_pairs)}"
    return [refusal("its rope turns pairs", needed="rope_interleave true", found=found)]


def decoder(
    g: Geometry,
    attention: Callable[[Geometry, blocks.Where], list[Rule]] = blocks.mla_attention,
    *,
    correction: bool = True,
    mtp: bool = True,
    rotary: bool = False,
) -> tuple[list[Rule], list[Drop]]:
    """Return the table of a DeepSeek-style decoder; the later families differ in the attention alone."""
    hidden, inner = g.dim("hidden_size"), g.dim("moe_intermediate_size")
    dense, sparse = g.moe_layers()
    mlp = "model.layers.{l}.mlp"

    def common(layers: Domain) -> list[Rule]:
        where = {"l": layers}
        return blocks.decoder_norms(g, where) + attention(g, where)

    def moe(layers: Domain) -> list[Rule]:
        where = {"l": layers}
        count, shared = g.count("n_routed_experts"), g.optional("n_shared_experts")
        rules = blocks.router(f"{mlp}.gate", count, hidden, where, correction=correction)
        rules += blocks.experts(f"{mlp}.experts", f"{mlp}.switch_mlp", count, hidden, inner, where)
        if shared:
            rules += blocks.mlp(f"{mlp}.shared_experts", hidden, inner * shared, where)
        return rules

    rules = blocks.embeddings(g) + common(g.layers())
    rules += blocks.mlp(mlp, hidden, g.dim("intermediate_size"), {"l": dense})
    drops = blocks.rotary_buffers(g, usual=rotary)
    layer = common(g.layers())
    if g.optional("n_routed_experts"):
        rules += moe(sparse)
        layer += moe(sparse)
    if mtp:
        drops += blocks.mtp_layers(g, layer)
    return rules, drops


# What the class of transformers takes where they are missing; mlx-lm's model class takes other values.
# Source: DeepseekV3Config.
DEFAULTS = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}

FAMILY = Family(
    "deepseek_v3",
    "deepseek_v3",
    decoder,
    defaults=DEFAULTS,
    architectures=("DeepseekV3ForCausalLM",),
    refuse=refuse,
)
KIMI_K2 = Family("kimi_k2", "kimi_k2", partial(decoder, rotary=True), defaults=DEFAULTS, refuse=refuse)
