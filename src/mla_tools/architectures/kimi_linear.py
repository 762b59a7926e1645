"""Kimi Linear: layers of Kimi delta attention with an MLA layer (no rope, no query rank) now and then."""

from __future__ import annotations

from dataclasses import replace

from mla_tools.architectures import blocks
from mla_tools.architectures.delta_attention import delta_attention
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.errors import Problem
from mla_tools.names import Domain, fold_indices
from mla_tools.rules import Drop, Param, Rule

__all__ = ["FAMILY", "experts", "kda_layers", "shared_experts"]

_ATTENTION = "model.layers.{l}.self_attn"
# What the checkpoint calls the mixture of experts, and what the class does.
_MOE, _MLP = "model.layers.{l}.block_sparse_moe", "model.layers.{l}.mlp"


def kda(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of a KDA layer."""
    sizes = g.section("linear_attn_config")
    heads = sizes.count("num_heads")
    decay = blocks.param(f"{_ATTENTION}.A_log", (1, 1, heads, 1), where, cast=False)
    return delta_attention(_ATTENTION, g.dim("hidden_size"), heads, sizes, where, decay, conv="conv.conv")


def kda_layers(g: Geometry) -> frozenset[int]:
    """Return the layers with delta attention, counted from 0; the lists in the config count from 1.

    The class reads kda_layers alone, so a full_attn_layers that says otherwise is a mistake in one of them.
    """
    layers, lists = g.layers(), g.section("linear_attn_config")
    kda = lists.numbers("kda_layers", below=layers.stop)
    if lists.config.get("full_attn_layers") is not None:
        full = lists.numbers("full_attn_layers", below=layers.stop)
        names = "kda_layers and full_attn_layers"
        what = f"{names} in linear_attn_config do not list each layer once"
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


def experts(g: Geometry, layers: Domain, count: int, width: int | None = None) -> list[Rule]:
    """Return the rules of the router and of experts that work on `width` numbers, else on hidden_size."""
    hidden, inner = g.dim("hidden_size"), g.dim("moe_intermediate_size")
    where, names = {"l": layers}, ("w1", "w3", "w2")
    router = Param(quantizable=True, spec=blocks.ROUTER_SPEC)
    gate = blocks.linear(f"{_MOE}.gate", (count, hidden), where, f"{_MLP}.gate")
    bias = f"{_MOE}.gate.e_score_correction_bias"
    return [
        *(replace(rule, param=router) for rule in gate),
        blocks.param(bias, (count,), where, f"{_MLP}.e_score_correction_bias", cast=False),
        *blocks.experts(f"{_MOE}.experts", f"{_MLP}.switch_mlp", count, width or hidden, inner, where, names),
    ]


def shared_experts(g: Geometry, layers: Domain) -> list[Rule]:
    """Return the rules of the experts that every token goes to, if there are some."""
    count = g.optional("num_shared_experts")
    if not count:
        return []
    hidden, inner = g.dim("hidden_size"), g.dim("moe_intermediate_size") * count
    return blocks.mlp(f"{_MOE}.shared_experts", hidden, inner, {"l": layers}, f"{_MLP}.shared_experts")


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    layers, linear = g.layers(), kda_layers(g)
    dense, sparse = g.moe_layers("num_experts")
    count, inner = g.count("num_experts", least=0), g.dim("intermediate_size")
    rules, tied = blocks.tied_embeddings(g)
    rules += blocks.decoder_norms(g, {"l": layers})
    rules += kda(g, {"l": linear}) if linear else []
    rules += blocks.mla_attention(g, {"l": frozenset(layers) - linear})
    rules += blocks.mlp(_MLP, g.dim("hidden_size"), inner, {"l": dense})
    rules += experts(g, sparse, count) + shared_experts(g, sparse) if sparse else []
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
