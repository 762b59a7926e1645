"""DeepSeek V3.2: V3 with an indexer that chooses the keys of each query."""

from __future__ import annotations

from mla_tools.architectures import blocks, deepseek_v3
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.rules import Drop, Rule

__all__ = ["FAMILY", "indexer"]


def indexer(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of the indexer of an attention; its k_norm is a LayerNorm with a bias."""
    prefix = "model.layers.{l}.self_attn.indexer"
    hidden, query_rank = g.dim("hidden_size"), g.dim("q_lora_rank")
    heads, size = g.count("index_n_heads"), g.dim("index_head_dim")
    return [
        *blocks.linear(f"{prefix}.wq_b", (heads * size, query_rank), where),
        *blocks.linear(f"{prefix}.wk", (size, hidden), where),
        blocks.norm(f"{prefix}.k_norm", size, where),
        blocks.param(f"{prefix}.k_norm.bias", (size,), where),
        *blocks.linear(f"{prefix}.weights_proj", (heads, hidden), where),
    ]


def attention(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of MLA with its indexer."""
    return blocks.mla_attention(g, where) + indexer(g, where)


def build(geometry: Geometry) -> tuple[list[Rule], list[Drop]]:
    return deepseek_v3.decoder(geometry, attention)


FAMILY = Family(
    "deepseek_v32",
    "deepseek_v32",
    build,
    # As V3. Source: DeepseekV32Config in transformers.
    defaults=deepseek_v3.DEFAULTS,
    architectures=("DeepseekV32ForCausalLM",),
    # All norms, unlike V3; the indexer's k_norm is a LayerNorm.
    float32=("e_score_correction_bias", "norm.weight", "norm.bias"),
)
