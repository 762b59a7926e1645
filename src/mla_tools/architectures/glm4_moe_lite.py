"""GLM-4.7-Flash: the modules of DeepSeek V3, with heads whose K and V differ in size."""

from __future__ import annotations

from mla_tools.architectures import blocks, deepseek_v3

__all__ = ["FAMILY"]

FAMILY = blocks.Family(
    "glm4_moe_lite",
    "glm4_moe_lite",
    deepseek_v3.decoder,
    {
        **deepseek_v3.SAMPLE,
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "n_group": 1,
        "qk_nope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.8,
    },
    architectures=("Glm4MoeLiteForCausalLM",),
)
