"""`mla` against mlx-lm's own `shard`, bit for bit, and against the layout's definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from attention import DTYPES, MODES, H, N, R, V, Weights, random, same_weights, tiny_deepseek
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.mla import MultiLinear
from support import same

from mla_tools.mla import merge_kv_b, shard_mla_projections, split_kv_b
from mla_tools.quantization import QuantSpec, quantize_multilinear

SPLIT_SIZES = {"num_heads": H, "qk_nope_head_dim": N, "v_head_dim": V}

# ---- one array


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    width=st.integers(1, 6),
    dtype=st.sampled_from([*DTYPES, mx.uint8, mx.uint32]),
)
@settings(deadline=None)
def test_split_is_the_documented_layout(sizes: tuple[int, int, int], width: int, dtype: mx.Dtype) -> None:
    num_heads, n, v = sizes
    rows = num_heads * (n + v)
    kv_b = mx.arange(rows * width).reshape(rows, width).astype(dtype)
    embed_q, unembed_out = split_kv_b(kv_b, num_heads=num_heads, qk_nope_head_dim=n, v_head_dim=v)

    assert (embed_q.dtype, unembed_out.dtype) == (dtype, dtype)
    assert embed_q.shape == (num_heads, width, n)
    assert unembed_out.shape == (num_heads, v, width)
    for head in range(num_heads):
        for row in range(n + v):
            source = kv_b[head * (n + v) + row]
            target = embed_q[head, :, row] if row < n else unembed_out[head, row - n]
            assert mx.array_equal(target, source)
    assert same(merge_kv_b(embed_q, unembed_out), kv_b)


@pytest.mark.parametrize(
    ("shape", "sizes", "text"),
    [
        ((383, R), (4, 64, 32), "rows num_heads * (qk_nope_head_dim + v_head_dim) = 4 * (64 + 32) = [384]\n"),
        ((384,), (4, 64, 32), "found   [384]"),
        ((4, 96, R), (4, 64, 32), "found   [4, 96, 128]"),
        ((384, R), (-4, -64, -32), "-4 * (-64 + -32): each must be 1 or more"),
        ((0, R), (0, 64, 32), "0 * (64 + 32): each must be 1 or more"),
    ],
    ids=["rows", "one-axis", "three-axes", "negative", "no-heads"],
)
def test_split_refuses(shape: tuple[int, ...], sizes: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        split_kv_b(mx.zeros(shape), **dict(zip(SPLIT_SIZES, sizes, strict=True)))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("k", "v", "text"),
    [
        (mx.zeros((R, N)), mx.zeros((H, V, R)), "three axes each"),
        (mx.zeros((H, R, N)), mx.zeros((H * V, R)), "three axes each"),
        (mx.zeros((H, R, N)), mx.zeros((2, V, R)), "the same number of heads"),
        (mx.zeros((H, R, N)), mx.zeros((H, V, 64)), "the same kv_lora_rank"),
        (mx.zeros((H, R, N)), mx.zeros((H, V, R), mx.bfloat16), "one dtype"),
    ],
    ids=["k-axes", "v-axes", "heads", "rank", "dtype"],
)
def test_merge_refuses(k: mx.array, v: mx.array, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        merge_kv_b(k, v)
    assert f"needed  {text}" in str(caught.value)
    assert f"found   float32 {list(k.shape)} and " in str(caught.value)


# ---- heads over ranks


@dataclass(frozen=True)
class Rank:
    """Stands in for mx.distributed.Group, whose size is 1 in a single process."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


class Attention(nn.Module):
    def __init__(self, spec: QuantSpec | None, num_heads_attr: str = "num_heads") -> None:
        super().__init__()
        self.embed_q: Any = MultiLinear(N, R, H)
        self.unembed_out: Any = MultiLinear(R, V, H)
        self.embed_q.weight = random(H, R, N, seed=1)
        self.unembed_out.weight = random(H, V, R, seed=2)
        setattr(self, num_heads_attr, H)
        if spec is not None:
            self.embed_q = quantize_multilinear(self.embed_q, spec)
            self.unembed_out = quantize_multilinear(self.unembed_out, spec)

    def state(self) -> Weights:
        return {
            f"{name}.{part}": array
            for name in ("embed_q", "unembed_out")
            for part, array in self[name].parameters().items()
        }


