"""Kimi-VL: the language model is a small DeepSeek-V3, under language_model; images are left out."""

from __future__ import annotations

from dataclasses import replace

from mla_tools.architectures import blocks, deepseek_v3

__all__ = ["FAMILY"]

FAMILY = blocks.wrapped(
    replace(
        deepseek_v3.FAMILY,
        sample={
            **deepseek_v3.SAMPLE,
            "n_group": 1,
            "q_lora_rank": None,
            "num_nextn_predict_layers": 0,
            "rope_scaling": None,
        },
    ),
    "kimi_vl",
    {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "torch_dtype": "bfloat16",
    },
    dropped={
        "vision_tower": "image encoder, not part of the language model",
        "multi_modal_projector": "image projector, not part of the language model",
    },
    architectures=("KimiVLForConditionalGeneration",),
    images=blocks.NOT_FOR_MLX_VLM,
)
