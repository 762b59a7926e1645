"""LongCat Flash as a model file for mlx-lm."""

import mlx.core as mx
from mlx_lm.models import longcat_flash
from mlx_lm.models.longcat_flash import ModelArgs  # noqa: F401

from mla_tools import sanitize, shard_mla_projections
from mla_tools.integrations.mlx_lm import shard_layer


class Model(longcat_flash.Model):
    def sanitize(self, weights):
        return sanitize(weights, self.args, packed=False)

    def shard(self, group=None):
        group = group or mx.distributed.init()
        for layer in self.layers:
            for attention in layer.self_attn:
                shard_mla_projections(attention, group, "num_attention_heads")
        for layer in self.layers:
            shard_layer(layer, group)
