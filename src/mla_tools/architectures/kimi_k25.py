"""Kimi K2.5, K2.6 and K2.7: the language model is Kimi K2, under language_model, without vision."""

from __future__ import annotations

from dataclasses import replace

from mla_tools.architectures import blocks, deepseek_v3
from mla_tools.architectures.family import vision_drops, wrapped
from mla_tools.architectures.geometry import Geometry
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY", "VISION"]

# The modules beside the language model, also those of Kimi K3.
VISION = {
    "vision_tower": "vision encoder, not part of the language model",
    "mm_projector": "vision projector, not part of the language model",
}


def text(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    """Return the table of the language model. It stores no rotary buffers, unlike K2."""
    rules, drops = deepseek_v3.decoder(g)
    # transformers 5 saves the layers under the name that those of its vision tower have.
    return blocks.also_called(rules, "transformers", {"model.layers": "model.blocks"}), drops


_WRAPPED = wrapped(
    replace(deepseek_v3.KIMI_K2, build=text),
    "kimi_k25",
    inside=("kimi_k2", "deepseek_v3"),
    dropped=VISION,
    architectures=("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
)


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    rules, drops = _WRAPPED.build(g)
    # And a norm of the projector beside the others.
    return rules, drops + vision_drops(VISION, "model.", usual=False)


FAMILY = replace(_WRAPPED, build=build)
