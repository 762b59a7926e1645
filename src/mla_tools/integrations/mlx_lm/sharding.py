"""Tensor parallelism for the classes of mlx-lm: heads, and the inner widths of MLPs and experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mla_tools.mla import shard_mla_projections

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["shard", "shard_layer"]

# Projections whose rows are those of heads, by the names that the classes give them, with the number of
# tensors that lie in one.
_OF_HEADS = {
    "q_proj": 1,
    "q_b_proj": 1,
    "k_proj": 1,
    "v_proj": 1,
    "qkv_proj": 3,
    "kv_b_proj": 1,
    "b_proj": 1,
    "f_proj": 1,
    "f_b_proj": 1,
    "g_proj": 1,
    "g_b_proj": 1,
}
_CONVOLUTIONS = {
    "q_conv": 1,
    "k_conv": 1,
    "v_conv": 1,
    "qkv_conv": 3,
    "q_conv1d": 1,
    "k_conv1d": 1,
    "v_conv1d": 1,
}
_OUTPUT = ("o_proj", "dense")


def shard(model: Any, group: mx.distributed.Group | None = None) -> None:
    """Return nothing: each layer of `model` keeps the heads and the inner widths of this rank.

    `model` is an MLA model of mlx-lm with its weights. Its attention is divided by heads, delta attention
    too, MLPs and experts by their inner width; embeddings, norms, routers, indexers and the output head are
    whole on each rank. `group` is all ranks by default.

    Raises ValueError, with `model` as it was, when the number of ranks does not divide the heads.
    """
    import mlx.core as mx

    group = group or mx.distributed.init()
    attentions = [attention for layer in model.layers for attention in _attentions(layer)]
    for attention in attentions:
        _refuse_uneven(attention, group)
    for attention in attentions:
        if "embed_q" in attention:
            shard_mla_projections(attention, group, _heads_attr(attention))
    for layer in model.layers:
        shard_layer(layer, group)


def shard_layer(layer: Any, group: mx.distributed.Group) -> None:
    """Return nothing: a layer keeps this rank's part of all but embed_q, unembed_out and their head count.

    These are for `shard_mla_projections`, which comes first, for it says so when ranks do not divide the
    heads. Raises ValueError when they do not divide those of another attention.
    """
    for attention in _attentions(layer):
        _shard_attention(attention, group)
    for mlp in (*getattr(layer, "mlps", ()), layer.mlp):
        if hasattr(mlp, "switch_mlp"):
            _shard_experts(mlp, group)
        else:
            _shard_mlp(mlp, group)


def _attentions(layer: Any) -> list[Any]:
    found = layer.attention if "attention" in layer else layer.self_attn
    return found if isinstance(found, list) else [found]


def _heads_attr(attention: Any) -> str:
    return "num_heads" if hasattr(attention, "num_heads") else "num_attention_heads"


def _refuse_uneven(attention: Any, group: mx.distributed.Group) -> None:
    name = _heads_attr(attention)
    heads, ranks = getattr(attention, name), group.size()
    if heads % ranks:
        raise ValueError(
            f"{type(attention).__name__}.{name} = {heads} heads cannot be shared by {ranks} ranks"
        )


def _shard_attention(attention: Any, group: mx.distributed.Group) -> None:
    from mlx.nn.layers.distributed import shard_linear

    if "embed_q" not in attention:
        _refuse_uneven(attention, group)
    for name in _present(attention, _OF_HEADS):
        attention[name] = shard_linear(
            attention[name], "all-to-sharded", segments=_OF_HEADS[name], group=group
        )
    for name in _present(attention, _OUTPUT):
        attention[name] = shard_linear(attention[name], "sharded-to-all", group=group)
    for name in _present(attention, _CONVOLUTIONS):
        # One filter for each channel.
        convolution = attention[name].conv if "conv" in attention[name] else attention[name]
        convolution.weight = _part(convolution.weight, 0, group, _CONVOLUTIONS[name])
        convolution.groups //= group.size()
    if "A_log" in attention:
        attention.A_log = _part(attention.A_log, attention.A_log.shape.index(attention.num_heads), group)
    if "dt_bias" in attention:
        attention.dt_bias = _part(attention.dt_bias, 0, group)
    if "embed_q" not in attention:
        for name in ("num_heads", "projection_dim", "projection_size"):
            if hasattr(attention, name):
                setattr(attention, name, getattr(attention, name) // group.size())


def _part(array: mx.array, axis: int, group: mx.distributed.Group, segments: int = 1) -> mx.array:
    """Return the part of this rank of each of the segments of an array along an axis."""
    import mlx.core as mx

    parts = [
        mx.split(each, group.size(), axis=axis)[group.rank()] for each in mx.split(array, segments, axis=axis)
    ]
    # A slice alone would keep the whole in memory.
    return mx.contiguous(mx.concatenate(parts, axis=axis))


def _shard_mlp(mlp: Any, group: mx.distributed.Group) -> None:
    from mlx.nn.layers.distributed import shard_linear

    for name in ("gate_proj", "up_proj"):
        mlp[name] = shard_linear(mlp[name], "all-to-sharded", group=group)
    mlp.down_proj = shard_linear(mlp.down_proj, "sharded-to-all", group=group)


def _shard_experts(mlp: Any, group: mx.distributed.Group) -> None:
    """Give each rank a part of each expert, and have the ranks add up what they compute."""
    from mlx.nn.layers.distributed import shard_inplace

    shared = getattr(mlp, "shared_experts", None)
    for experts in (mlp.switch_mlp,) if shared is None else (mlp.switch_mlp, shared):
        for name in ("gate_proj", "up_proj", "down_proj"):
            how = "sharded-to-all" if name == "down_proj" else "all-to-sharded"
            shard_inplace(experts[name], how, group=group)
    if hasattr(mlp, "sharding_group"):
        mlp.sharding_group = group
    else:
        mlp.__class__ = _summed(type(mlp), group)


def _summed(kind: Any, group: mx.distributed.Group) -> Any:
    """Return a class whose results are those of `kind`, summed over the ranks."""
    import mlx.core as mx
    from mlx.nn.layers.distributed import sum_gradients

    class Summed(kind):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            made = super().__call__(sum_gradients(group)(x))
            return mx.distributed.all_sum(made, group=group)

    Summed.__name__ = Summed.__qualname__ = kind.__name__
    return Summed


def _present(module: Any, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in module]
