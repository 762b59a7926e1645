"""Kimi Linear: layers of Kimi delta attention with an MLA layer (no rope, no query rank) now and then."""

from __future__ import annotations

from mla_tools.architectures import blocks
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.errors import Problem
from mla_tools.names import fold_indices
from mla_tools.ops import SwapLastAxes
from mla_tools.rules import Drop, Param, Rule

__all__ = ["FAMILY", "kda_layers"]


def delta_attention(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of a KDA layer; its convolutions are [c, 1, k] in torch and [c, k, 1] in MLX."""
    kda = g.section("linear_attn_config")
    heads, size, kernel = kda.count("num_heads"), kda.dim("head_dim"), kda.dim("short_conv_kernel_size", 4)
    hidden, inner = g.dim("hidden_size"), heads * size
    prefix = "model.layers.{l}.self_attn"
    rules = []
    for name in ("q", "k", "v"):
        rules += blocks.linear(f"{prefix}.{name}_proj", (inner, hidden), where)
        rules.append(
            Rule(
                (f"{prefix}.{name}_conv1d.weight",),
                (f"{prefix}.{name}_conv.conv.weight",),
                ((inner, 1, kernel),),
                SwapLastAxes(),
                where,
                Param(),
            )
        )
    for name in ("f", "g"):
        rules += blocks.linear(f"{prefix}.{name}_a_proj", (size, hidden), where)
        rules += blocks.linear(f"{prefix}.{name}_b_proj", (inner, size), where)
    return [
        *rules,
        *blocks.linear(f"{prefix}.b_proj", (heads, hidden), where),
        *blocks.linear(f"{prefix}.o_proj", (hidden, inner), where),
        blocks.norm(f"{prefix}.o_norm", size, where),
        blocks.param(f"{prefix}.A_log", (1, 1, heads, 1), where, cast=False),
        blocks.param(f"{prefix}.dt_bias", (inner,), where, cast=False),
    ]


def kda_layers(g: Geometry) -> frozenset[int]:
    """Return the layers with delta attention, counted from 0; the lists in the config count from 1.

    The class reads kda_layers alone, so a full_attn_layers that says otherwise is a mistake in one of them.
    """
    layers, lists = g.layers(), g.section("linear_attn_config")
    kda = lists.numbers("kda_layers", below=layers.stop)
    if lists.config.get("full_attn_layers") is not None:
        full = lists.numbers("full_attn_layers", below=layers.stop)
        names = "kda_layers and full_attn_layers"
        what = f"{names} in linear_attn_config do not divide the layers between them"
        needed = f"each of the layers 1..{layers.stop} in one of them"
        wrong = {
            "in both": kda & full,
            "in neither": frozenset(n + 1 for n in layers) - kda - full,
        }
        found = "; ".join(f"{fold_indices(which)} {word}" for word, which in wrong.items() if which)
        if found:
            cause = "They count the layers from 1."
            g.problems.append(Problem("config.json", what, needed, found, cause))
    return frozenset(n - 1 for n in kda)


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    layers, hidden, inner = g.layers(), g.dim("hidden_size"), g.dim("moe_intermediate_size")
    kda = kda_layers(g)
    dense, sparse = g.moe_layers("num_experts")
    theirs, ours = "model.layers.{l}.block_sparse_moe", "model.layers.{l}.mlp"
    count, where = g.count("num_experts", least=0), {"l": sparse}

    rules, tied = blocks.tied_embeddings(g)
    rules += blocks.decoder_norms(g, {"l": layers})
    rules += delta_attention(g, {"l": kda}) if kda else []
    rules += blocks.mla_attention(g, {"l": frozenset(layers) - kda})
    rules += blocks.mlp(ours, hidden, g.dim("intermediate_size"), {"l": dense})
    if sparse:
        gate = blocks.linear(f"{theirs}.gate", (count, hidden), where, f"{ours}.gate")[0]
        router = Param(quantizable=True, spec=blocks.ROUTER_SPEC)
        bias = f"{theirs}.gate.e_score_correction_bias"
        rules.append(Rule(gate.source, gate.target, gate.shapes, where=where, param=router))
        rules.append(blocks.param(bias, (count,), where, f"{ours}.e_score_correction_bias", cast=False))
        rules += blocks.experts(
            f"{theirs}.experts", f"{ours}.switch_mlp", count, hidden, inner, where, ("w1", "w3", "w2")
        )
        shared = g.optional("num_shared_experts")
        if shared:
            rules += blocks.mlp(
                f"{theirs}.shared_experts", hidden, inner * shared, where, f"{ours}.shared_experts"
            )
    return rules, tied + blocks.rotary_buffers(g, usual=False)


FAMILY = Family(
    "kimi_linear",
    "kimi_linear",
    build,
    # mlx-lm's ModelArgs asks for the key and never reads it.
    defaults={"model_max_length": 4096},
    architectures=("KimiLinearForCausalLM",),
    float32=("A_log", "dt_bias"),
)
