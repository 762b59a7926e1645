"""Kimi K3: Kimi Linear with output gates, attention residuals and experts in a space of their own."""

from __future__ import annotations

from dataclasses import replace

from mla_tools.architectures import blocks, kimi_k25, kimi_linear
from mla_tools.architectures.family import Family, wrapped
from mla_tools.architectures.geometry import Geometry
from mla_tools.ops import ConcatRows, DropPadding, Op, Same
from mla_tools.rules import Domain, Drop, Param, Rule

__all__ = ["FAMILY"]

_ATTENTION = "model.layers.{l}.self_attn"


def delta_attention(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of a KDA layer, whose q, k and v are one projection and one convolution in MLX."""
    kda, hidden = g.section("linear_attn_config"), g.dim("hidden_size")
    heads, size, kernel = kda.dim("num_heads"), kda.dim("head_dim"), kda.dim("short_conv_kernel_size", 4)
    inner = heads * size
    shapes = {"proj": (inner, hidden), "conv1d": (inner, 1, kernel)}
    targets = {"proj": "qkv_proj", "conv1d": "qkv_conv.conv"}
    rules = [
        Rule(
            tuple(f"{_ATTENTION}.{name}_{kind}.weight" for name in "qkv"),
            (f"{_ATTENTION}.{targets[kind]}.weight",),
            (shape,) * 3,
            ConcatRows((inner,) * 3, swap=kind == "conv1d"),
            where,
            Param(quantizable=kind == "proj"),
        )
        for kind, shape in shapes.items()
    ]
    full = kda.flag("use_full_rank_gate")
    for name in ("f",) if full else ("f", "g"):
        rules += blocks.linear(f"{_ATTENTION}.{name}_a_proj", (size, hidden), where)
        rules += blocks.linear(f"{_ATTENTION}.{name}_b_proj", (inner, size), where)
    if full:
        rules += blocks.linear(f"{_ATTENTION}.g_proj", (inner, hidden), where)
    # One number per head, and zeros to the length of a head.
    padded = max(heads, size)
    trim: Op = DropPadding(heads, padded) if padded > heads else Same()
    decay = f"{_ATTENTION}.A_log"
    return [
        *rules,
        *blocks.linear(f"{_ATTENTION}.b_proj", (heads, hidden), where),
        *blocks.linear(f"{_ATTENTION}.o_proj", (hidden, inner), where),
        blocks.norm(f"{_ATTENTION}.o_norm", size, where),
        Rule((decay,), (decay,), ((padded,),), trim, where, Param(cast=False)),
        blocks.param(f"{_ATTENTION}.dt_bias", (inner,), where, cast=False),
    ]


def residual(name: str, hidden: int, where: blocks.Where) -> list[Rule]:
    """Return the rules of one attention residual: a norm, and a projection that is never quantized."""
    proj = blocks.linear(f"{name}_proj", (1, hidden), where)
    return [*blocks.left_dense(proj, "res_proj", raw=True), blocks.norm(f"{name}_norm", hidden, where)]


def latent_moe(g: Geometry, layers: Domain) -> list[Rule]:
    """Return the rules of a mixture of experts that work on `routed_expert_hidden_size` numbers."""
    hidden, inner, count = g.dim("hidden_size"), g.dim("moe_intermediate_size"), g.count("num_experts")
    theirs, ours = "model.layers.{l}.block_sparse_moe", "model.layers.{l}.mlp"
    latent, shared = g.optional("routed_expert_hidden_size"), g.optional("num_shared_experts")
    where = {"l": layers}
    router = Param(quantizable=True, spec=blocks.ROUTER_SPEC)
    gate = blocks.linear(f"{theirs}.gate", (count, hidden), where, f"{ours}.gate")
    bias = f"{theirs}.gate.e_score_correction_bias"
    rules = [
        *(replace(rule, param=router) for rule in gate),
        blocks.param(bias, (count,), where, f"{ours}.e_score_correction_bias", cast=False),
        *blocks.experts(
            f"{theirs}.experts",
            f"{ours}.switch_mlp",
            count,
            hidden if latent is None else latent,
            inner,
            where,
            ("w1", "w3", "w2"),
        ),
    ]
    if latent is not None:
        for name, shape in (("down", (latent, hidden)), ("up", (hidden, latent))):
            part = f"routed_expert_{name}_proj"
            rules += blocks.linear(f"{theirs}.{part}", shape, where, f"{ours}.{part}")
        if g.flag("latent_moe_use_norm"):
            name = "routed_expert_norm.weight"
            rules.append(blocks.param(f"{theirs}.{name}", (latent,), where, f"{ours}.{name}"))
    if shared is not None:
        part = "shared_experts"
        rules += blocks.mlp(f"{theirs}.{part}", hidden, inner * shared, where, f"{ours}.{part}")
    return rules


def decoder(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    layers, hidden = g.layers(), g.dim("hidden_size")
    everywhere: blocks.Where = {"l": layers}
    kda = kimi_linear.kda_layers(g)
    mla: blocks.Where = {"l": frozenset(layers) - kda}
    dense, sparse = g.moe_layers("num_experts")
    tied = g.flag("tie_word_embeddings")

    rules = [rule for rule in blocks.embeddings(g) if not (tied and rule.source == ("lm_head.weight",))]
    rules += blocks.decoder_norms(g, everywhere)
    rules += delta_attention(g, {"l": kda}) if kda else []
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
    drops = blocks.rotary_buffers(g, usual=False)
    if tied:
        reason = "tied to the embedding (tie_word_embeddings)"
        drops.append(Drop("lm_head.weight", reason, {}, (g.dim("vocab_size"), hidden), usual=False))
    return rules, drops


FAMILY = wrapped(
    Family(
        "kimi_k3",
        "kimi_linear",
        decoder,
        float32=("A_log", "dt_bias", "e_score_correction_bias", "o_norm.weight", "conv1d.weight"),
    ),
    "kimi_k3",
    flat=True,
    dropped=kimi_k25.IMAGES,
    architectures=("KimiK3ForConditionalGeneration",),
)
