"""Kimi K3: Kimi Linear with output gates, attention residuals and experts in a space of their own."""

from __future__ import annotations

from mla_tools.architectures import blocks, kimi_k25, kimi_linear
from mla_tools.architectures.delta_attention import delta_attention
from mla_tools.architectures.family import Family, wrapped
from mla_tools.architectures.geometry import Geometry
from mla_tools.names import Domain
from mla_tools.ops import DropPadding, Op, Same
from mla_tools.rules import Drop, Param, Rule

__all__ = ["FAMILY"]

_ATTENTION = "model.layers.{l}.self_attn"


def kda(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of a KDA layer; A_log has one number per head, and zeros to the length of a head."""
    sizes, hidden = g.section("linear_attn_config"), g.dim("hidden_size")
    heads = sizes.count("num_heads")
    full = "g" if sizes.flag("use_full_rank_gate") else ""
    padded = max(heads, sizes.dim("head_dim"))
    trim: Op = DropPadding(heads, padded) if padded > heads else Same()
    log = f"{_ATTENTION}.A_log"
    decay = Rule.of(log, log, (padded,), trim, where, Param(cast=False))
    return delta_attention(
        _ATTENTION, hidden, heads, sizes, where, decay, conv="conv.conv", joined=True, full=full
    )


def residual(name: str, hidden: int, where: blocks.Where) -> list[Rule]:
    """Return the rules of one attention residual: a norm, and a projection that is never quantized."""
    proj = blocks.linear(f"{name}_proj", (1, hidden), where)
    return [*blocks.left_unquantized(proj, "res_proj", raw=True), blocks.norm(f"{name}_norm", hidden, where)]


def latent_moe(g: Geometry, layers: Domain) -> list[Rule]:
    """Return the rules of a mixture of experts that work on `routed_expert_hidden_size` numbers."""
    hidden, latent = g.dim("hidden_size"), g.optional("routed_expert_hidden_size")
    rules = kimi_linear.experts(g, layers, g.count("num_experts"), latent)
    if latent is not None:
        theirs, ours = "model.layers.{l}.block_sparse_moe", "model.layers.{l}.mlp"
        where = {"l": layers}
        for name, shape in (("down", (latent, hidden)), ("up", (hidden, latent))):
            part = f"routed_expert_{name}_proj"
            rules += blocks.linear(f"{theirs}.{part}", shape, where, f"{ours}.{part}")
        if g.flag("latent_moe_use_norm"):
            name = "routed_expert_norm.weight"
            rules.append(blocks.param(f"{theirs}.{name}", (latent,), where, f"{ours}.{name}"))
    return rules + kimi_linear.shared_experts(g, layers)


def decoder(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    layers, hidden = g.layers(), g.dim("hidden_size")
    everywhere: blocks.Where = {"l": layers}
    linear = kimi_linear.kda_layers(g)
    mla: blocks.Where = {"l": frozenset(layers) - linear}
    dense, sparse = g.moe_layers("num_experts")

    rules, tied = blocks.tied_embeddings(g)
    rules += blocks.decoder_norms(g, everywhere)
    rules += kda(g, {"l": linear}) if linear else []
    rules += blocks.mla_attention(g, mla)
    if g.flag("mla_use_output_gate"):
        width = g.count("num_attention_heads") * g.dim("v_head_dim")
        rules += blocks.linear(f"{_ATTENTION}.g_proj", (width, hidden), mla)
    rules += blocks.mlp("model.layers.{l}.mlp", hidden, g.dim("intermediate_size"), {"l": dense})
    rules += latent_moe(g, sparse) if sparse else []
    if g.optional("attn_res_block_size") is not None:
        rules += residual("model.layers.{l}.self_attention_res", hidden, everywhere)
        rules += residual("model.layers.{l}.mlp_res", hidden, everywhere)
        rules += residual("model.output_attn_res", hidden, {})
    return rules, tied + blocks.rotary_buffers(g, usual=False)


FAMILY = wrapped(
    Family(
        "kimi_k3",
        "kimi_linear",
        decoder,
        float32=("A_log", "dt_bias", "e_score_correction_bias", "o_norm.weight", "conv1d.weight"),
        rope=None,
    ),
    "kimi_k3",
    flat=True,
    dropped=kimi_k25.VISION,
    architectures=("KimiK3ForConditionalGeneration",),
)
