"""DeepSeek V4 (Flash, Pro and their Base versions) as a model of mlx-lm.

A folder with a converted checkpoint names a file in config.json, `"model_file": "deepseek_v4.py"`, with
two lines in it: a docstring and an import of Model, ModelArgs and ModelConfig from here. mlx-lm takes the
classes from that file, and so does `mlx_vlm.utils.load_model`.

The mathematics are those of transformers' `deepseek_v4`; parameter names and shapes are those of mlx-vlm's
class, so that one checkpoint serves both. With V = vocab_size, D = hidden_size, H = num_attention_heads,
d = head_dim, Q = q_lora_rank, G = o_groups, O = o_lora_rank, M = hc_mult, E = n_routed_experts,
I = moe_intermediate_size, S = I * n_shared_experts, K = num_experts_per_tok, h = index_n_heads,
i = index_head_dim, R = the compress ratio of the layer, and w = 2 where groups overlap (R = 4), else 1:

    model.embed_tokens.weight                           [V, D]
    model.norm.weight                                   [D]
    model.hc_head.{fn, base, scale}                     [M, M * D], [M], [1]            float32
    lm_head.weight                                      [V, D]
    model.layers.N.{attn_norm, ffn_norm}.weight         [D]
    model.layers.N.{attn_hc, ffn_hc}.fn                 [(2 + M) * M, M * D]            float32
    model.layers.N.{attn_hc, ffn_hc}.{base, scale}      [(2 + M) * M], [3]              float32
    model.layers.N.attn.wq_a.weight                     [Q, D]
    model.layers.N.attn.q_norm.weight                   [Q]
    model.layers.N.attn.wq_b.weight                     [H * d, Q]
    model.layers.N.attn.wkv.weight                      [d, D]
    model.layers.N.attn.kv_norm.weight                  [d]
    model.layers.N.attn.attn_sink                       [H]                             float32
    model.layers.N.attn.wo_a.weight                     [G, O, H * d / G]
    model.layers.N.attn.wo_b.weight                     [D, G * O]
    model.layers.N.attn.compressor.{wkv, wgate}.weight  [w * d, D]                      R > 0
    model.layers.N.attn.compressor.ape                  [R, w * d]                      R > 0, float32
    model.layers.N.attn.compressor.norm.weight          [d]                             R > 0
    model.layers.N.attn.indexer.wq_b.weight             [h * i, Q]                      R = 4
    model.layers.N.attn.indexer.weights_proj.weight     [h, D]                          R = 4
    model.layers.N.attn.indexer.compressor.*            as above, with i for d          R = 4
    model.layers.N.ffn.gate.weight                      [E, D]
    model.layers.N.ffn.gate.tid2eid                     [V, K]          N < num_hash_layers, int32
    model.layers.N.ffn.gate.e_score_correction_bias     [E]             other layers, float32
    model.layers.N.ffn.switch_mlp.{gate, up}_proj.weight        [E, I, D]
    model.layers.N.ffn.switch_mlp.down_proj.weight              [E, D, I]
    model.layers.N.ffn.shared_experts.{gate, up}_proj.weight    [S, D]
    model.layers.N.ffn.shared_experts.down_proj.weight          [D, S]

The modules with a `weight` of two or three axes, the routers (`ffn.gate`) aside, may be quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx_lm.models.base import BaseModelArgs

# mlx-lm's V4.1 has the same normalization, in one kernel on Metal.
from mlx_lm.models.deepseek_v41 import _sinkhorn
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU

from mla_tools.models.deepseek_v4_cache import ArraysCache as LayerCache
from mla_tools.models.deepseek_v4_cache import Groups, Span, runs

__all__ = ["Model", "ModelArgs", "ModelConfig"]

# Attention runs over this many queries of all requests at a time, with the keys of their windows.
QUERY_BLOCK = 128
# With up to this many times the entries that a query may choose, masking the others is cheaper than
# gathering the chosen ones for each query.
DENSE_FACTOR = 4
# The ratios that the reference knows: no compressor, overlapping groups with an indexer, long groups.
SPARSE, RATIOS = 4, (0, 4, 128)


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of the hub's config.json that the model reads."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    sliding_window: int
    compress_ratios: list[int]
    compress_rope_theta: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    num_hash_layers: int
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sqrtsoftplus"
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        # The hub's list continues for the MTP layers.
        self.compress_ratios = list(self.compress_ratios[: self.num_hidden_layers])
        if len(self.compress_ratios) != self.num_hidden_layers:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} numbers, "
                f"and num_hidden_layers is {self.num_hidden_layers}."
            )
        unknown = sorted(set(self.compress_ratios) - set(RATIOS))
        if unknown:
            raise ValueError(f"compress_ratios has {unknown}; a ratio is one of {list(RATIOS)}.")
        if self.scoring_func != "sqrtsoftplus":
            raise ValueError(f"scoring_func is {self.scoring_func!r}; DeepSeek V4 has 'sqrtsoftplus'.")
        kind = self.rope_type
        if kind not in ("default", "yarn"):
            raise ValueError(f"rope_scaling has the type {kind!r}; DeepSeek V4 has 'yarn' or none.")

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return str(scaling.get("type", scaling.get("rope_type", "default")))


# What mlx-vlm calls it.
ModelConfig = ModelArgs


# ---- positions


def inverse_frequencies(args: ModelArgs, *, compressed: bool) -> mx.array:
    """Return the angle per position of each pair of rotated dimensions, float32 [qk_rope_head_dim / 2].

    Only layers with a compressor have yarn, and its scaling of cos and sin is left out, as in the reference.
    """
    dims = args.qk_rope_head_dim
    base = args.compress_rope_theta if compressed else args.rope_theta
    extrapolated = 1.0 / np.power(np.float32(base), np.arange(0, dims, 2, dtype=np.float32) / dims)
    if not compressed or args.rope_type != "yarn":
        return mx.array(extrapolated.astype(np.float32))
    scaling = args.rope_scaling or {}
    context = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """The pair that turns this often within the original context."""
        return float(dims * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(base)))

    low = max(np.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(np.ceil(dimension(scaling.get("beta_slow", 1))), dims - 1)
    width = high - low or 0.001
    interpolation = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / width, 0, 1)
    mixed = extrapolated * (1 - interpolation) + extrapolated / scaling["factor"] * interpolation
    return mx.array(mixed.astype(np.float32))


@mx.compile
def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Return x [B, _, L, d], the pairs of its last dimensions turned; cos and sin are [_, 1, L, pairs]."""
    dims = 2 * cos.shape[-1]
    pairs = mx.unflatten(x[..., -dims:].astype(mx.float32), -1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return mx.concatenate([x[..., :-dims], turned.flatten(-2).astype(x.dtype)], axis=-1)


class Call:
    """What all layers share in one call: angles and masks, made when the first layer asks for them."""

    def __init__(self, args: ModelArgs, span: Span) -> None:
        self.span = span
        self.window = args.sliding_window
        self.past = span.past(args.sliding_window - 1)
        self._args = args
        self._made: dict[Any, Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _angles(self, positions: np.ndarray[Any, Any], compressed: bool) -> tuple[mx.array, mx.array]:
        speeds = self._once(
            ("speeds", compressed), lambda: inverse_frequencies(self._args, compressed=compressed)
        )
        angles = mx.array(positions.astype(np.float32))[:, None, :, None] * speeds
        return mx.cos(angles), mx.sin(angles)

    def _rows(self, numbers: list[int]) -> np.ndarray[Any, Any]:
        """The numbers of the batch rows as a column; one row stands for all where they are the same."""
        return np.array(numbers[:1] if self.span.aligned else numbers)[:, None]

    def tokens(self, compressed: bool) -> tuple[mx.array, mx.array, mx.array]:
        """Return cos, sin and -sin at the positions of the tokens."""

        def make() -> tuple[mx.array, mx.array, mx.array]:
            positions = self._rows(list(self.span.offsets)) + np.arange(self.span.length)
            cos, sin = self._angles(positions, compressed)
            return cos, sin, -sin

        made: tuple[mx.array, mx.array, mx.array] = self._once(("tokens", compressed), make)
        return made

    def groups(self, ratio: int) -> tuple[mx.array, mx.array]:
        """Return cos and sin at the positions of the entries that the call makes: their first tokens."""

        def make() -> tuple[mx.array, mx.array]:
            first = self._rows(self.span.first(ratio))
            return self._angles((first + np.arange(self.span.closed(ratio))) * ratio, True)

        made: tuple[mx.array, mx.array] = self._once(("groups", ratio), make)
        return made

    def first_groups(self, ratio: int) -> mx.array:
        """Return bool [_, groups, 1, 1]: whether a group is the first of its request, with none before it."""

        def make() -> mx.array:
            numbers = self._rows(self.span.first(ratio)) + np.arange(self.span.closed(ratio))
            return mx.array(numbers == 0)[:, :, None, None]

        made: mx.array = self._once(("first", ratio), make)
        return made

    def window_mask(self, start: int, stop: int, low: int) -> np.ndarray[Any, Any]:
        """Return bool [_, queries, keys]: the queries from start to stop, the window's rows from low on."""
        query = np.arange(start, stop)[:, None]
        key = np.arange(low, self.past + stop)[None] - self.past
        seen = (key <= query) & (key > query - self.window)
        return seen & (key >= -self._rows(list(self.span.offsets))[..., None])

    def entries_seen(self, ratio: int, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return [_, queries, 1], the number of entries that each query may see."""
        positions = self._rows(list(self.span.offsets)) + np.arange(start, stop)
        return ((positions + 1) // ratio)[..., None]

    def mask(self, ratio: int, start: int, stop: int, low: int, count: int) -> mx.array | None:
        """Return bool [_, 1, queries, keys] for the window's rows and `count` entries; None: all seen."""

        def make() -> mx.array | None:
            parts = [self.window_mask(start, stop, low)]
            if count:
                parts.append(np.arange(count) < self.entries_seen(ratio, start, stop))
            both = np.concatenate(parts, axis=-1)
            return None if both.all() else mx.array(both)[:, None]

        made: mx.array | None = self._once(("mask", ratio, start, stop, low, count), make)
        return made

    def sparse_masks(self, ratio: int, start: int, stop: int, low: int) -> tuple[mx.array, mx.array] | None:
        """Return the window's mask [_, queries, keys] and the numbers of entries seen [_, queries, 1].

        None where a single query sees all rows of the window, and all entries there are.
        """

        def make() -> tuple[mx.array, mx.array] | None:
            window = self.window_mask(start, stop, low)
            if stop - start == 1 and self.span.aligned and window.all():
                return None
            return mx.array(window), mx.array(self.entries_seen(ratio, start, stop))

        made: tuple[mx.array, mx.array] | None = self._once(("sparse", ratio, start, stop, low), make)
        return made


# ---- parts


class Norm(nn.RMSNorm):
    """RMSNorm whose weight may be wider than its input; it computes in the wider and returns the narrower."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    """Return silu(gate) * up, both clamped first."""
    return nn.silu(mx.minimum(gate, limit)) * mx.clip(up, -limit, limit)


class ClampedSwiGLU(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return swiglu(gate, up, self.limit)


def weighted(streams: mx.array, weights: mx.array) -> mx.array:
    """Return the sum [B, L, D] of the streams [B, L, M, D], weighted [B, L, M]."""
    return (weights[..., None] * streams.astype(mx.float32)).sum(axis=2).astype(streams.dtype)


def mixes(streams: mx.array, fn: mx.array, norm_eps: float) -> mx.array:
    """Return the projection by `fn` of all streams of a token, divided by their root mean square; float32."""
    return mx.fast.rms_norm(streams.astype(mx.float32).flatten(-2), None, norm_eps) @ fn.T


@mx.compile
def collapse(
    streams: mx.array,
    fn: mx.array,
    scale: mx.array,
    base: mx.array,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the input [B, L, D] of a block, and for `expand` the weights of its output and the streams."""
    count = streams.shape[2]
    into, out, among = mx.split(mixes(streams, fn, norm_eps), [count, 2 * count], axis=-1)
    into_base, out_base, among_base = mx.split(base, [count, 2 * count])
    into = mx.sigmoid(into * scale[0] + into_base) + eps
    out = 2 * mx.sigmoid(out * scale[1] + out_base)
    among = mx.unflatten(among * scale[2] + among_base, -1, (count, count))
    among = mx.softmax(among, axis=-1, precise=True) + eps
    return weighted(streams, into), out, _sinkhorn(among, iters=iterations, eps=mx.array(eps))


@mx.compile
def expand(x: mx.array, streams: mx.array, out: mx.array, among: mx.array) -> mx.array:
    """Return the streams, mixed by the transpose of `among` [B, L, M, M], with x added to each by `out`."""
    mixed = among.swapaxes(-1, -2) @ streams.astype(mx.float32)
    return (out[..., None] * x[..., None, :].astype(mx.float32) + mixed).astype(streams.dtype)


class HyperConnection(nn.Module):
    """The streams of a token: one vector into a block, and what comes out back into all of them."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.iterations, self.eps, self.norm_eps = args.hc_sinkhorn_iters, args.hc_eps, args.rms_norm_eps
        rows = (2 + args.hc_mult) * args.hc_mult
        self.fn = mx.zeros((rows, args.hc_mult * args.hidden_size))
        self.base = mx.zeros((rows,))
        self.scale = mx.ones((3,))

    def __call__(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the input of the block, and the two weights that `expand` takes."""
        return collapse(streams, self.fn, self.scale, self.base, self.iterations, self.eps, self.norm_eps)


class HyperHead(nn.Module):
    """The last sum of the streams."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.eps, self.norm_eps = args.hc_eps, args.rms_norm_eps
        self.fn = mx.zeros((args.hc_mult, args.hc_mult * args.hidden_size))
        self.base = mx.zeros((args.hc_mult,))
        self.scale = mx.ones((1,))

    def __call__(self, streams: mx.array) -> mx.array:
        weights = mx.sigmoid(mixes(streams, self.fn, self.norm_eps) * self.scale + self.base) + self.eps
        return weighted(streams, weights)


# ---- experts


class Gate(nn.Module):
    """The router. The first layers look the experts of a token up by its id, and only weigh them."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.top_k, self.factor = args.num_experts_per_tok, args.routed_scaling_factor
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.hashed = layer < args.num_hash_layers
        if self.hashed:
            self.tid2eid = mx.zeros((args.vocab_size, args.num_experts_per_tok), mx.int32)
        else:
            self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """Return the experts of each token and their weights, [B, L, K] both."""
        logits = x @ self.weight.T
        if self.hashed:
            chosen = self.tid2eid[ids]
            return chosen, expert_weights(expert_scores(logits), chosen, self.factor)
        chosen, weights = choose_experts(logits, self.e_score_correction_bias, self.top_k, self.factor)
        return chosen, weights


def expert_scores(logits: mx.array) -> mx.array:
    return mx.sqrt(nn.softplus(logits.astype(mx.float32)))


def expert_weights(scores: mx.array, chosen: mx.array, factor: float) -> mx.array:
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return weights * (factor / (weights.sum(axis=-1, keepdims=True) + 1e-20))


@mx.compile
def choose_experts(logits: mx.array, bias: mx.array, top_k: int, factor: float) -> tuple[mx.array, mx.array]:
    scores = expert_scores(logits)
    # The bias takes part in the choice, not in the weights.
    chosen = mx.argpartition(-(scores + bias), kth=top_k - 1, axis=-1)[..., :top_k]
    return chosen, expert_weights(scores, chosen, factor)


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        inner = args.moe_intermediate_size * args.n_shared_experts
        self.limit = args.swiglu_limit
        self.gate_proj = nn.Linear(args.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class MoE(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.gate = Gate(args, layer)
        self.switch_mlp = SwitchGLU(
            args.hidden_size,
            args.moe_intermediate_size,
            args.n_routed_experts,
            activation=ClampedSwiGLU(args.swiglu_limit),
        )
        self.shared_experts = MLP(args)
        self.sharding_group: mx.distributed.Group | None = None

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        chosen, weights = self.gate(x, ids)
        routed = self.switch_mlp(x, chosen)  # [B, L, K, D]
        out = (routed * weights[..., None]).sum(axis=-2) + self.shared_experts(x)
        if self.sharding_group is not None:
            out = mx.distributed.all_sum(out, group=self.sharding_group)
        return out.astype(x.dtype)


# ---- attention


@mx.compile
def pool(values: mx.array, gates: mx.array) -> mx.array:
    """Return [B, g, w], the mean over the tokens of [B, g, tokens, w] by the softmax of the gates."""
    weights = mx.softmax(gates.astype(mx.float32), axis=2, precise=True)
    return (values * weights).sum(axis=2)


class Compressor(nn.Module):
    """Makes one entry of each closed group of tokens.

    Where groups overlap, a token has two projections: with the first it takes part in the entry of the
    next group, with the second in that of its own.
    """

    def __init__(self, args: ModelArgs, ratio: int, dim: int) -> None:
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, ratio == SPARSE
        width = 2 * dim if self.overlap else dim
        self.wkv = nn.Linear(args.hidden_size, width, bias=False)
        self.wgate = nn.Linear(args.hidden_size, width, bias=False)
        self.ape = mx.zeros((ratio, width))
        self.norm = Norm(dim, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, call: Call, state: Groups) -> mx.array | None:
        """Return all entries [B, n, dim] up to the end of x [B, L, D]; None where there is none yet."""
        span, ratio = call.span, self.ratio
        rows = state.tokens.append(mx.concatenate([self.wkv(x), self.wgate(x)], axis=-1), span)
        count = span.closed(ratio)
        if count:
            before = ratio if self.overlap else 0
            past = span.past(state.tokens.size)
            starts = [past - offset % ratio - before for offset in span.offsets]
            tokens = mx.unflatten(runs(rows, starts, before + count * ratio), 1, (-1, ratio))
            entries = self._pooled(tokens, call).astype(x.dtype)
            cos, sin = call.groups(ratio)
            entries = rotate(self.norm(entries)[:, None], cos, sin)[:, 0]
            state.entries.write(entries, span.first(ratio))
        return state.entries.rows

    def _pooled(self, tokens: mx.array, call: Call) -> mx.array:
        """Return [B, g, dim] of the groups [B, g, ratio, 2 * width]; if they overlap, after one more."""
        values, gates = mx.split(tokens, 2, axis=-1)
        gates = gates.astype(mx.float32) + self.ape
        if not self.overlap:
            return pool(values, gates)
        none = call.first_groups(self.ratio)
        earlier = mx.where(none, -mx.inf, gates[:, :-1, :, : self.dim])
        return pool(
            mx.concatenate([values[:, :-1, :, : self.dim], values[:, 1:, :, self.dim :]], axis=2),
            mx.concatenate([earlier, gates[:, 1:, :, self.dim :]], axis=2),
        )


class Indexer(nn.Module):
    """Chooses for each query the entries that it attends to."""

    def __init__(self, args: ModelArgs, ratio: int) -> None:
        super().__init__()
        self.heads, self.dim, self.top_k = args.index_n_heads, args.index_head_dim, args.index_topk
        self.wq_b = nn.Linear(args.q_lora_rank, self.heads * self.dim, bias=False)
        self.weights_proj = nn.Linear(args.hidden_size, self.heads, bias=False)
        self.compressor = Compressor(args, ratio, self.dim)

    def queries(self, x: mx.array, latent: mx.array, call: Call) -> tuple[mx.array, mx.array]:
        """Return the queries [B, L, h, i] and the weights of their heads [B, L, 1, h], float32 both."""
        cos, sin, _ = call.tokens(True)
        q = mx.unflatten(self.wq_b(latent), -1, (self.heads, self.dim)).swapaxes(1, 2)
        q = rotate(q, cos, sin).swapaxes(1, 2)
        return q.astype(mx.float32), self.weights_proj(x).astype(mx.float32)[:, :, None]

    def choose(self, q: mx.array, weights: mx.array, keys: mx.array, seen: mx.array | None) -> mx.array:
        """Return [B, L, top_k] of the entries with the keys [B, n, i]; the first `seen` [_, L, 1] count.

        The factors that the reference multiplies the scores with are positive and change no choice.
        """
        batch, length, heads, dim = q.shape
        scores = q.reshape(batch, length * heads, dim) @ keys.astype(mx.float32).swapaxes(-1, -2)
        scores = mx.maximum(scores, 0).reshape(batch, length, heads, -1)
        scores = (weights @ scores)[:, :, 0]
        if seen is not None:
            scores = mx.where(mx.arange(keys.shape[1]) < seen, scores, -mx.inf)
        return mx.argpartition(-scores, kth=self.top_k - 1, axis=-1)[..., : self.top_k]


def picked(rows: mx.array, chosen: mx.array) -> mx.array:
    """Return [B, L, k, d], the chosen [B, L, k] of the rows [B, n, d]."""
    batch, total, _ = rows.shape
    return rows.flatten(0, 1)[chosen + mx.arange(batch)[:, None, None] * total]


@dataclass(frozen=True)
class Entries:
    """The compressed entries [B, n, d] of a layer.

    `choose`, where each query takes only some: (first query, end, entries, how many of these each query
    sees) -> [B, queries, top_k].
    """

    rows: mx.array
    choose: Callable[[int, int, int, mx.array | None], mx.array] | None = None


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.ratio = args.compress_ratios[layer]
        self.heads, self.head_dim, self.groups = args.num_attention_heads, args.head_dim, args.o_groups
        self.window, self.norm_eps = args.sliding_window, args.rms_norm_eps
        self.wq_a = nn.Linear(args.hidden_size, args.q_lora_rank, bias=False)
        self.q_norm = Norm(args.q_lora_rank, eps=args.rms_norm_eps)
        self.wq_b = nn.Linear(args.q_lora_rank, self.heads * self.head_dim, bias=False)
        self.wkv = nn.Linear(args.hidden_size, self.head_dim, bias=False)
        self.kv_norm = Norm(self.head_dim, eps=args.rms_norm_eps)
        self.attn_sink = mx.zeros((self.heads,))
        self.wo_a = MultiLinear(self.heads * self.head_dim // self.groups, args.o_lora_rank, self.groups)
        self.wo_b = nn.Linear(self.groups * args.o_lora_rank, args.hidden_size, bias=False)
        if self.ratio:
            self.compressor = Compressor(args, self.ratio, self.head_dim)
        if self.ratio == SPARSE:
            self.indexer = Indexer(args, self.ratio)

    def make_cache(self) -> LayerCache:
        sparse = self.ratio == SPARSE
        return LayerCache(self.window, self.ratio, overlap=sparse, indexed=sparse)

    def __call__(self, x: mx.array, call: Call, cache: LayerCache) -> mx.array:
        cos, sin, inverse = call.tokens(self.ratio > 0)
        latent = self.q_norm(self.wq_a(x))
        q = mx.unflatten(self.wq_b(latent), -1, (self.heads, self.head_dim))
        q = mx.fast.rms_norm(q, None, self.norm_eps).swapaxes(1, 2)
        q = rotate(q, cos, sin)
        # Keys and values are the same vectors, one for all heads.
        kv = rotate(self.kv_norm(self.wkv(x))[:, None], cos, sin)[:, 0]
        rows = cache.window.append(kv, call.span)
        out = self._attend(q, rows, self._entries(x, latent, call, cache), call)
        # The values were turned by their positions; turned back by the query's, they stand relative to it.
        out = rotate(out, cos, inverse)
        batch, _, length, _ = out.shape
        out = out.reshape(batch, self.groups, -1, length, self.head_dim).swapaxes(2, 3).flatten(3)
        out = self.wo_a(out)  # [B, G, L, O]
        return self.wo_b(out.swapaxes(1, 2).flatten(2))

    def _entries(self, x: mx.array, latent: mx.array, call: Call, cache: LayerCache) -> Entries | None:
        """Return the compressed entries, and the choice among them where they are more than a query takes."""
        if cache.compressor is None:
            return None
        rows = self.compressor(x, call, cache.compressor)
        if cache.indexer is None:
            return None if rows is None else Entries(rows)
        keys = self.indexer.compressor(x, call, cache.indexer)
        if rows is None or keys is None:
            return None
        if max(call.span.visible(self.ratio, call.span.length - 1)) <= self.indexer.top_k:
            return Entries(rows)
        queries, weights = self.indexer.queries(x, latent, call)

        def choose(start: int, stop: int, count: int, seen: mx.array | None) -> mx.array:
            return self.indexer.choose(queries[:, start:stop], weights[:, start:stop], keys[:, :count], seen)

        return Entries(rows, choose)

    def _attend(self, q: mx.array, rows: mx.array, entries: Entries | None, call: Call) -> mx.array:
        """Return [B, H, L, d] of the queries over the window's rows [B, past + L, d] and the entries."""
        parts, step = [], max(QUERY_BLOCK // q.shape[0], 1)
        for start in range(0, call.span.length, step):
            stop = min(start + step, call.span.length)
            low = max(call.past + start - self.window + 1, 0)
            block, near = q[:, :, start:stop], rows[:, low : call.past + stop]
            count = 0 if entries is None else max(call.span.visible(self.ratio, stop - 1))
            if entries is None or not count:
                parts.append(self._dot(block, near, call.mask(0, start, stop, low, 0)))
            elif entries.choose is None or count <= self.indexer.top_k:
                keys = mx.concatenate([near, entries.rows[:, :count]], axis=1)
                parts.append(self._dot(block, keys, call.mask(self.ratio, start, stop, low, count)))
            else:
                masks = call.sparse_masks(self.ratio, start, stop, low)
                chosen = entries.choose(start, stop, count, masks and masks[1])
                parts.append(self._sparse(block, near, entries.rows, count, chosen, masks))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _sparse(
        self,
        q: mx.array,
        near: mx.array,
        far: mx.array,
        count: int,
        chosen: mx.array,
        masks: tuple[mx.array, mx.array] | None,
    ) -> mx.array:
        """Return the attention of a block of queries over the window's rows and each one's chosen entries."""
        batch, length, taken = chosen.shape
        if masks is None:
            keys = mx.concatenate([near, picked(far, chosen)[:, 0]], axis=1)
            return self._dot(q, keys, None)
        window, valid = mx.broadcast_to(masks[0], (batch, length, near.shape[1])), chosen < masks[1]
        if length > 1 and count <= DENSE_FACTOR * taken:
            seen = mx.zeros((batch, length, count), mx.bool_)
            seen = mx.put_along_axis(seen, chosen, valid, axis=-1)
            keys = mx.concatenate([near, far[:, :count]], axis=1)
            return self._dot(q, keys, mx.concatenate([window, seen], axis=-1)[:, None])
        # Each query has keys of its own: it becomes a row of the batch. In a block, query j sees the
        # window's rows from `near.shape[1] - length + j` backwards.
        size = min(self.window, near.shape[1])
        last = np.arange(near.shape[1] - length, near.shape[1])[:, None]
        index = mx.array(np.maximum(last - size + 1, 0) + np.arange(size))
        window = mx.take_along_axis(window, mx.broadcast_to(index, (batch, length, size)), axis=-1)
        keys = mx.concatenate([near[:, index], picked(far, chosen)], axis=2)
        out = self._dot(
            q.swapaxes(1, 2).flatten(0, 1)[:, :, None],
            keys.flatten(0, 1),
            mx.concatenate([window, valid], axis=-1).flatten(0, 1)[:, None, None],
        )
        return mx.unflatten(out[:, :, 0], 0, (batch, length)).swapaxes(1, 2)

    def _dot(self, q: mx.array, keys: mx.array, mask: mx.array | None) -> mx.array:
        """Return the attention of q [B, H, L, d] over the keys [B, n, d], with the sinks of the heads."""
        keys = keys[:, None]
        return mx.fast.scaled_dot_product_attention(
            q, keys, keys, scale=self.head_dim**-0.5, mask=mask, sinks=self.attn_sink.astype(q.dtype)
        )


# ---- the model


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attn = Attention(args, layer)
        self.ffn = MoE(args, layer)
        self.attn_norm = Norm(args.hidden_size, eps=args.rms_norm_eps)
        self.ffn_norm = Norm(args.hidden_size, eps=args.rms_norm_eps)
        self.attn_hc = HyperConnection(args)
        self.ffn_hc = HyperConnection(args)

    def __call__(self, streams: mx.array, ids: mx.array, call: Call, cache: LayerCache) -> mx.array:
        x, out, among = self.attn_hc(streams)
        streams = expand(self.attn(self.attn_norm(x), call, cache), streams, out, among)
        x, out, among = self.ffn_hc(streams)
        return expand(self.ffn(self.ffn_norm(x), ids), streams, out, among)


class DeepseekV4Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = Norm(args.hidden_size, eps=args.rms_norm_eps)
        self.hc_head = HyperHead(args)

    def __call__(self, ids: mx.array, caches: list[LayerCache]) -> mx.array:
        span = caches[0].span(*ids.shape)
        call = Call(self.args, span)
        x = self.embed_tokens(ids)
        streams = mx.repeat(x[:, :, None], self.args.hc_mult, axis=2)
        for layer, cache in zip(self.layers, caches, strict=True):
            cache.span(*ids.shape)
            streams = layer(streams, ids, call, cache)
            cache.advance(span)
        return self.norm(self.hc_head(streams))


class Model(nn.Module):
    """The class that mlx-lm takes from a model file."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = DeepseekV4Model(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return the logits [B, L, V] of the token ids [B, L]; the cache is brought up to their end."""
        caches = self.make_cache() if cache is None else cache
        for i, layer in enumerate(self.layers):
            if not isinstance(caches[i], LayerCache):
                # It comes from a file: see ArraysCache.
                caches[i] = layer.attn.make_cache().adopt(caches[i])
        return self.lm_head(self.model(inputs, caches))

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self) -> list[LayerCache]:
        return [layer.attn.make_cache() for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the weights without the prefix that mlx-vlm writes; nothing else is changed."""
        return {name.removeprefix("language_model."): array for name, array in weights.items()}

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Tell which parameters `mlx_lm.convert --dtype` may round; not those that the reference keeps."""
        kept = (
            "_hc.",
            "hc_head.",
            "attn_sink",
            "e_score_correction_bias",
            "norm.",
            "compressor.",
            "weights_proj",
        )
        return lambda name: not any(word in name for word in kept)

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Tell which modules `mlx_lm.convert -q` quantizes; not what the official layout has in bf16."""
        kept = ("compressor.", "weights_proj")
        return lambda path, module: not any(word in path for word in kept)

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep the share of this rank: whole output groups with their heads, and a slice of every expert."""
        group = group or mx.distributed.init()
        size, rank = group.size(), group.rank()
        if self.args.o_groups % size or self.args.moe_intermediate_size % size:
            raise ValueError(
                f"{size} ranks do not divide the {self.args.o_groups} output groups (o_groups) "
                f"and the {self.args.moe_intermediate_size} rows of an expert (moe_intermediate_size)."
            )
        for layer in self.layers:
            attn, ffn = layer.attn, layer.ffn
            attn.wq_b = shard_linear(attn.wq_b, "all-to-sharded", group=group)
            shard_inplace(attn.wo_a, lambda path, weight: 0, group=group)
            attn.wo_b = shard_linear(attn.wo_b, "sharded-to-all", group=group)
            attn.heads //= size
            attn.groups //= size
            attn.attn_sink = attn.attn_sink[rank * attn.heads : (rank + 1) * attn.heads]
            ffn.sharding_group = group
            for mlp in (ffn.switch_mlp, ffn.shared_experts):
                shard_inplace(mlp.gate_proj, "all-to-sharded", group=group)
                shard_inplace(mlp.up_proj, "all-to-sharded", group=group)
                shard_inplace(mlp.down_proj, "sharded-to-all", group=group)
