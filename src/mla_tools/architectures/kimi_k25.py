"""Kimi K2.5: the language model is Kimi K2, under language_model; the image encoder is left out."""

from __future__ import annotations

from mla_tools.architectures import blocks, deepseek_v3, moonvit
from mla_tools.architectures.geometry import Geometry
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY"]


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    rules, drops = blocks.under("language_model", *deepseek_v3.decoder(g.section("text_config")))
    return rules, drops + moonvit.drops()


FAMILY = blocks.Family(
    "kimi_k25",
    "kimi_k25",
    build,
    {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "text_config": {k: v for k, v in deepseek_v3.KIMI_K2.sample.items() if k != "torch_dtype"},
    },
    architectures=("KimiK25ForConditionalGeneration",),
)