@pytest.mark.parametrize("spec", [None, *MODES], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("attr", ["num_heads", "num_attention_heads"])
def test_ranks_together_are_the_whole(spec: QuantSpec | None, count: int, attr: str) -> None:
    whole = Attention(spec, attr)
    ranks = [Attention(spec, attr) for _ in range(count)]
    for index, attn in enumerate(ranks):
        shard_mla_projections(attn, Rank(index, count), attr)
        assert getattr(attn, attr) == H // count
    for name, array in whole.state().items():
        pieces = [attn.state()[name] for attn in ranks]
        assert {piece.shape[0] for piece in pieces} == {H // count}
        assert same(mx.concatenate(pieces), array)

    latent = random(1, H, 3, R, dtype=mx.float32)
    pieces = [
        attn.unembed_out(part) for attn, part in zip(ranks, mx.split(latent, count, axis=1), strict=True)
    ]
    assert mx.allclose(mx.concatenate(pieces, axis=1), whole.unembed_out(latent), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [None, QuantSpec(bits=8, group_size=32)], ids=str)
@pytest.mark.parametrize(("index", "count"), [(0, 2), (1, 2), (3, 4)])
def test_shard_does_what_mlx_lm_does(spec: QuantSpec | None, index: int, count: int) -> None:
    theirs = tiny_deepseek()
    if spec is not None:
        multilinear = ("embed_q", "unembed_out")
        nn.quantize(
            theirs, spec.group_size, spec.bits, class_predicate=lambda path, _: path.endswith(multilinear)
        )
    attn = copy.copy(theirs.layers[0].self_attn)
    attn.embed_q, attn.unembed_out = copy.copy(attn.embed_q), copy.copy(attn.unembed_out)
    whole = attn.embed_q.weight
    shard_mla_projections(attn, Rank(index, count))
    assert theirs.layers[0].self_attn.embed_q.weight is whole

    theirs.shard(Rank(index, count))
    expected = theirs.layers[0].self_attn
    assert attn.num_heads == expected.num_heads == H // count
    for name in ("embed_q", "unembed_out"):
        left, right = (module[name].parameters() for module in (attn, expected))
        assert same_weights(left, right)
        assert left["weight"].shape[0] == H // count


def test_a_rank_does_not_keep_the_memory_of_all() -> None:
    attn = Attention(None)
    attn.embed_q.weight = mx.zeros((H, 512, 512))
    attn.unembed_out.weight = mx.zeros((H, 512, 512))
    mx.eval(attn.embed_q.weight, attn.unembed_out.weight)
    before = mx.get_active_memory()
    shard_mla_projections(attn, Rank(1, 4))
    mx.eval(attn.embed_q.weight, attn.unembed_out.weight)
    # 2 x 4 MiB become 2 x 1 MiB.
    assert before - mx.get_active_memory() >= 5 * 2**20


def untouched(attn: Attention) -> Attention:
    return attn


def fewer_heads(attn: Attention) -> Attention:
    attn.unembed_out.weight = attn.unembed_out.weight[:2]
    return attn


def wrong_count(attn: Attention) -> Attention:
    attn.num_heads = 8
    return attn


def fewer_scales(attn: Attention) -> Attention:
    attn.unembed_out.scales = attn.unembed_out.scales[:2]
    return attn


@pytest.mark.parametrize(
    ("spec", "spoil", "count", "attr", "text"),
    [
        (None, untouched, 3, "num_heads", "Attention.num_heads = 4 heads cannot be shared by 3 ranks"),
        (None, untouched, 8, "num_heads", "Attention.num_heads = 4 heads cannot be shared by 8 ranks"),
        (None, untouched, 2, "n_heads", "Attention.n_heads is None; the number of heads is needed"),
        (
            None,
            wrong_count,
            2,
            "num_heads",
            "embed_q.weight has 4 heads on its first axis, but Attention.num_heads = 8",
        ),
        (None, fewer_heads, 2, "num_heads", "unembed_out.weight has 2 heads on its first axis, but"),
        (QuantSpec(), fewer_scales, 2, "num_heads", "unembed_out.scales has 2 heads on its first axis, but"),
    ],
    ids=["three-ranks", "too-many", "no-attribute", "wrong-count", "v-heads", "v-scales"],
)
def test_shard_refuses_and_changes_nothing(
    spec: QuantSpec | None, spoil: Callable[[Attention], Attention], count: int, attr: str, text: str
) -> None:
    attn = spoil(Attention(spec))
    state, num_heads = attn.state(), attn.num_heads
    with pytest.raises(ValueError) as caught:
        shard_mla_projections(attn, Rank(0, count), attr)
    assert text in str(caught.value)
    assert attn.state() == state
    assert attn.num_heads == num_heads
