"""LongCat Flash: two attentions and two MLPs per layer beside one mixture of experts, some of them empty.

The ngram variant (LongCat-Flash-Lite) adds embeddings of token n-grams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mla_tools.architectures import blocks
from mla_tools.architectures.family import Family, refusal
from mla_tools.architectures.geometry import OPEN, Geometry
from mla_tools.errors import Problem, clipped
from mla_tools.rules import Drop, Param, Rule

__all__ = ["FAMILY", "NGRAM"]


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    return _decoder(g, "model.embed_tokens")


def build_ngram(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    rules, drops = _decoder(g, "model.ngram_embeddings.word_embeddings")
    # The tables are as many as the product, and of each a rule is made.
    splits = g.dim("emb_split_num", 4, most=16) * (g.dim("emb_neighbor_num", 4, least=2, most=16) - 1)
    hidden = g.dim("hidden_size")
    words = g.dim("ngram_vocab_size_ratio", 78) * g.dim("vocab_size")
    for i in range(splits):
        # No two tables have the same number of rows, so each has its own rule.
        where = {"i": range(i, i + 1)}
        width = hidden // splits
        prefix = "model.ngram_embeddings"
        rules += blocks.linear(f"{prefix}.embedders.{{i}}", (words + (2 * i + 1), width), where)
        rules += blocks.linear(f"{prefix}.post_projs.{{i}}", (hidden, width), where)
    return rules, drops


def _decoder(g: Geometry, words: str) -> tuple[list[Rule], list[Drop]]:
    layers, hidden = g.layers("num_layers"), g.dim("hidden_size")
    pair = {"l": layers, "i": range(2)}
    where = {"l": layers}
    count = g.count("n_routed_experts")
    choices = count + g.count("zero_expert_num", 0, least=0)
    mlp = "model.layers.{l}.mlp"

    classifier = blocks.linear(
        f"{mlp}.router.classifier", (choices, hidden), where, bias=g.flag("router_bias")
    )
    classifier[0] = replace(classifier[0], param=Param(quantizable=True, spec=blocks.ROUTER_SPEC))
    rules = [
        *blocks.embeddings(g, ours=words),
        *blocks.decoder_norms(g, pair, ".{i}"),
        *blocks.mla_attention(g, pair, "model.layers.{l}.self_attn.{i}"),
        *blocks.mlp("model.layers.{l}.mlps.{i}", hidden, g.dim("ffn_hidden_size"), pair),
        *blocks.experts(
            f"{mlp}.experts", f"{mlp}.switch_mlp", count, hidden, g.dim("expert_ffn_hidden_size"), where
        ),
        *classifier,
        blocks.param(f"{mlp}.router.e_score_correction_bias", (choices,), where, cast=False),
    ]
    return rules, [*_zero_experts(g, where), *_mtp(g)]


def _zero_experts(g: Geometry, where: blocks.Where) -> list[Drop]:
    """Return the drops of the experts that pass on what they get: transformers 5 writes weights for them."""
    count, hidden = g.count("n_routed_experts"), g.dim("hidden_size")
    inner = g.dim("expert_ffn_hidden_size")
    zero = {**where, "e": range(count, count + g.count("zero_expert_num", 0, least=0))}
    reason = "an expert that changes nothing, whose weights no model reads (zero_expert_num)"
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return [
        Drop(f"model.layers.{{l}}.mlp.experts.{{e}}.{name}.weight", reason, zero, shape, usual=False)
        for name, shape in shapes.items()
    ]


def _mtp(g: Geometry) -> list[Drop]:
    """Return the drops of the MTP layer, which has a prefix of its own and a dense MLP."""
    hidden, vocab = g.dim("hidden_size"), g.dim("vocab_size")
    layer = "model.mtp.layers.{l}"
    where = {"l": range(OPEN)}
    inside = [
        *blocks.mla_attention(g, where, f"{layer}.self_attn", split=False),
        *blocks.mlp(f"{layer}.transformer_layer.mlp", hidden, g.dim("ffn_hidden_size"), where),
        *blocks.linear(f"{layer}.eh_proj", (hidden, hidden * 2), where),
        *(
            blocks.norm(f"{layer}.{name}", hidden, where)
            for name in ("enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm")
        ),
    ]
    outside = [
        blocks.norm("model.mtp.norm", hidden, {}),
        *blocks.linear("model.mtp.embed_tokens", (vocab, hidden), {}),
    ]
    reason = "multi-token prediction, not part of the model's layers (model.mtp)"
    routes = [route for rule in (*inside, *outside) for route in rule.hub_routes()]
    return [Drop(route.source[0], reason, route.where, route.shapes[0]) for route in routes]


# mlx-lm's ModelArgs asks for these. The class of transformers has them as defaults (rope_theta), or its model
# always computes so. Source: LongcatFlashConfig, LongcatFlashMLA.
_DEFAULTS = {
    "attention_bias": False,
    "attention_method": "MLA",
    "mla_scale_kv_lora": True,
    "mla_scale_q_lora": True,
    "moe_topk": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000000.0,
    "routed_scaling_factor": 6.0,
    "zero_expert_type": "identity",
}

_REQUIRED = (
    "hidden_size",
    "ffn_hidden_size",
    "moe_topk",
    "expert_ffn_hidden_size",
    "n_routed_experts",
    "zero_expert_num",
    "num_layers",
    "vocab_size",
    "max_position_embeddings",
    "num_attention_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "routed_scaling_factor",
    "rms_norm_eps",
    "rope_theta",
    "mla_scale_q_lora",
    "mla_scale_kv_lora",
)


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse latents that are not scaled: transformers scales them, and mlx-lm's class ends with an error."""
    keys = ("mla_scale_q_lora", "mla_scale_kv_lora")
    return [
        refusal("its latents are scaled", needed=f"{key} true", found=f"{key} {clipped(config.get(key))}")
        for key in keys
        if config.get(key) is not True
    ]


_FLOAT32 = ("classifier.weight", "e_score_correction_bias")

FAMILY = Family(
    "longcat_flash",
    "longcat_flash",
    build,
    defaults={**_DEFAULTS, "model_type": "longcat_flash"},
    architectures=("LongcatFlashForCausalLM",),
    float32=_FLOAT32,
    required=(*_REQUIRED, "attention_method", "zero_expert_type", "attention_bias"),
    refuse=refuse,
)
NGRAM = Family(
    "longcat_flash_ngram",
    "longcat_flash_ngram",
    build_ngram,
    defaults={**_DEFAULTS, "model_type": "longcat_flash_ngram"},
    architectures=("LongcatFlashNgramForCausalLM",),
    float32=_FLOAT32,
    required=_REQUIRED,
    refuse=refuse,
)
