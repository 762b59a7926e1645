"""The attention of DeepSeek V4 and V4.1, in the names of DeepSeek and those of transformers."""

from __future__ import annotations

from dataclasses import dataclass

from mla_tools.architectures.blocks import Shape
from mla_tools.architectures.geometry import Geometry
from mla_tools.ops import Op, Same, Unflatten

__all__ = ["Part", "attention_parts"]


_SAME = Same()


@dataclass(frozen=True)
class Part:
    """One tensor: as DeepSeek calls it, as transformers does, its shape there, and what becomes of it."""

    theirs: str
    hub: str
    shape: Shape
    op: Op = _SAME

    @property
    def matrix(self) -> bool:
        """Whether it is the weight of a linear layer."""
        return len(self.shape) == 2


def attention_parts(g: Geometry) -> list[Part]:
    """Return what every layer has of the attention; wo_a is block diagonal over the groups."""
    hidden, heads, size = g.dim("hidden_size"), g.count("num_attention_heads"), g.dim("head_dim")
    rank, groups, inner = g.dim("q_lora_rank"), g.count("o_groups"), g.dim("o_lora_rank")
    wide = heads * size // groups
    return [
        Part("wq_a.weight", "q_a_proj.weight", (rank, hidden)),
        Part("q_norm.weight", "q_a_norm.weight", (rank,)),
        Part("wq_b.weight", "q_b_proj.weight", (heads * size, rank)),
        Part("wkv.weight", "kv_proj.weight", (size, hidden)),
        Part("kv_norm.weight", "kv_norm.weight", (size,)),
        Part("wo_a.weight", "o_a_proj.weight", (groups * inner, wide), Unflatten(inner)),
        Part("wo_b.weight", "o_b_proj.weight", (hidden, groups * inner)),
        Part("attn_sink", "sinks", (heads,)),
    ]
