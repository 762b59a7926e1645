"""DeepSeek V4 (Flash, Pro and their Base versions) as a model of mlx-lm.

A folder with a converted checkpoint names a file in config.json, `"model_file": "deepseek_v4.py"`. It is
made of mla-tools' module of this class and that of its caches, and needs nothing but mlx-lm. mlx-lm takes
the classes from that file, and so does `mlx_vlm.utils.load_model`.

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

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear, sum_gradients
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.cache import ArraysCache, CacheList
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.pipeline import PipelineMixin
from mlx_lm.models.rope_utils import YarnRoPE
from mlx_lm.models.switch_layers import SwitchGLU

from mla_tools.models.deepseek_v4_cache import (
    ENTRIES,
    NO_EFFECT,
    TAILS,
    TOKENS,
    WINDOW,
    Span,
    adopt,
    append_entries,
    append_rows,
    arrays,
    count_tokens,
    entry_starts,
    make_layer_cache,
    refuse_quantization,
    tail,
)

__all__ = ["Model", "ModelArgs", "ModelConfig"]

# Attention runs over this many queries of all requests at a time, with the keys of their windows.
QUERY_BLOCK = 128
# The indexer computes this many scores of heads at a time, unless a single query has more.
SCORES = 1 << 23
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


@mx.compile
def rotate(x: mx.array, offset: mx.array, freqs: mx.array, scale: float, inverse: bool) -> mx.array:
    dims = 2 * freqs.shape[0]
    turned = mx.fast.rope(
        x[..., -dims:].astype(mx.float32),
        dims,
        traditional=True,
        base=None,
        scale=scale,
        offset=offset,
        freqs=-freqs if inverse else freqs,
    )
    return mx.concatenate([x[..., :-dims], turned.astype(x.dtype)], axis=-1)


class RoPE(YarnRoPE):
    """Turns pairs of the last dimensions.

    Only layers with a compressor have yarn, and its scaling of cos and sin is left out, as in the reference.
    """

    def __init__(self, args: ModelArgs, *, compressed: bool) -> None:
        scaling = args.rope_scaling or {}
        yarn: dict[str, Any] = {}
        if compressed and args.rope_type == "yarn":
            yarn = {
                "scaling_factor": scaling["factor"],
                "original_max_position_embeddings": scaling["original_max_position_embeddings"],
                "beta_fast": scaling.get("beta_fast", 32),
                "beta_slow": scaling.get("beta_slow", 1),
            }
        base = args.compress_rope_theta if compressed else args.rope_theta
        super().__init__(args.qk_rope_head_dim, base=base, mscale=0.0, mscale_all_dim=0.0, **yarn)

    def __call__(
        self, x: mx.array, offset: mx.array, *, scale: float = 1.0, inverse: bool = False
    ) -> mx.array:
        """Return x [B, _, L, d]; the positions are `scale` times the numbers from `offset` ([] or [B]) on."""
        return rotate(x, offset, self._freqs, scale, inverse)


class Call:
    """What all layers share in one call: positions and masks, made when the first layer asks for them.

    `window` is the mask [_, 1, L, K] of the rows that `update_and_fetch` of a window returns; None: all seen.
    """

    def __init__(self, span: Span, window: mx.array | None) -> None:
        self.span = span
        self.window = window
        self.offset = self.numbers(list(span.offsets))
        # What a KVCache is given that counts tokens, and what one has no values for.
        self.nothing = mx.zeros((len(span.offsets), 1, span.length, 0))
        self._made: dict[Any, Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def numbers(self, numbers: Sequence[int]) -> mx.array:
        """Return the numbers of the batch rows, [B]; a single one, [], if they are all the same."""
        return mx.array(numbers[0] if len(set(numbers)) == 1 else list(numbers))

    def first_group(self, ratio: int) -> mx.array:
        """Return [] or [B], the numbers of the groups that are open when the call begins."""
        made: mx.array = self._once(("first", ratio), lambda: self.numbers(self.span.first(ratio)))
        return made

    def near(self, start: int, stop: int, low: int, high: int) -> mx.array | None:
        """Return the mask [_, 1, queries, keys] of the window's rows from low to high."""
        return None if self.window is None else self.window[..., start:stop, low:high]

    def places(
        self, ratio: int, starts: list[int] | None, start: int, stop: int
    ) -> tuple[mx.array, mx.array]:
        """Return the places of the entries that the queries see, the first and the end, [_, queries, 1]."""

        def make() -> tuple[mx.array, mx.array]:
            seen = (self.offset[..., None] + mx.arange(start + 1, stop + 1)) // ratio
            seen = seen.reshape(-1, stop - start, 1)
            if starts is None:
                return mx.zeros_like(seen), seen
            first = mx.array(starts)[:, None, None]
            return first, first + seen

        made: tuple[mx.array, mx.array] = self._once(("places", ratio, start, stop), make)
        return made

    def mask(
        self, ratio: int, starts: list[int] | None, start: int, stop: int, low: int, high: int, count: int
    ) -> mx.array | None:
        """Return the mask [_, 1, queries, keys] of the window's rows and `count` entries; None: all seen."""

        def make() -> mx.array | None:
            near = self.near(start, stop, low, high)
            if near is None and self.span.aligned and starts is None:
                # A single query sees all rows of the window, and all entries there are.
                return None
            first, end = self.places(ratio, starts, start, stop)
            place = mx.arange(count)
            far = ((place >= first) & (place < end))[:, None]
            batch = max(far.shape[0], 1 if near is None else near.shape[0])
            shape = (batch, 1, stop - start)
            if near is None:
                near = mx.ones((*shape, high - low), mx.bool_)
            return mx.concatenate(
                [mx.broadcast_to(part, (*shape, part.shape[-1])) for part in (near, far)], -1
            )

        made: mx.array | None = self._once(("mask", ratio, start, stop, low, high, count), make)
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


