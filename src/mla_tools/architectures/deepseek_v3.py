"""DeepSeek V3, R1, V3.1, and Kimi K2, which has the same modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mla_tools.architectures import blocks
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.names import Domain
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY", "decoder"]


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


FAMILY = Family("deepseek_v3", "deepseek_v3", decoder, architectures=("DeepseekV3ForCausalLM",))
KIMI_K2 = Family("kimi_k2", "kimi_k2", partial(decoder, rotary=True))
