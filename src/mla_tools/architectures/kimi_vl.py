"""Kimi-VL: the language model is a small DeepSeek-V3, under language_model, without vision."""

from __future__ import annotations

from mla_tools.architectures import deepseek_v3
from mla_tools.architectures.family import NOT_FOR_MLX_VLM, wrapped

__all__ = ["FAMILY"]

FAMILY = wrapped(
    deepseek_v3.FAMILY,
    "kimi_vl",
    dropped={
        "vision_tower": "vision encoder, not part of the language model",
        "multi_modal_projector": "vision projector, not part of the language model",
    },
    architectures=("KimiVLForConditionalGeneration",),
    vision=NOT_FOR_MLX_VLM,
)
