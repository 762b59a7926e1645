"""GLM-4.7-Flash: the modules of DeepSeek V3, with heads whose K and V differ in size."""

from __future__ import annotations

from mla_tools.architectures import deepseek_v3
from mla_tools.architectures.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    "glm4_moe_lite",
    "glm4_moe_lite",
    deepseek_v3.decoder,
    # What the class of transformers takes where they are missing. Source: Glm4MoeLiteConfig, and
    # PreTrainedConfig for rope_theta.
    defaults={"first_k_dense_replace": 1, "rope_theta": 10000.0},
    architectures=("Glm4MoeLiteForCausalLM",),
    refuse=deepseek_v3.refuse,
)
