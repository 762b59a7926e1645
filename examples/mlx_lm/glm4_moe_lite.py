"""GLM-4.7-Flash as a model file for mlx-lm."""

import mlx.core as mx
from mlx_lm.models import glm4_moe_lite
from mlx_lm.models.glm4_moe_lite import ModelArgs  # noqa: F401

from mla_tools import sanitize, shard_mla_projections
from mla_tools.integrations.mlx_lm import shard_layer


class Model(glm4_moe_lite.Model):
    def sanitize(self, weights):
        return sanitize(weights, self.args, packed=False)

    def shard(self, group=None):
        group = group or mx.distributed.init()
        for layer in self.layers:
            shard_mla_projections(layer.self_attn, group)
        for layer in self.layers:
            shard_layer(layer, group)
