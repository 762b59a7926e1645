"""Kimi K2.5, K2.6 and K2.7: the language model is Kimi K2, under language_model, without vision."""

from __future__ import annotations

from dataclasses import replace

from mla_tools.architectures import deepseek_v3
from mla_tools.architectures.family import wrapped

__all__ = ["FAMILY", "VISION"]

# The modules beside the language model, also those of Kimi K3.
VISION = {
    "vision_tower": "vision encoder, not part of the language model",
    "mm_projector": "vision projector, not part of the language model",
}

FAMILY = wrapped(
    # K2.5 stores no rotary buffers, unlike K2.
    replace(deepseek_v3.KIMI_K2, build=deepseek_v3.decoder),
    "kimi_k25",
    inside=("kimi_k2", "deepseek_v3"),
    dropped=VISION,
    architectures=("KimiK25ForConditionalGeneration",),
)
