"""mla-tools: checkpoints of multi-head-latent-attention models, made to run on MLX."""

from mla_tools.errors import CheckpointError, MlaToolsError, Problem, UsageError
from mla_tools.mla import merge_kv_b_proj_weights, shard_mla_projections, split_kv_b_proj_weights
from mla_tools.quantization import QuantSpec
from mla_tools.sanitize import sanitize

__all__ = [
    "CheckpointError",
    "MlaToolsError",
    "Problem",
    "QuantSpec",
    "UsageError",
    "merge_kv_b_proj_weights",
    "sanitize",
    "shard_mla_projections",
    "split_kv_b_proj_weights",
]
