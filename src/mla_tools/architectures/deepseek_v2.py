"""DeepSeek V2 and V2-Lite: mlx-lm's model class keeps kv_b_proj whole; routers have no correction bias."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mla_tools.architectures import blocks, deepseek_v3
from mla_tools.architectures.family import Family, refusal
from mla_tools.architectures.geometry import Geometry
from mla_tools.architectures.rope import flat_rope, rope_parameters, rope_type
from mla_tools.errors import Problem, clipped
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY"]


def build(geometry: Geometry) -> tuple[list[Rule], list[Drop]]:
    attention = partial(blocks.mla_attention, split=False)
    return deepseek_v3.decoder(geometry, attention, correction=False, mtp=False)


def rewrite(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope keys; mlx-lm's class wants yarn, which is the plain rope where the factor is 1."""
    rope = flat_rope(config)
    if not {**config, **rope}.get("rope_scaling"):
        rope["rope_scaling"] = {"type": "yarn", "factor": 1.0}
    return rope


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse the ropes that mlx-lm 0.32.2 would take for yarn."""
    kind = rope_type(rope_parameters(config))
    if kind in ("default", "yarn"):
        return []
    return [refusal("its rope is yarn or none", found=f"rope_type {clipped(kind)}")]


FAMILY = Family(
    "deepseek_v2",
    "deepseek_v2",
    build,
    # What the class of transformers takes where it is missing. Source: DeepseekV2Config.
    defaults={"topk_method": "greedy"},
    architectures=("DeepseekV2ForCausalLM",),
    rewrite=rewrite,
    refuse=refuse,
)
