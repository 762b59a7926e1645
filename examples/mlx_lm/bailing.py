"""Ling 3.0 as a model file for mlx-lm; it has no other shard there."""

import mlx.core as mx
from mlx_lm.models import bailing_moe_v3
from mlx_lm.models.bailing_moe_v3 import ModelArgs  # noqa: F401

from mla_tools import sanitize, shard_mla_projections
from mla_tools.integrations.mlx_lm import shard_layer


class Model(bailing_moe_v3.Model):
    def sanitize(self, weights):
        return sanitize(weights, self.args, packed=False)

    def shard(self, group=None):
        group = group or mx.distributed.init()
        for layer in self.layers:
            if not layer.is_linear:
                shard_mla_projections(layer.attention, group)
        for layer in self.layers:
            shard_layer(layer, group)
