"""Ling 3.0: layers of Kimi delta attention, and after each group of them one with gated MLA."""

from __future__ import annotations

from mla_tools.architectures import blocks
from mla_tools.architectures.delta_attention import delta_attention
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import Config, flat_rope
from mla_tools.errors import Problem
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY"]

# mlx-lm finds its class bailing_moe_v3 by the model_type and this together.
ARCHITECTURE = "BailingMoeV3ForCausalLM"

_ATTENTION = "model.layers.{l}.attention"


def gated_mla(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of MLA with one gate per head, of which mlx-lm quantizes the output alone."""
    rules = blocks.mla_attention(g, where, _ATTENTION, output="dense")
    rules += blocks.linear(
        f"{_ATTENTION}.g_proj", (g.count("num_attention_heads"), g.dim("hidden_size")), where
    )
    inputs = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "embed_q", "g_proj")
    return blocks.left_unquantized(rules, *inputs)


def kda(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of a KDA layer with gates of full rank, of which mlx-lm leaves b_proj unquantized."""
    hidden, heads = g.dim("hidden_size"), g.count("num_attention_heads")
    decay = blocks.param(f"{_ATTENTION}.A_log", (heads,), where)
    rules = delta_attention(_ATTENTION, hidden, heads, g, where, decay, conv="conv1d", full="fg", cast=True)
    return blocks.left_unquantized(rules, ".b_proj")


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    _check_architecture(g)
    layers, hidden = g.layers(), g.dim("hidden_size")
    group, count = g.dim("layer_group_size"), g.count("num_experts")
    # The last layer of each group is MLA, and so are layers after the last whole group.
    linear = frozenset(n for n in layers if (n + 1) % group and n < layers.stop // group * group)
    mla = frozenset(layers) - linear
    dense, sparse = g.moe_layers("num_experts")
    mlp, gate = "model.layers.{l}.mlp", "model.layers.{l}.mlp.gate"
    where = {"l": sparse}

    shared = g.dim("moe_shared_expert_intermediate_size", 512) * g.count("num_shared_experts", 1)
    moe = [
        *blocks.router(gate, count, hidden, where, correction=False),
        blocks.param(f"{gate}.expert_bias", (count,), where),
        *blocks.experts(
            f"{mlp}.experts", f"{mlp}.switch_mlp", count, hidden, g.dim("moe_intermediate_size"), where
        ),
        *blocks.mlp(f"{mlp}.shared_experts", hidden, shared, where),
    ]
    rules, drops = blocks.tied_embeddings(g, "model.word_embeddings")
    words, norm, *head = blocks.left_unquantized(rules, "word_embeddings", "lm_head")
    rules = [words, norm]
    rules += blocks.decoder_norms(g, {"l": layers})
    rules += kda(g, {"l": linear})
    rules += gated_mla(g, {"l": mla})
    rules += blocks.mlp(mlp, hidden, g.dim("intermediate_size"), {"l": dense})
    rules += moe
    rules += head
    drops += blocks.rotary_buffers(g, usual=False)

    layer = [*blocks.decoder_norms(g, {"l": layers}), *gated_mla(g, {"l": layers}), *moe]
    drops += blocks.mtp_layers(g, layer, norms=("enorm", "hnorm", "final_layernorm"), tables=())
    return rules, drops


def _check_architecture(g: Geometry) -> None:
    """Refuse the other model that has this model_type: Ling 2.5, with lightning attention."""
    given = g.config.get("architectures")
    names = [given] if isinstance(given, str) else given
    if names and not (isinstance(names, list) and ARCHITECTURE in names):
        g.problems.append(
            Problem(
                "config.json",
                "this architecture is not known",
                f"model_type bailing_hybrid with the architecture {ARCHITECTURE}",
                f"architectures {given!r}"[:120],
                "Ling 2.5 and Ring 2.5 have the same model_type, but other modules.",
            )
        )


def _rewrite(config: Config) -> Config:
    # Without the architecture mlx-lm takes the class of Ling 2.5.
    return {**flat_rope(config), "architectures": [ARCHITECTURE]}


FAMILY = Family(
    "bailing_hybrid",
    "bailing_hybrid",
    build,
    # mlx-lm's model class takes 256 where the key is absent; such checkpoints have a q_proj.
    defaults={"q_lora_rank": None},
    architectures=(ARCHITECTURE,),
    rewrite=_rewrite,
    float32=("expert_bias", "A_log", "dt_bias"),
)
