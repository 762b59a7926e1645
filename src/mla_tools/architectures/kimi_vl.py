"""Kimi-VL: the language model is a small DeepSeek-V3, under language_model; images are left out."""

from __future__ import annotations

from mla_tools.architectures import deepseek_v3
from mla_tools.architectures.family import NOT_FOR_MLX_VLM, wrapped

__all__ = ["FAMILY"]

FAMILY = wrapped(
    deepseek_v3.FAMILY,
    "kimi_vl",
    dropped={
        "vision_tower": "image encoder, not part of the language model",
        "multi_modal_projector": "image projector, not part of the language model",
    },
    architectures=("KimiVLForConditionalGeneration",),
    images=NOT_FOR_MLX_VLM,
)
