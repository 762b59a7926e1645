"""MLA array math: the fused kv_b projection split into per-head projections and back, and heads sharded.

Axis letters: h heads, n nope (qk_nope_head_dim), v value (v_head_dim), r kv rank (kv_lora_rank).

    kv_b_proj    [h*(n+v), r]   rows head-major, per head n rows of K and then v rows of V
    embed_q      [h, r, n]      the rows of K, transposed: queries into the latent space
    unembed_out  [h, v, r]      the rows of V as they are: from the latent space to the values

The source of the layouts is `kv_b_proj` of DeepSeek's modeling files and `MultiLinear` of mlx-lm
(mlx_lm/models/mla.py, the attention and `sanitize` of mlx_lm/models/deepseek_v3.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_tools.errors import Problem

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["Layout", "kv_b_layout", "merge_kv_b", "shard_mla_projections", "split_kv_b"]


def split_kv_b(
    kv_b: mx.array, *, num_heads: int, qk_nope_head_dim: int, v_head_dim: int
) -> tuple[mx.array, mx.array]:
    """Return (embed_q [h, r, n], unembed_out [h, v, r]) of a fused kv_b [h*(n+v), r], in its dtype.

    Any dtype will do. For the packed part of a quantized weight [h*(n+v), words], or its scales
    [h*(n+v), groups], only the second result means anything: it is that part of unembed_out, bit for
    bit, whereas the transposed first result mixes the codes of r where those of n are needed.

    Raises ValueError when kv_b does not have two axes or its rows are not num_heads *
    (qk_nope_head_dim + v_head_dim).
    """
    import mlx.core as mx

    layout = kv_b_layout(num_heads, qk_nope_head_dim, v_head_dim)
    if kv_b.ndim != 2 or kv_b.shape[0] != layout.shape[0]:
        what = "the shape does not fit the config"
        raise ValueError(str(Problem("kv_b", what, f"{layout}", f"{list(kv_b.shape)}")))
    # [h*(n+v), r] -> [h, n+v, r]
    heads = kv_b.reshape(num_heads, qk_nope_head_dim + v_head_dim, kv_b.shape[-1])
    # [h, n, r] -> [h, r, n]
    embed_q = mx.contiguous(heads[:, :qk_nope_head_dim].swapaxes(-1, -2))
    # [h, v, r]
    unembed_out = mx.contiguous(heads[:, qk_nope_head_dim:])
    return embed_q, unembed_out


def merge_kv_b(embed_q: mx.array, unembed_out: mx.array) -> mx.array:
    """Return the fused kv_b [h*(n+v), r] of embed_q [h, r, n] and unembed_out [h, v, r], in their dtype.

    The inverse of `split_kv_b`, bit for bit. Raises ValueError when the two do not have three axes
    each, the same h, the same r and the same dtype.
    """
    import mlx.core as mx

    if embed_q.ndim != 3 or unembed_out.ndim != 3:
        raise _mismatch(embed_q, unembed_out, "three axes each")
    if embed_q.shape[0] != unembed_out.shape[0]:
        raise _mismatch(embed_q, unembed_out, "the same number of heads on their first axes")
    if embed_q.shape[1] != unembed_out.shape[2]:
        raise _mismatch(embed_q, unembed_out, "the same kv_lora_rank on axis 1 of embed_q, 2 of unembed_out")
    if embed_q.dtype != unembed_out.dtype:
        raise _mismatch(embed_q, unembed_out, "one dtype")
    # [h, n, r] and [h, v, r] -> [h, n+v, r] -> [h*(n+v), r]
    heads = mx.concatenate([embed_q.swapaxes(-1, -2), unembed_out], axis=1)
    return heads.reshape(-1, heads.shape[-1])


def shard_mla_projections(attn: Any, group: mx.distributed.Group, num_heads_attr: str = "num_heads") -> None:
    """Return nothing: `attn` keeps the heads of this rank in embed_q, unembed_out and its head count.

    Of h heads and N ranks, rank i keeps h // N heads from i * (h // N) on. embed_q and unembed_out are
    (Quantized)MultiLinear; every parameter of theirs has heads on its first axis. The attribute
    `num_heads_attr` of `attn` ("num_attention_heads" in LongCat Flash) is divided by N. The other
    projections and the sum over ranks remain with the caller. What a model's `shard` in mlx-lm does.

    Raises ValueError, with `attn` as it was, when N does not divide the heads or the first axes are
    not as long as the attribute says. Without this check the first forward dies in a reshape.
    """
    import mlx.core as mx

    ranks, rank = group.size(), group.rank()
    num_heads = getattr(attn, num_heads_attr, None)
    owner = type(attn).__name__
    if not isinstance(num_heads, int):
        raise ValueError(f"{owner}.{num_heads_attr} is {num_heads!r}; the number of heads is needed")
    if num_heads % ranks != 0:
        raise ValueError(f"{owner}.{num_heads_attr} = {num_heads} heads cannot be shared by {ranks} ranks")
    modules = {"embed_q": attn.embed_q, "unembed_out": attn.unembed_out}
    for word, module in modules.items():
        for part, array in module.parameters().items():
            if array.shape[0] != num_heads:
                raise ValueError(
                    f"{owner}.{word}.{part} has {array.shape[0]} heads on its first axis, "
                    f"but {owner}.{num_heads_attr} = {num_heads} (sharded already?)"
                )

    start = rank * (num_heads // ranks)
    stop = start + num_heads // ranks
    for module in modules.values():
        # A slice alone would keep the heads of all ranks in memory; a copy does not.
        module.apply(lambda array: mx.contiguous(array[start:stop]))
    setattr(attn, num_heads_attr, num_heads // ranks)


@dataclass(frozen=True)
class Layout:
    """The shape that an array must have, and how it follows from the names in config.json."""

    shape: tuple[int, ...]
    formula: str

    def __str__(self) -> str:
        return f"{self.formula} = {list(self.shape)}"


def kv_b_layout(
    num_heads: int, qk_nope_head_dim: int, v_head_dim: int, kv_lora_rank: int | None = None
) -> Layout:
    """Return the layout of a fused kv_b [h*(n+v), r]; that of the first axis alone where r is not given.

    Raises ValueError for heads, or rows of one, below 1.
    """
    names = "num_heads * (qk_nope_head_dim + v_head_dim)"
    numbers = f"{num_heads} * ({qk_nope_head_dim} + {v_head_dim})"
    rows = num_heads * (qk_nope_head_dim + v_head_dim)
    # Each factor is checked, for two negative ones would pass as a product.
    if min(num_heads, qk_nope_head_dim, v_head_dim) < 1:
        raise ValueError(f"{names} = {numbers}: each must be 1 or more")
    if kv_lora_rank is None:
        return Layout((rows,), f"rows {names} = {numbers}")
    return Layout((rows, kv_lora_rank), f"[{names}, kv_lora_rank] = [{numbers}, {kv_lora_rank}]")


def _mismatch(embed_q: mx.array, unembed_out: mx.array, needed: str) -> ValueError:
    halves = (embed_q, unembed_out)
    found = " and ".join(f"{str(half.dtype).rpartition('.')[2]} {list(half.shape)}" for half in halves)
    return ValueError(str(Problem("embed_q and unembed_out", "do not fit together", needed, found)))