def sinkhorn(matrices: mx.array, iterations: int, eps: float) -> mx.array:
    """Return [..., M, M], the columns normalized, then `iterations - 1` times the rows and the columns."""
    kernel = SINKHORN
    if kernel is None or mx.default_device() != mx.gpu:
        return plain_sinkhorn(matrices, iterations, eps)

    @mx.custom_function
    def normalized(matrices: mx.array) -> mx.array:
        return kernel(matrices, iterations, eps)

    # A kernel has no gradient of its own.
    @normalized.vjp
    def backward(matrices: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        _, gradients = mx.vjp(lambda x: plain_sinkhorn(x, iterations, eps), [matrices], [cotangent])
        return gradients[0]

    return cast(mx.array, normalized(matrices))


def plain_sinkhorn(matrices: mx.array, iterations: int, eps: float) -> mx.array:
    matrices = matrices / (matrices.sum(axis=-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        matrices = matrices / (matrices.sum(axis=-1, keepdims=True) + eps)
        matrices = matrices / (matrices.sum(axis=-2, keepdims=True) + eps)
    return matrices


# One thread for each matrix. Compile-time constants are SIZE and ROUNDS.
SINKHORN_SOURCE = """
    const uint first = thread_position_in_grid.x * SIZE * SIZE;
    float cell[SIZE][SIZE];
    for (uint i = 0; i < SIZE; ++i) {
        for (uint j = 0; j < SIZE; ++j) {
            cell[i][j] = matrices[first + i * SIZE + j];
        }
    }
    for (int round = 0; round < ROUNDS; ++round) {
        // The first round has columns alone.
        for (uint i = 0; round > 0 && i < SIZE; ++i) {
            float total = 0;
            for (uint j = 0; j < SIZE; ++j) {
                total += cell[i][j];
            }
            for (uint j = 0; j < SIZE; ++j) {
                cell[i][j] /= total + eps[0];
            }
        }
        for (uint j = 0; j < SIZE; ++j) {
            float total = 0;
            for (uint i = 0; i < SIZE; ++i) {
                total += cell[i][j];
            }
            for (uint i = 0; i < SIZE; ++i) {
                cell[i][j] /= total + eps[0];
            }
        }
    }
    for (uint i = 0; i < SIZE; ++i) {
        for (uint j = 0; j < SIZE; ++j) {
            normalized[first + i * SIZE + j] = cell[i][j];
        }
    }
"""


def sinkhorn_kernel() -> Callable[[mx.array, int, float], mx.array] | None:
    """Return the function that normalizes matrices [..., M, M] in one kernel; None without Metal."""
    if not mx.metal.is_available():
        return None
    kernel: Any = mx.fast.metal_kernel(
        "deepseek_v4_sinkhorn", ["matrices", "eps"], ["normalized"], SINKHORN_SOURCE
    )

    def run(matrices: mx.array, iterations: int, eps: float) -> mx.array:
        size = matrices.shape[-1]
        count = matrices.size // size**2
        constants = [("SIZE", size), ("ROUNDS", iterations)]
        (made,) = kernel(
            inputs=[matrices, mx.array([eps])],
            template=constants,
            grid=(count, 1, 1),
            threadgroup=(min(count, 64), 1, 1),
            output_shapes=[matrices.shape],
            output_dtypes=[mx.float32],
        )
        return cast(mx.array, made)

    return run


SINKHORN = sinkhorn_kernel()


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
    # Not by mx.split: checkpoints of gradients in a compiled step cannot have it of what is not trained.
    into_base, out_base, among_base = base[:count], base[count : 2 * count], base[2 * count :]
    into = mx.sigmoid(into * scale[0] + into_base) + eps
    out = 2 * mx.sigmoid(out * scale[1] + out_base)
    among = mx.unflatten(among * scale[2] + among_base, -1, (count, count))
    among = mx.softmax(among, axis=-1, precise=True) + eps
    return weighted(streams, into), out, sinkhorn(among, iterations, eps)


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


class Frozen(set[str]):
    """The names of parameters that are not trained; `always` stay so when a module is unfrozen."""

    def __init__(self, always: Iterable[str] = ()) -> None:
        super().__init__(always)
        self.always = frozenset(self)

    def clear(self) -> None:
        super().clear()
        self.update(self.always)


class Gate(nn.Module):
    """The router. The first layers look the experts of a token up by its id, and only weigh them."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.top_k, self.factor = args.num_experts_per_tok, args.routed_scaling_factor
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.hashed = layer < args.num_hash_layers
        if self.hashed:
            self.tid2eid = mx.zeros((args.vocab_size, args.num_experts_per_tok), mx.int32)
            # Integers have no gradient.
            self._no_grad = Frozen(["tid2eid"])
        else:
            self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """Return the experts of each token and their weights, [B, L, K] both."""
        logits = x @ self.weight.T
        if self.hashed:
            chosen = mx.stop_gradient(self.tid2eid[ids])
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
    chosen = mx.stop_gradient(mx.argpartition(-(scores + bias), kth=top_k - 1, axis=-1)[..., :top_k])
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
        if self.sharding_group is not None:
            x = sum_gradients(self.sharding_group)(x)
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
        self.rope = RoPE(args, compressed=True)

    def __call__(self, x: mx.array, call: Call, tails: ArraysCache, slot: int) -> mx.array | None:
        """Return the entries [B, 1, g, dim] of the groups that x [B, L, D] closes; None if it closes none.

        `tails[slot]` has the projected tokens that precede x. In a row of the batch that closes fewer groups
        than another, the last entries have no meaning.
        """
        span, ratio = call.span, self.ratio
        before = ratio if self.overlap else 0
        size = before + ratio - 1
        rows = tail(tails, slot, mx.concatenate([self.wkv(x), self.wgate(x)], axis=-1), size)
        count = span.closed(ratio)
        if not count:
            return None
        tokens = self._run(
            rows, [size - offset % ratio - before for offset in span.offsets], before + count * ratio
        )
        entries = self._pooled(mx.unflatten(tokens, 1, (-1, ratio)), call).astype(x.dtype)
        return self.rope(self.norm(entries)[:, None], call.first_group(ratio), scale=ratio)

    @staticmethod
    def _run(rows: mx.array, starts: list[int], length: int) -> mx.array:
        """Return [B, length, D]: from each row of [B, _, D], `length` consecutive ones from `starts[b]` on.

        What lies behind the end are numbers without a meaning, which the caller leaves unread.
        """
        if len(set(starts)) == 1:
            return rows[:, starts[0] : starts[0] + length]
        index = mx.minimum(mx.array(starts)[:, None] + mx.arange(length), rows.shape[1] - 1)
        return mx.take_along_axis(rows, index[..., None], axis=1)

    def _pooled(self, tokens: mx.array, call: Call) -> mx.array:
        """Return [B, g, dim] of the groups [B, g, ratio, 2 * width]; if they overlap, after one more."""
        values, gates = mx.split(tokens, 2, axis=-1)
        gates = gates.astype(mx.float32) + self.ape
        if not self.overlap:
            return pool(values, gates)
        # The first group of a request has none before it.
        number = call.first_group(self.ratio)[..., None] + mx.arange(tokens.shape[1] - 1)
        earlier = mx.where((number == 0)[..., None, None], -mx.inf, gates[:, :-1, :, : self.dim])
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
        self.rope = RoPE(args, compressed=True)

    def queries(self, x: mx.array, latent: mx.array, call: Call) -> tuple[mx.array, mx.array]:
        """Return the queries [B, L, h, i], and the weights of their heads [B, L, 1, h], float32."""
        q = mx.unflatten(self.wq_b(latent), -1, (self.heads, self.dim)).swapaxes(1, 2)
        q = self.rope(q, call.offset).swapaxes(1, 2)
        return q, self.weights_proj(x).astype(mx.float32)[:, :, None]

    def choose(
        self, q: mx.array, weights: mx.array, keys: mx.array, places: tuple[mx.array, mx.array] | None
    ) -> mx.array:
        """Return [B, L, top_k] of the entries with the keys [B, n, i].

        `places`: the place of the first that a query sees and the end, [_, L, 1]; None: it sees all.
        The factors that the reference multiplies the scores with are positive and change no choice.
        """
        batch, length, heads, _ = q.shape
        step = max(SCORES // (batch * heads * keys.shape[1]), 1)
        parts: list[mx.array] = []
        for start in range(0, length, step):
            part = q[:, start : start + step]
            if parts:
                # One after the other, or the scores of all would be in memory together.
                part = mx.depends(part, parts[-1])
            cut = places and tuple(place[:, start : start + step] for place in places)
            parts.append(self._chosen(part, weights[:, start : start + step], keys, cut))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def _chosen(
        self, q: mx.array, weights: mx.array, keys: mx.array, places: tuple[mx.array, ...] | None
    ) -> mx.array:
        batch, length, heads, dim = q.shape
        scores = q.reshape(batch, length * heads, dim) @ keys.swapaxes(-1, -2)
        scores = mx.maximum(scores, 0).reshape(batch, length, heads, -1)
        scores = (weights @ scores.astype(mx.float32))[:, :, 0]
        if places is not None:
            place = mx.arange(keys.shape[1])
            scores = mx.where((place >= places[0]) & (place < places[1]), scores, -mx.inf)
        return mx.stop_gradient(mx.argpartition(-scores, kth=self.top_k - 1, axis=-1)[..., : self.top_k])


def picked(rows: mx.array, chosen: mx.array) -> mx.array:
    """Return [B, L, k, d], the chosen [B, L, k] of the rows [B, n, d]."""
    batch, total, _ = rows.shape
    return rows.flatten(0, 1)[chosen + mx.arange(batch)[:, None, None] * total]


@dataclass(frozen=True)
class Entries:
    """The compressed entries [B, n, d] of a layer, and in a batch the place of each row's first.

    `choose`, where each query takes only some: (first query, end, entries, places) -> [B, queries, top_k].
    """

    rows: mx.array
    starts: list[int] | None
    choose: Callable[[int, int, int, tuple[mx.array, mx.array] | None], mx.array] | None = None


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
        self.rope = RoPE(args, compressed=self.ratio > 0)
        if self.ratio:
            self.compressor = Compressor(args, self.ratio, self.head_dim)
        if self.ratio == SPARSE:
            self.indexer = Indexer(args, self.ratio)

    def make_cache(self) -> CacheList:
        return make_layer_cache(self.window, self.ratio, indexed=self.ratio == SPARSE)

    def __call__(self, x: mx.array, call: Call, cache: CacheList | None) -> mx.array:
        latent = self.q_norm(self.wq_a(x))
        q = mx.unflatten(self.wq_b(latent), -1, (self.heads, self.head_dim))
        q = mx.fast.rms_norm(q, None, self.norm_eps).swapaxes(1, 2)
        q = self.rope(q, call.offset)
        # Keys and values are the same vectors, one for all heads.
        rows = self.rope(self.kv_norm(self.wkv(x))[:, None], call.offset)
        if cache is not None:
            count_tokens(cache[TOKENS], call.nothing)
            rows = append_rows(cache[WINDOW], rows, call.nothing)
        out = self._attend(q, rows[:, 0], self._entries(x, latent, call, cache), call)
        # The values were turned by their positions; turned back by the query's, they stand relative to it.
        out = self.rope(out, call.offset, inverse=True)
        batch, _, length, _ = out.shape
        out = out.reshape(batch, self.groups, -1, length, self.head_dim).swapaxes(2, 3).flatten(3)
        out = self.wo_a(out)  # [B, G, L, O]
        return self.wo_b(out.swapaxes(1, 2).flatten(2))

    def _entries(self, x: mx.array, latent: mx.array, call: Call, cache: CacheList | None) -> Entries | None:
        """Return the compressed entries, and the choice among them where they are more than a query takes."""
        if not self.ratio:
            return None
        tails = ArraysCache(2) if cache is None else cache[TAILS]
        new = self.compressor(x, call, tails, 0)
        keys = self.indexer.compressor(x, call, tails, 1) if self.ratio == SPARSE else None
        starts = None
        if cache is not None:
            if tails.lengths is not None:
                tails.advance(x.shape[1])
            entries = cache[ENTRIES]
            if new is not None:
                append_entries(entries, new, new[..., :0] if keys is None else keys, call.span, self.ratio)
            if entries.keys is not None:
                new, keys = entries.keys_and_values()
            starts = entry_starts(entries)
        if new is None:
            return None
        rows = new[:, 0]
        most = max(call.span.visible(self.ratio, call.span.length - 1))
        if self.ratio != SPARSE or most <= self.indexer.top_k:
            return Entries(rows, starts)
        queries, weights = self.indexer.queries(x, latent, call)

        index_keys = cast(mx.array, keys)[:, 0]

        def choose(start: int, stop: int, count: int, places: tuple[mx.array, mx.array] | None) -> mx.array:
            return self.indexer.choose(
                queries[:, start:stop], weights[:, start:stop], index_keys[:, :count], places
            )

        return Entries(rows, starts, choose)

    def _attend(self, q: mx.array, rows: mx.array, entries: Entries | None, call: Call) -> mx.array:
        """Return [B, H, L, d] of the queries over the window's rows [B, K, d] and the entries."""
        length, ratio, span = call.span.length, self.ratio, call.span
        past = rows.shape[1] - length
        parts: list[mx.array] = []
        step = max(QUERY_BLOCK // q.shape[0], 1)
        for start in range(0, length, step):
            stop = min(start + step, length)
            low, high = max(past + start - self.window + 1, 0), past + stop
            block, near = q[:, :, start:stop], rows[:, low:high]
            if parts:
                # One after the other, or the temporary arrays of all would be in memory together.
                block = mx.depends(block, parts[-1])
            seen = [0] if entries is None else span.visible(ratio, stop - 1)
            if entries is None or not max(seen):
                parts.append(self._dot(block, near, call.near(start, stop, low, high)))
                continue
            starts = entries.starts
            count = max(seen) if starts is None else max(map(sum, zip(starts, seen, strict=True)))
            if entries.choose is None or max(seen) <= self.indexer.top_k:
                keys = mx.concatenate([near, entries.rows[:, :count]], axis=1)
                mask = call.mask(ratio, starts, start, stop, low, high, count)
                parts.append(self._dot(block, keys, mask))
                continue
            places = None
            if call.window is not None or not span.aligned or starts is not None:
                places = call.places(ratio, starts, start, stop)
            chosen = entries.choose(start, stop, count, places)
            window = call.near(start, stop, low, high)
            parts.append(self._sparse(block, near, entries.rows[:, :count], chosen, window, places))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _sparse(
        self,
        q: mx.array,
        near: mx.array,
        far: mx.array,
        chosen: mx.array,
        window: mx.array | None,
        places: tuple[mx.array, mx.array] | None,
    ) -> mx.array:
        """Return the attention of a block of queries over the window's rows and each one's chosen entries."""
        batch, length, taken = chosen.shape
        if places is None:
            keys = mx.concatenate([near, picked(far, chosen)[:, 0]], axis=1)
            return self._dot(q, keys, None)
        if window is None:
            window = mx.ones((1, 1, length, near.shape[1]), mx.bool_)
        window = mx.broadcast_to(window[:, 0], (batch, length, near.shape[1]))
        valid = (chosen >= places[0]) & (chosen < places[1])
        if length > 1 and far.shape[1] <= DENSE_FACTOR * taken:
            seen = mx.zeros((batch, length, far.shape[1]), mx.bool_)
            seen = mx.put_along_axis(seen, chosen, valid, axis=-1)
            keys = mx.concatenate([near, far], axis=1)
            return self._dot(q, keys, mx.concatenate([window, seen], axis=-1)[:, None])
        # Each query has keys of its own: it becomes a row of the batch. In a block, query j sees the
        # window's rows from `near.shape[1] - length + j` backwards.
        size = min(self.window, near.shape[1])
        last = mx.arange(near.shape[1] - length, near.shape[1])[:, None]
        index = mx.maximum(last - size + 1, 0) + mx.arange(size)
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

    def __call__(self, streams: mx.array, ids: mx.array, call: Call, cache: CacheList | None) -> mx.array:
        x, out, among = self.attn_hc(streams)
        streams = expand(self.attn(self.attn_norm(x), call, cache), streams, out, among)
        x, out, among = self.ffn_hc(streams)
        return expand(self.ffn(self.ffn_norm(x), ids), streams, out, among)


class DeepseekV4Model(PipelineMixin, nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = Norm(args.hidden_size, eps=args.rms_norm_eps)
        self.hc_head = HyperHead(args)

    def __call__(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return the last hidden states [B, L, D]; the cache is brought up to their end."""
        layers, rank = self.pipeline_layers, self.pipeline_rank
        if cache is None:
            cache = [None] * len(layers)
        for part in cache:
            if part is not None:
                adopt(part)
        span = Span.of(cache, *ids.shape)
        x = self.embed_tokens(ids)
        window = create_attention_mask(
            x,
            None if cache[0] is None else cache[0][WINDOW],
            window_size=self.args.sliding_window,
            return_array=True,
        )
        if window is not None and window.ndim == 2:
            window = window[None, None]
        call = Call(span, window)
        streams = mx.repeat(x[:, :, None], self.args.hc_mult, axis=2)
        # From the rank with the layers before these.
        if rank < self.pipeline_size - 1:
            streams = mx.distributed.recv_like(streams, rank + 1)
        for layer, part in zip(layers, cache, strict=True):
            streams = layer(streams, ids, call, part)
        # To the rank with the layers behind these; a prompt evaluates nothing but the cache.
        if rank != 0:
            streams = mx.distributed.send(streams, (rank - 1) % self.pipeline_size)
            if cache[-1] is not None:
                last = cache[-1][WINDOW]
                last.keys = mx.depends(last.keys, streams)
        x = self.hc_head(streams)
        if self.pipeline_size > 1:
            x = mx.distributed.all_gather(x)[: x.shape[0]]
        if cache[0] is not None:
            # What no output has read yet would be kept as a graph, which grows with each token.
            x = mx.depends(x, [array for part in cache for array in arrays(part)])
        return self.norm(x)


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
        logits = self.lm_head(self.model(inputs, cache))
        if cache is not None:
            refuse_quantization(cache[0])
        return logits

    @property
    def layers(self) -> list[Block]:
        return self.model.pipeline_layers

    def make_cache(self) -> list[CacheList]:
        """Return an empty cache for each layer."""
        # mlx-lm's make_prompt_cache has max_kv_size, and does not pass it on.
        caller = inspect.currentframe()
        caller = caller and caller.f_back
        if caller is not None and caller.f_locals.get("max_kv_size") is not None:
            warnings.warn(f"max_kv_size {NO_EFFECT}", stacklevel=3)
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
