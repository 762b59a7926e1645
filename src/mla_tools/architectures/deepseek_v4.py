"""DeepSeek V4 (Flash, Pro, their Base versions, 0731), in every layout that the hub has it in.

One table reads them all, because no two layouts give one name to different things: DeepSeek's own names;
those of transformers, with fused experts; and those of three conversions to MLX, of which
one (early mlx-community) has stacked experts and an output projection in pieces, one (exo) two fused
projections, and one (mlx-vlm) the names of the class that loads the output.

Sources: the header listings of V4-Flash and V4-Flash-0731, the renaming in transformers 5.23, what its
`save_pretrained` writes, and the names that the MLX conversions have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mla_tools.architectures import blocks
from mla_tools.architectures.deepseek_v4_attention import attention_parts
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import OPEN, Geometry, label
from mla_tools.architectures.rope import flat_rope, rope_type
from mla_tools.errors import Problem
from mla_tools.ops import CutRows, Indices, Op, Same, SplitRows, Stack
from mla_tools.rules import Domain, Drop, Param, Rule
from mla_tools.rules import name as template

__all__ = ["FAMILY", "Place", "attention", "collapse", "connections", "mixture"]

# What mlx-vlm's models write before the names of their language model.
_MLX_VLM = "language_model"

# Groups of 4 tokens overlap, and an indexer chooses among them; the class knows no other ratios.
_SPARSE = 4
_RATIOS = (0, _SPARSE, 128)

_LINEAR = Param(quantizable=True)
# What the official checkpoints leave in floats, and the class out of -q.
_DENSE = Param(quantizable=True, dense=True, cast=False)
_KEPT = Param(cast=False)

# Theirs for gate, down and up projection.
_MLP = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))


@dataclass(frozen=True)
class Place:
    """Where a part of the model stands: in DeepSeek's layout, in the class, and in other layouts."""

    theirs: str
    ours: str
    others: tuple[str, ...] = ()

    def spellings(self, names: Sequence[str]) -> list[str]:
        """Return every full name that a checkpoint may have, DeepSeek's own first."""
        return [_join(prefix, name) for prefix in (self.theirs, *self.others) for name in names]

    def one(
        self,
        names: Sequence[str],
        target: str,
        shape: blocks.Shape,
        where: blocks.Where,
        param: Param,
        op: Op | None = None,
    ) -> list[Rule]:
        """Return the rules that make one tensor of any of its spellings; the first name is DeepSeek's."""
        op = op or Same()
        ours = _join(self.ours, target)
        first, *rest = dict.fromkeys([*self.spellings(names), ours, _join(_MLX_VLM, ours)])
        rule = Rule((first,), (ours,), (shape,), op, where, param)
        # The table adds the rule that leaves a tensor where it is.
        rest = [text for text in rest if text != ours or not isinstance(op, Same)]
        return [rule, *(_respelled(rule, text) for text in rest)]

    def linear(
        self,
        names: Sequence[str],
        target: str,
        shape: blocks.Shape,
        where: blocks.Where,
        param: Param = _LINEAR,
        op: Op | None = None,
    ) -> list[Rule]:
        """Return the rules of the weight of a module."""
        return self.one([f"{name}.weight" for name in names], f"{target}.weight", shape, where, param, op)

    def instead(
        self,
        names: Sequence[str],
        targets: Sequence[str],
        shape: blocks.Shape,
        op: Op,
        where: blocks.Where,
        param: Param,
        because: str = "",
    ) -> list[Rule]:
        """Return the rules that make the same tensors out of others."""
        made = tuple(_join(self.ours, target) for target in targets)
        rule = Rule(("",), made, (shape,), op, where, param, because=because)
        return [_respelled(rule, text) for text in self.spellings(names) if (text,) != made]


