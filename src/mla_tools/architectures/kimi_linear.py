"""Kimi Linear: layers of Kimi delta attention with an MLA layer (no rope, no query rank) now and then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mla_tools.architectures import blocks
from mla_tools.architectures.delta_attention import delta_attention
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import Config
from mla_tools.architectures.spelling import Spelled, layer_words, mlp_layers
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
    mlp = blocks.mlp(_MLP, g.dim("hidden_size"), inner, {"l": dense})
    # transformers 5 saves each MLP under the name that a mixture of experts has.
    rules += blocks.also_called(mlp, "transformers", {"mlp": "block_sparse_moe"})
    rules += experts(g, sparse, count) + shared_experts(g, sparse) if sparse else []
    return rules, tied + blocks.rotary_buffers(g, usual=False)


def spelling(config: Config) -> Spelled:
    """Return linear_attn_config for what transformers 5 has beside it or instead: its sizes and layer_types.

    As KimiLinearConfig reads them: the sizes in linear_attn_config go before those beside it, and
    layer_types go before its lists of layers, which count from 1.
    """
    found = mlp_layers(config)
    given = config.get("linear_attn_config")
    if given is not None and not isinstance(given, Mapping):
        return found
    linear = dict(given or {})
    for theirs, ours in _SIZES.items():
        if linear.get(ours) is None and config.get(theirs) is not None:
            linear[ours] = config[theirs]
    kinds, problems = layer_words(config, "layer_types", "full_attention", "linear_attention")
    if kinds is not None:
        for ours, word in (("full_attn_layers", "full_attention"), ("kda_layers", "linear_attention")):
            linear[ours] = [n for n, kind in enumerate(kinds, start=1) if kind == word]
    keys = {} if linear == (given or {}) else {"linear_attn_config": linear}
    return found | (keys, problems)


# The keys of transformers 5 with those in linear_attn_config.
_SIZES = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}

FAMILY = Family(
    "kimi_linear",
    "kimi_linear",
    build,
    # mlx-lm's ModelArgs asks for some of these; what the class of transformers takes where they are missing.
    # Neither reads rope_theta: the attention has no rope. Source: KimiLinearConfig, and PreTrainedConfig for
    # rope_theta.
    defaults={
        "first_k_dense_replace": 1,
        "mla_use_nope": True,
        "model_max_length": 1048576,
        "moe_renormalize": True,
        "num_expert_group": 1,
        "num_experts_per_token": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
    },
    architectures=("KimiLinearForCausalLM",),
    float32=("A_log", "dt_bias"),
    required=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
        "linear_attn_config",
        "model_max_length",
        "num_experts",
        "moe_intermediate_size",
        "kv_lora_rank",
    ),
    rope=None,
    spelling=spelling,
)
