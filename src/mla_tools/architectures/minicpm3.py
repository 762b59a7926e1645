"""MiniCPM3: MLA in a dense decoder whose embeddings, residuals and logits are scaled.

mlx-lm's model class scales the logits only where the output head is a module of its own. A tied embedding is
therefore written twice, once as the head, and the output's config says that nothing is tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tools.architectures import blocks, youtu_llm
from mla_tools.architectures.family import Family, refusal
from mla_tools.architectures.geometry import Geometry, Num
from mla_tools.architectures.rope import rope_parameters, rope_type
from mla_tools.errors import Problem, clipped
from mla_tools.ops import Copies
from mla_tools.rules import Drop, Param, Rule

__all__ = ["FAMILY"]


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    rules, tied = blocks.tied_embeddings(g)
    if tied:
        words = "model.embed_tokens.weight"
        shape = (g.dim("vocab_size"), g.dim("hidden_size"))
        rules = [rule for rule in rules if rule.forms[0].source != (words,)]
        both = (words, "lm_head.weight")
        rules.append(Rule.of(words, both, shape, Copies(), param=Param(quantizable=True)))
    return rules + youtu_llm.dense_decoder(g, _value(g)), tied + blocks.rotary_buffers(g, usual=False)


def _value(g: Geometry) -> Num:
    """Return the size of a value head, for which no config has a key; mlx-lm's model class knows none."""
    return g.dim("hidden_size") // g.count("num_attention_heads")


def rewrite(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys with which mlx-lm's model class gives the reference's numbers.

    It knows no rope but longrope, whose frequencies are the plain ones where all factors are 1, and takes
    4096 where original_max_position_embeddings is missing.
    """
    rope = rope_parameters(config)
    theta = rope.pop("rope_theta")
    if rope_type(rope) == "default":
        rope = {"rope_type": "longrope", "short_factor": 1.0, "long_factor": 1.0}
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return {"rope_theta": theta, "rope_scaling": rope, "tie_word_embeddings": False}


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse what mlx-lm 0.32.2 takes for something else."""
    problems = []
    rope = rope_parameters(config)
    kind = rope_type(rope)
    if kind not in ("default", "longrope"):
        problems.append(refusal("its rope is longrope or none", found=f"rope_type {clipped(kind)}"))
    elif rope.get("short_factor") != rope.get("long_factor"):
        problems.append(
            refusal(
                "it uses long_factor for texts of every length",
                needed="equal short_factor and long_factor in rope_scaling",
                found="different ones",
                cause="Set both to the one that fits the length of your texts.",
            )
        )
    trained, longest = rope.get("original_max_position_embeddings"), config.get("max_position_embeddings")
    for key in ("factor", "attention_factor"):
        # Where no text is longer than those of the training, both are 1 in either implementation.
        if rope.get(key) is not None and not (rope[key] == 1 and trained == longest):
            problems.append(refusal(f"it ignores {key}", found=f"{key} {clipped(rope[key])} in rope_scaling"))
    size = _value(Geometry(config))
    if config.get("v_head_dim") not in (None, size):
        problems.append(
            refusal(
                "it derives the size of the value heads",
                needed=f"v_head_dim {size} (hidden_size / num_attention_heads)",
                found=f"v_head_dim {clipped(config['v_head_dim'])}",
            )
        )
    return problems


FAMILY = Family(
    "minicpm3",
    "minicpm3",
    build,
    # What the reference takes where the keys are missing, as in MiniCPM3-4B; mlx-lm takes other values
    # for the first two and asks for the others.
    defaults={
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    architectures=("MiniCPM3ForCausalLM",),
    required=(
        "hidden_size",
        "dim_model_base",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "rms_norm_eps",
        "vocab_size",
        "num_key_value_heads",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "kv_lora_rank",
        "scale_depth",
        "scale_emb",
        "max_position_embeddings",
    ),
    rope=None,
    rewrite=rewrite,
    refuse=refuse,
)
