"""DeepSeek V3, R1, V3.1 and Kimi K2 as a model file for mlx-lm."""

import mlx.core as mx
from mlx_lm.models import deepseek_v3
from mlx_lm.models.deepseek_v3 import ModelArgs  # noqa: F401

from mla_tools import sanitize, shard_mla_projections
from mla_tools.integrations.mlx_lm import shard_layer


class Model(deepseek_v3.Model):
    def sanitize(self, weights):
        return sanitize(weights, self.args, packed=False)

    def shard(self, group=None):
        group = group or mx.distributed.init()
        for layer in self.layers:
            shard_mla_projections(layer.self_attn, group)
        for layer in self.layers:
            shard_layer(layer, group)
