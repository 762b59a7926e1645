"""Tensor parallelism for the classes of mlx-lm that have no `shard`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mla_tools.mla import shard_mla_projections

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["shard"]

# Projections whose rows are those of heads, by the names that the classes give them.
_OF_HEADS = (
    "q_proj",
    "q_b_proj",
    "k_proj",
    "v_proj",
    "kv_b_proj",
    "b_proj",
    "f_proj",
    "f_b_proj",
    "g_proj",
    "g_b_proj",
)
_OUTPUT = ("o_proj", "dense")
_CONVOLUTIONS = ("q_conv", "k_conv", "v_conv", "q_conv1d", "k_conv1d", "v_conv1d")
# How many channels or heads a module counts with.
_COUNTS = ("num_heads", "projection_dim", "projection_size")


def shard(model: Any, group: mx.distributed.Group | None = None) -> None:
    """Return nothing: each layer of `model` keeps the heads and the inner widths of this rank.

    `model` is one of mlx-lm's kimi_linear, bailing_moe_v3, kimi_vl, mistral3, minicpm3 or youtu_llm, with its
    weights. Its attention is divided by heads, delta attention too, MLPs and experts by their inner width;
    embeddings, norms, routers and the output head are whole on each rank. `group` is all ranks by default.

    Raises ValueError, with `model` as it was, when the number of ranks does not divide the heads.
    """
    import mlx.core as mx

    group = group or mx.distributed.init()
    inner = getattr(model, "language_model", model)
    layers = inner.model.layers
    attentions = [getattr(layer, "self_attn", None) or layer.attention for layer in layers]
    for attention in attentions:
        # Before anything is changed.
        if attention.num_heads % group.size():
            owner = type(attention).__name__
            raise ValueError(
                f"{owner}.num_heads = {attention.num_heads} heads cannot be shared by {group.size()} ranks"
            )
    for layer, attention in zip(layers, attentions, strict=True):
        _shard_attention(attention, group)
        if hasattr(layer.mlp, "switch_mlp"):
            layer.mlp = _shard_experts(layer.mlp, group)
        else:
            _shard_mlp(layer.mlp, group)


def _shard_attention(attention: Any, group: mx.distributed.Group) -> None:
    import mlx.core as mx
    from mlx.nn.layers.distributed import shard_linear

    ranks, rank = group.size(), group.rank()
    whole = attention.num_heads
    if "embed_q" in attention:
        shard_mla_projections(attention, group)
    for name in _present(attention, _OF_HEADS):
        attention[name] = shard_linear(attention[name], "all-to-sharded", group=group)
    for name in _present(attention, _OUTPUT):
        attention[name] = shard_linear(attention[name], "sharded-to-all", group=group)
    for name in _present(attention, _CONVOLUTIONS):
        # One filter for each channel.
        convolution = attention[name] if "conv" not in attention[name] else attention[name].conv
        convolution.weight = mx.contiguous(mx.split(convolution.weight, ranks)[rank])
        convolution.groups //= ranks
    if "A_log" in attention:
        axis = attention.A_log.shape.index(whole)
        attention.A_log = mx.contiguous(mx.split(attention.A_log, ranks, axis=axis)[rank])
    if "dt_bias" in attention:
        attention.dt_bias = mx.contiguous(mx.split(attention.dt_bias, ranks)[rank])
    for name in _COUNTS:
        if getattr(attention, name, None) is not None and not (
            name == "num_heads" and "embed_q" in attention
        ):
            setattr(attention, name, getattr(attention, name) // ranks)


def _shard_mlp(mlp: Any, group: mx.distributed.Group) -> None:
    from mlx.nn.layers.distributed import shard_linear

    for name in ("gate_proj", "up_proj"):
        mlp[name] = shard_linear(mlp[name], "all-to-sharded", group=group)
    mlp.down_proj = shard_linear(mlp.down_proj, "sharded-to-all", group=group)


def _shard_experts(mlp: Any, group: mx.distributed.Group) -> Any:
    """Return a mixture of experts whose ranks have a part of each expert, and add up what they compute."""
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
    return mlp


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
