"""Ling 3.0: layers of Kimi delta attention, and after each group of them one with gated MLA."""

from __future__ import annotations

from mla_tools.architectures import blocks
from mla_tools.architectures.delta_attention import delta_attention
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import Config, flat_rope
from mla_tools.architectures.spelling import Spelled, layer_words, mlp_layers, renamed
from mla_tools.errors import Problem, clipped
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY"]

# mlx-lm finds its class bailing_moe_v3 by the model_type and this together.
ARCHITECTURE = "BailingMoeV3ForCausalLM"

# The same model, as transformers 5 writes it.
_ARCHITECTURES = (ARCHITECTURE, "BailingHybridForCausalLM")

# The layer_group_size of BailingHybridConfig in transformers.
_GROUP = 6

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


def linear_layers(layers: range, group: int) -> frozenset[int]:
    """Return the layers of KDA: the others are the last of each group and those after the last whole one."""
    return frozenset(n for n in layers if (n + 1) % group and n < layers.stop // group * group)


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    _check_architecture(g)
    layers, hidden = g.layers(), g.dim("hidden_size")
    group, count = g.dim("layer_group_size"), g.count("num_experts")
    linear = linear_layers(layers, group)
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
    # transformers 5 saves the last projection of each attention under the name that it has in MLA.
    rules += blocks.also_called(kda(g, {"l": linear}), "transformers", {"o_proj": "dense"})
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
    if names and not (isinstance(names, list) and any(name in names for name in _ARCHITECTURES)):
        g.problems.append(
            Problem(
                "config.json",
                "this architecture is not known",
                f"model_type bailing_hybrid with the architecture {' or '.join(_ARCHITECTURES)}",
                f"architectures {given!r}"[:120],
                "Ling 2.5 and Ring 2.5 have the same model_type, but other modules.",
            )
        )


# The keys of transformers 5 with the hub's. Source: attribute_map of BailingHybridConfig, and of its two
# kernel sizes that which its model reads.
_NAMES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
    "linear_num_heads": "num_attention_heads",
}


def spelling(config: Config) -> Spelled:
    """Return the hub's keys; head_dim is the size of a KDA head there and of the rope in transformers 5."""
    found = mlp_layers(config) | renamed(config, _NAMES)
    keys = {}
    if config.get("linear_head_dim") is not None:
        keys["head_dim"] = config["linear_head_dim"]
    if config.get("moe_shared_expert_intermediate_size") is None:
        # For one shared expert; so the model of transformers has it.
        keys["moe_shared_expert_intermediate_size"] = config.get("moe_intermediate_size")
    return found | (keys, []) | _groups(config)


def _groups(config: Config) -> Spelled:
    """Return layer_group_size for layer_types, which names the attention of each layer."""
    kinds, problems = layer_words(config, "layer_types", "full_attention", "linear_attention")
    if kinds is None:
        return Spelled({}, problems)
    layers = range(len(kinds))
    linear = {layer for layer, kind in zip(layers, kinds, strict=True) if kind == "linear_attention"}
    said = config.get("layer_group_size", _GROUP)
    for group in (said, kinds.index("full_attention") + 1 if "full_attention" in kinds else 0):
        if type(group) is int and group > 0 and linear_layers(layers, group) == linear:
            return Spelled({"layer_group_size": group}, [])
    needed = "full_attention at the end of each group of layers, and in all layers after the last whole group"
    cause = "mlx-lm's model class reads layer_group_size, which can say no more."
    problem = Problem("config.json", "layer_types cannot be used", needed, clipped(kinds), cause)
    return Spelled({}, [problem])


def _rewrite(config: Config) -> Config:
    # Without the architecture mlx-lm takes the class of Ling 2.5.
    return {**flat_rope(config), "architectures": [ARCHITECTURE]}


FAMILY = Family(
    "bailing_hybrid",
    "bailing_hybrid",
    build,
    # What the class of transformers takes where they are missing; mlx-lm's model class takes other values. It
    # has no q_lora_rank: there is a q_proj. Source: BailingHybridConfig.
    defaults={
        "first_k_dense_replace": 2,
        "layer_group_size": _GROUP,
        "q_lora_rank": None,
    },
    architectures=(ARCHITECTURE,),
    rewrite=_rewrite,
    float32=("expert_bias", "A_log", "dt_bias"),
    spelling=spelling,
)