def _respelled(rule: Rule, text: str) -> Rule:
    """Return the rule that makes the same out of another source."""
    used = {index for name in (text, *rule.target) for index in template(name).indices}
    where = {index: domain for index, domain in rule.where.items() if index in used}
    return replace(rule, source=(text,), where=where, alternative=True)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


_TOP = Place("", "model", ("model",))
_HEAD = Place("", "", ("model",))
_LAYER = Place("layers.{l}", "model.layers.{l}", ("model.layers.{l}",))
_DRAFT = Place("mtp.{l}", "mtp.{l}")


def attention(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of what every layer has of the attention, in each way of holding it."""
    hidden, heads, size = g.dim("hidden_size"), g.count("num_attention_heads"), g.dim("head_dim")
    rank, groups, inner = g.dim("q_lora_rank"), g.count("o_groups"), g.dim("o_lora_rank")
    wide = heads * size // groups
    blocks_of = {**where, "g": range(groups)}
    rules = []
    for part in attention_parts(g):
        target = f"attn.{part.theirs}"
        names = [target, f"self_attn.{part.hub}"]
        # What save_pretrained of transformers 5.23 writes.
        names += ["attn.norm.weight"] if part.theirs == "kv_norm.weight" else []
        rules += at.one(names, target, part.shape, where, _LINEAR if part.matrix else _KEPT, part.op)
    return [
        *rules,
        *at.instead(
            ("attn.wqkv_a.weight",),
            ("attn.wq_a.weight", "attn.wkv.weight"),
            (rank + size, hidden),
            CutRows((rank, size)),
            where,
            _LINEAR,
        ),
        *at.instead(
            ("attn.wo_a.{g}.weight",),
            ("attn.wo_a.weight",),
            (inner, wide),
            Stack(),
            blocks_of,
            _LINEAR,
            because=_equals(groups),
        ),
    ]


def compressor(
    g: Geometry, at: Place, where: blocks.Where, ratio: int, size: int, name: str, others: str
) -> list[Rule]:
    """Return the rules of what makes one entry of `size` numbers out of each group of tokens."""
    hidden = g.dim("hidden_size")
    width = size * 2 if ratio == _SPARSE else size
    return [
        *at.linear((f"{name}.wkv", f"{others}.kv_proj"), f"{name}.wkv", (width, hidden), where, _DENSE),
        *at.linear((f"{name}.wgate", f"{others}.gate_proj"), f"{name}.wgate", (width, hidden), where, _DENSE),
        *at.one((f"{name}.ape", f"{others}.position_bias"), f"{name}.ape", (ratio, width), where, _KEPT),
        *at.linear((f"{name}.norm", f"{others}.kv_norm"), f"{name}.norm", (size,), where, _KEPT),
        *at.instead(
            (f"{name}.wkv_gate.weight",),
            (f"{name}.wkv.weight", f"{name}.wgate.weight"),
            (width * 2, hidden),
            CutRows((width, width)),
            where,
            _DENSE,
        ),
    ]


def compression(g: Geometry, at: Place, ratios: Sequence[int]) -> list[Rule]:
    """Return the rules of the layers that compress, and of those that choose among the entries."""
    hidden, size, rank = g.dim("hidden_size"), g.dim("head_dim"), g.dim("q_lora_rank")
    rules = []
    for ratio in sorted(set(ratios) - {0}):
        where: blocks.Where = {"l": _layers(ratios, ratio)}
        rules += compressor(g, at, where, ratio, size, "attn.compressor", "self_attn.compressor")
    sparse: blocks.Where = {"l": _layers(ratios, _SPARSE)}
    if sparse["l"]:
        heads, width = g.count("index_n_heads"), g.dim("index_head_dim")
        name, others = "attn.indexer", "self_attn.compressor.indexer"
        weights = (f"{name}.weights_proj", f"{others}.scorer.weights_proj")
        rules += at.linear(
            (f"{name}.wq_b", f"{others}.q_b_proj"), f"{name}.wq_b", (heads * width, rank), sparse
        )
        rules += at.linear(weights, f"{name}.weights_proj", (heads, hidden), sparse, _DENSE)
        rules += compressor(g, at, sparse, _SPARSE, width, f"{name}.compressor", others)
    return rules


def mixture(g: Geometry, at: Place, where: blocks.Where, hashed: Domain) -> list[Rule]:
    """Return the rules of the experts; the `hashed` layers choose them by the token alone."""
    hidden, inner, count = g.dim("hidden_size"), g.dim("moe_intermediate_size"), g.count("n_routed_experts")
    shared = inner * g.count("n_shared_experts")
    vocab, chosen = g.dim("vocab_size"), g.count("num_experts_per_tok")
    scored: blocks.Where = {"l": frozenset(where["l"]) - frozenset(hashed)} if hashed else where
    rules = at.linear(("ffn.gate", "mlp.gate"), "ffn.gate", (count, hidden), where, Param())
    if hashed:
        table = ("ffn.gate.tid2eid", "mlp.gate.tid2eid")
        rules += at.one(table, table[0], (vocab, chosen), {"l": hashed}, Param(), Indices(count))
    bias = ("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "ffn.gate.e_score_correction_bias")
    rules += at.one(bias, bias[-1], (count,), scored, _KEPT)
    for theirs, ours in _MLP:
        shape = (hidden, shared) if ours == "down_proj" else (shared, hidden)
        names = (f"ffn.shared_experts.{theirs}", f"mlp.shared_experts.{ours}", f"ffn.shared_experts.{ours}")
        rules += at.linear(names, names[-1], shape, where)
        rules += expert(g, at, where, theirs, ours)
    pair = ("ffn.switch_mlp.gate_proj.weight", "ffn.switch_mlp.up_proj.weight")
    fused = (count, inner * 2, hidden)
    rules += at.instead(("mlp.experts.gate_up_proj",), pair, fused, SplitRows(), where, blocks.EXPERT)
    return rules


def expert(g: Geometry, at: Place, where: blocks.Where, theirs: str, ours: str) -> list[Rule]:
    """Return the rules of one projection of all experts: one by one, or stacked already."""
    hidden, inner, count = g.dim("hidden_size"), g.dim("moe_intermediate_size"), g.count("n_routed_experts")
    shape = (hidden, inner) if ours == "down_proj" else (inner, hidden)
    target = f"ffn.switch_mlp.{ours}.weight"
    because, each = _equals(count), {**where, "e": range(count)}
    single = [f"ffn.experts.{{e}}.{theirs}", f"mlp.experts.{{e}}.{ours}", f"ffn.experts.{{e}}.{ours}"]
    stack = at.instead(
        [f"{name}.weight" for name in single], (target,), shape, Stack(), each, blocks.EXPERT, because
    )
    whole = [f"ffn.experts.{theirs}.weight", f"ffn.experts.{ours}.weight", target]
    # transformers holds the down projections without a ".weight".
    whole += ["mlp.experts.down_proj"] if ours == "down_proj" else []
    stacked = at.instead(whole, (target,), (count, *shape), Same(), where, blocks.EXPERT)
    vlm = _respelled(stacked[0], _join(_MLX_VLM, _join(at.ours, target)))
    return [replace(stack[0], alternative=False), *stack[1:], *stacked, vlm]


def connections(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of the norms and of the hyper-connections around attention and experts."""
    hidden, streams = g.dim("hidden_size"), g.dim("hc_mult")
    mix = (streams + 2) * streams
    shapes: dict[str, blocks.Shape] = {"fn": (mix, streams * hidden), "base": (mix,), "scale": (3,)}
    rules = []
    for side, norm in (("attn", "input_layernorm"), ("ffn", "post_attention_layernorm")):
        rules += at.linear((f"{side}_norm", norm), f"{side}_norm", (hidden,), where, _KEPT)
        for part, shape in shapes.items():
            names = (f"hc_{side}_{part}", f"{side}_hc.{part}", f"hc_{side}.{part}")
            rules += at.one(names, names[1], shape, where, _KEPT)
    return rules


def collapse(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of what makes one stream of all before the last norm, and of that norm."""
    hidden, streams = g.dim("hidden_size"), g.dim("hc_mult")
    shapes: dict[str, blocks.Shape] = {
        "fn": (streams, streams * hidden),
        "base": (streams,),
        "scale": (1,),
    }
    rules = at.linear(("norm",), "norm", (hidden,), where, _KEPT)
    for part, shape in shapes.items():
        names = (f"hc_head_{part}", f"hc_head.hc_{part}", f"hc_head.{part}")
        rules += at.one(names, names[-1], shape, where, _KEPT)
    return rules


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    config = g.config = {**g.config, **hub_keys(g.config)}
    layers, hidden, vocab = g.layers(), g.dim("hidden_size"), g.dim("vocab_size")
    # No tensor has it, and the class does not do without.
    g.dim("qk_rope_head_dim")
    given = config.get("compress_ratios")
    ratios = given[: layers.stop] if isinstance(given, list) else []
    if len(ratios) < layers.stop or not all(type(ratio) is int and ratio in _RATIOS for ratio in ratios):
        needed = f"a list of {layers.stop} numbers or more, each of them 0, 4 or 128"
        g.problems.append(Problem("config.json", "compress_ratios cannot be used", needed, repr(given)[:80]))
        ratios = [0] * layers.stop
    hashed = range(min(layers.stop, g.count("num_hash_layers", least=0)))
    where: blocks.Where = {"l": layers}
    rules = [
        *_TOP.linear(("embed", "embed_tokens"), "embed_tokens", (vocab, hidden), {}),
        *_HEAD.linear(("head",), "lm_head", (vocab, hidden), {}),
        *collapse(g, _TOP, {}),
        *connections(g, _LAYER, where),
        *attention(g, _LAYER, where),
        *compression(g, _LAYER, ratios),
        *mixture(g, _LAYER, where, hashed),
    ]
    return rules, drafts(g)


def drafts(g: Geometry) -> list[Drop]:
    """Return the drops of the draft layers, which are blocks without compression, and what is around them."""
    hidden, layers = g.dim("hidden_size"), g.layers().stop
    anywhere: blocks.Where = {"l": range(OPEN)}
    inside = [
        *connections(g, _DRAFT, anywhere),
        *attention(g, _DRAFT, anywhere),
        *mixture(g, _DRAFT, anywhere, range(0)),
        *collapse(g, _DRAFT, anywhere),
        *_DRAFT.linear(("enorm",), "enorm", (hidden,), anywhere),
        *_DRAFT.linear(("hnorm",), "hnorm", (hidden,), anywhere),
        *_DRAFT.linear(("e_proj",), "e_proj", (hidden, hidden), anywhere),
        *_DRAFT.linear(("h_proj",), "h_proj", (hidden, hidden), anywhere),
    ]
    # Of the DSpark drafts in 0731, whose sizes config.json does not say.
    further = ("main_proj", "main_norm", "markov_head.markov_w1", "markov_head.markov_w2")
    more = (*further, "confidence_head.proj")
    reason = f"multi-token prediction (mtp), not part of the model's {layers} layers"
    marker = "mtp.{l}.attn.wkv.weight"
    known = [
        Drop(rule.source[0], reason, _only(rule), rule.shapes[0], marker)
        for rule in inside
        if not rule.alternative
    ]
    return known + [
        Drop(f"mtp.{{l}}.{name}.weight", reason, anywhere, marker=marker, usual=False) for name in more
    ]


def _only(rule: Rule) -> dict[str, Domain]:
    """Return the domains of the indices in a rule's source."""
    return {index: rule.where[index] for index in template(rule.source[0]).indices}


def _layers(ratios: Sequence[int], ratio: int) -> frozenset[int]:
    return frozenset(layer for layer, found in enumerate(ratios) if found == ratio)


def _equals(count: int) -> str:
    return f"{label(count).replace(' ', ' = ', 1)} in config.json"


# --- config.json ---------------------------------------------------------------------------------------


def hub_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that the class reads and that a config of transformers 5 says in its own words."""
    found: dict[str, Any] = {}
    types, rates = config.get("layer_types"), config.get("compress_rates")
    if config.get("compress_ratios") is None and isinstance(types, list):
        known = {
            "sliding_attention": 0,
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 128,
        }
        known |= rates if isinstance(rates, Mapping) else {}
        found["compress_ratios"] = [known.get(kind) if isinstance(kind, str) else kind for kind in types]
    mlps = config.get("mlp_layer_types")
    if config.get("num_hash_layers") is None and isinstance(mlps, list):
        found["num_hash_layers"] = mlps.count("hash_moe")
    part, size = config.get("partial_rotary_factor"), config.get("head_dim")
    if config.get("qk_rope_head_dim") is None and isinstance(part, float) and isinstance(size, int):
        # Not a number and infinity, which JSON readers let through, are no part.
        found["qk_rope_head_dim"] = int(part * size) if 0 < part <= 1 else None
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(rope.get("compress"), Mapping):
        return {**found, **flat_rope(config)}
    main, scaling = rope.get("main"), dict(rope["compress"])
    if isinstance(main, Mapping) and "rope_theta" in main:
        found["rope_theta"] = main["rope_theta"]
    if "rope_theta" in scaling:
        found["compress_rope_theta"] = scaling["rope_theta"]
    scaling = {k: v for k, v in scaling.items() if k not in ("rope_theta", "partial_rotary_factor")}
    found["rope_scaling"] = None if rope_type(scaling) == "default" else scaling
    return found


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Return what the class does not compute, or computes otherwise than transformers."""
    keys = {**config, **hub_keys(config)}
    scaling, mlps = keys.get("rope_scaling"), config.get("mlp_layer_types")
    scaling = scaling if isinstance(scaling, Mapping) else {}
    count = keys.get("num_hash_layers")
    scored = mlps[count:] if isinstance(mlps, list) and isinstance(count, int) else []
    found = {
        "scores other than sqrtsoftplus": keys.get("scoring_func", "sqrtsoftplus") != "sqrtsoftplus",
        "rope other than yarn": rope_type(scaling) not in ("default", "yarn"),
        "yarn that scales the attention": scaling.get("attention_factor", 1.0) != 1.0,
        "a tied output head": bool(keys.get("tie_word_embeddings")),
        "layers that hash tokens after others": "hash_moe" in scored,
    }
    return [
        Problem("config.json", "the class for DeepSeek V4 computes something else", "no such thing", what)
        for what, is_there in found.items()
        if is_there
    ]


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Say where the list of ratios goes on after the last layer."""
    ratios, layers = config.get("compress_ratios"), config.get("num_hidden_layers")
    if not isinstance(ratios, list) or not isinstance(layers, int) or len(ratios) <= layers:
        return []
    beyond = len(ratios) - layers
    return [
        f"compress_ratios in config.json has {len(ratios)} numbers for {layers} layers; the last {beyond}"
        f" {'are those' if beyond > 1 else 'is that'} of draft layers, and not read"
    ]


FAMILY = Family(
    "deepseek_v4",
    "deepseek_v4",
    build,
    # What the class needs and transformers has defaults for.
    defaults={"n_shared_experts": 1, "hc_mult": 4, "compress_rope_theta": 160000.0},
    architectures=("DeepseekV4ForCausalLM",),
    float32=("_fn", "_base", "_scale", "attn_sink", "gate.bias", ".ape"),
    rewrite=hub_keys,
    refuse=refuse,
    runtime="deepseek_v4",
    remarks=remarks,
)
