"""A model file of one's own that takes its two MLA jobs from mla-tools: the split of kv_b_proj, and sharding.

Run it: python examples/own_model_file.py
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear

from mla_tools import shard_mla_projections, split_kv_b_proj_weights

# ---- the model file


@dataclass
class ModelArgs:
    num_hidden_layers: int = 2
    hidden_size: int = 64
    num_attention_heads: int = 4
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 8
    v_head_dim: int = 16


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.num_heads = args.num_attention_heads
        self.nope_dim, self.latent_dim = args.qk_nope_head_dim, args.kv_lora_rank
        self.head_dim = args.qk_nope_head_dim + args.qk_rope_head_dim
        self.q_proj = nn.Linear(args.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            args.hidden_size, self.latent_dim + args.qk_rope_head_dim, bias=False
        )
        self.kv_a_layernorm = nn.RMSNorm(self.latent_dim)
        self.embed_q = MultiLinear(self.nope_dim, self.latent_dim, self.num_heads)
        self.unembed_out = MultiLinear(self.latent_dim, args.v_head_dim, self.num_heads)
        self.o_proj = nn.Linear(self.num_heads * args.v_head_dim, args.hidden_size, bias=False)
        self.rope = nn.RoPE(args.qk_rope_head_dim, traditional=True)

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim).swapaxes(1, 2)
        q_nope, q_rope = mx.split(q, [self.nope_dim], axis=-1)
        latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x)[:, None], [self.latent_dim], axis=-1)
        latent = self.kv_a_layernorm(latent)

        # All heads attend to one latent vector per token: K is [latent, k_rope] and V is the latent.
        queries = mx.concatenate([self.embed_q(q_nope), self.rope(q_rope)], axis=-1)
        keys = mx.concatenate([latent, self.rope(k_rope)], axis=-1)
        scores = queries @ keys.swapaxes(-1, -2) * self.head_dim**-0.5
        scores += nn.MultiHeadAttention.create_additive_causal_mask(length, x.dtype)
        values = self.unembed_out(mx.softmax(scores, axis=-1) @ latent)
        return self.o_proj(values.swapaxes(1, 2).reshape(batch, length, -1))


class Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.layers = [Attention(args) for _ in range(args.num_hidden_layers)]
        self._sum_over_ranks = lambda x: x

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = x + self._sum_over_ranks(layer(x))
        return x

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        for index in range(self.args.num_hidden_layers):
            weights = split_kv_b_proj_weights(
                weights,
                f"layers.{index}",
                num_heads=self.args.num_attention_heads,
                qk_nope_head_dim=self.args.qk_nope_head_dim,
                v_head_dim=self.args.v_head_dim,
                kv_lora_rank=self.args.kv_lora_rank,
            )
        return weights

    def shard(self, group: mx.distributed.Group) -> None:
        for layer in self.layers:
            shard_inplace(layer.q_proj, "all-to-sharded", group=group)
            shard_mla_projections(layer, group)
            shard_inplace(layer.o_proj, "sharded-to-all", group=group)
        self._sum_over_ranks = functools.partial(mx.distributed.all_sum, group=group)


# ---- its use


def random_hf_weights(args: ModelArgs) -> dict[str, mx.array]:
    """Return weights as a checkpoint on the hub has them: one fused kv_b_proj per layer."""
    weights = dict(tree_flatten(Model(args).parameters()))
    rows = args.num_attention_heads * (args.qk_nope_head_dim + args.v_head_dim)
    for index in range(args.num_hidden_layers):
        del weights[f"layers.{index}.embed_q.weight"], weights[f"layers.{index}.unembed_out.weight"]
        weights[f"layers.{index}.kv_b_proj.weight"] = mx.random.normal((rows, args.kv_lora_rank)) * 0.1
    return weights


@dataclass(frozen=True)
class SimulatedRank:
    """Stands in for mx.distributed.init(), so that one process can be each rank in turn."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


def load(args: ModelArgs, weights: dict[str, mx.array]) -> Model:
    """Return the model with the weights, as mlx_lm.load makes it: sanitize, then load strictly."""
    model = Model(args)
    model.load_weights(list(model.sanitize(dict(weights)).items()), strict=True)
    return model


def main() -> None:
    mx.random.seed(0)
    args = ModelArgs()
    weights = random_hf_weights(args)
    model = load(args, weights)
    x = mx.random.normal((1, 5, args.hidden_size))
    print("kv_b_proj   ", weights["layers.0.kv_b_proj.weight"].shape)
    print("embed_q     ", model.layers[0].embed_q.weight.shape)
    print("unembed_out ", model.layers[0].unembed_out.weight.shape)
    print("forward     ", model(x).shape)

    whole = model.layers[0](x)
    parts = []
    for index in range(2):
        shard = load(args, weights)
        shard.shard(SimulatedRank(index, 2))
        parts.append(shard.layers[0](x))
        print(f"rank {index} keeps", shard.layers[0].embed_q.weight.shape)
    difference = mx.abs(parts[0] + parts[1] - whole).max().item()
    print(f"sum of two ranks - whole: at most {difference:.1e} of {mx.abs(whole).max().item():.1e}")
    if difference > 1e-5:
        raise SystemExit("the two ranks together are not the whole")


if __name__ == "__main__":
    main()
