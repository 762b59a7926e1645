"""The pieces that the families share: MLA attention, experts, norms, embeddings, MTP layers.

Names and shapes are those of the checkpoints on the hub (left) and of mlx-lm's model classes (right).
Axis letters: l layer, e expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mla_tools.architectures.geometry import OPEN, Geometry, label
from mla_tools.names import Domain, template
from mla_tools.ops import Split, SplitKvB, Stack
from mla_tools.quantization import QuantSpec
from mla_tools.rules import HUB, Drop, Form, Param, Rule

__all__ = [
    "also_called",
    "decoder_norms",
    "embeddings",
    "experts",
    "fused_experts",
    "left_unquantized",
    "linear",
    "mla_attention",
    "mlp",
    "mtp_layers",
    "norm",
    "param",
    "renamed",
    "rotary_buffers",
    "router",
    "tied_embeddings",
]

Where = Mapping[str, Domain]
Shape = tuple[int, ...]

# The experts of every class of mlx-lm are SwitchLinear, in a SwitchGLU.
EXPERT = Param(quantizable=True, global_scale=True)

# The routers that mlx-lm's model classes quantize at a width of their own, whatever the rest gets.
ROUTER_SPEC = QuantSpec("affine", 8, 64)


def linear(
    name: str, shape: Shape, where: Where, target: str | None = None, *, bias: bool = False
) -> list[Rule]:
    """Return the rules of a linear layer or an embedding: a quantizable weight, maybe a bias."""
    weight = _rule(name, shape, where, target, Param(quantizable=True))
    if not bias:
        return [weight]
    # The bias is as long as the first axis of the weight.
    moved = Rule.of(f"{name}.bias", f"{target or name}.bias", shape[:1], where=where)
    return [weight, moved]


def norm(name: str, size: int, where: Where) -> Rule:
    """Return the rule of a normalisation layer's gain."""
    return _rule(name, (size,), where, None, Param())


def param(name: str, shape: Shape, where: Where, target: str | None = None, *, cast: bool = True) -> Rule:
    """Return the rule of a bare parameter, which has no ".weight" in its name."""
    return Rule.of(name, target or name, shape, where=where, param=Param(cast=cast))


def _rule(name: str, shape: Shape, where: Where, target: str | None, what: Param) -> Rule:
    return Rule.of(f"{name}.weight", f"{target or name}.weight", shape, where=where, param=what)


def left_unquantized(rules: Iterable[Rule], *endings: str, raw: bool = False) -> list[Rule]:
    """Return the rules; those whose targets end so are marked as unquantized in the class."""
    marked = tuple(f"{ending}.weight" for ending in endings)
    return [
        replace(rule, param=replace(rule.param, unquantized=True, raw=raw))
        if rule.target[0].endswith(marked)
        else rule
        for rule in rules
    ]


def renamed(
    table: tuple[Iterable[Rule], Iterable[Drop]],
    *,
    hub: Mapping[str, str] | None = None,
    model: Mapping[str, str] | None = None,
) -> tuple[list[Rule], list[Drop]]:
    """Return a table in which modules are called differently: in the checkpoints, in the model's class.

    Keys and values are one or more whole components of names: {"o_proj": "out_proj"},
    {"mlp.gate": "moe.router"}. Every form of a rule gets the hub's new names, and so does every drop.
    """
    rules, drops = table
    theirs = [
        replace(
            rule,
            target=_renamed(rule.target, model or {}),
            forms=tuple(replace(form, source=_renamed(form.source, hub or {})) for form in rule.forms),
        )
        for rule in rules
    ]
    return theirs, [_renamed_drop(drop, hub or {}) for drop in drops]


def also_called(rules: Iterable[Rule], layout: str, names: Mapping[str, str]) -> list[Rule]:
    """Return the rules with a further form each where a layout calls their modules differently.

    `names` are the hub's components of names with those of the layout, as in `renamed`.
    """
    made = []
    for rule in rules:
        hub = rule.forms[0]
        source = _renamed(hub.source, names)
        other = replace(hub, layout=layout, source=source)
        made.append(rule if source == hub.source else rule.also(other))
    return made


def _renamed_drop(drop: Drop, names: Mapping[str, str]) -> Drop:
    (source,) = _renamed((drop.source,), names)
    return replace(drop, source=source, marker=drop.marker and _renamed((drop.marker,), names)[0])


def _renamed(texts: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, ...]:
    """Return templates in which whole components have other names, each replaced once."""
    if not names:
        return texts
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    known = re.compile(rf"(?<![^.])({longest_first})(?![^.])")
    return tuple(known.sub(lambda found: names[found[0]], text) for text in texts)


def embeddings(g: Geometry, words: str = "model.embed_tokens", ours: str | None = None) -> list[Rule]:
    """Return the rules of the token embedding (`ours` in the class), the final norm and the output head."""
    vocab, hidden = g.dim("vocab_size"), g.dim("hidden_size")
    return [
        *linear(words, (vocab, hidden), {}, ours),
        norm("model.norm", hidden, {}),
        *linear("lm_head", (vocab, hidden), {}),
    ]


def tied_embeddings(g: Geometry, words: str = "model.embed_tokens") -> tuple[list[Rule], list[Drop]]:
    """Return the rules of the embeddings of a class that has no output head of its own where it is tied."""
    rules = embeddings(g, words)
    if not g.flag("tie_word_embeddings"):
        return rules, []
    shape = (g.dim("vocab_size"), g.dim("hidden_size"))
    drop = Drop("lm_head.weight", "tied to the embedding (tie_word_embeddings)", {}, shape, usual=False)
    return [rule for rule in rules if rule.target != ("lm_head.weight",)], [drop]


def decoder_norms(g: Geometry, where: Where, suffix: str = "") -> list[Rule]:
    """Return the rules of the two norms of a decoder layer."""
    hidden = g.dim("hidden_size")
    return [
        norm(f"model.layers.{{l}}.{name}{suffix}", hidden, where)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]


def mla_attention(
    g: Geometry,
    where: Where,
    prefix: str = "model.layers.{l}.self_attn",
    *,
    split: bool = True,
    output: str = "o_proj",
    value: int | None = None,
) -> list[Rule]:
    """Return the rules of multi-head latent attention.

    `split`: whether the class wants kv_b_proj as embed_q [h, r, n] and unembed_out [h, v, r]. `output`:
    what the checkpoint calls the last projection. `value` is v where the config has no v_head_dim.
    Source of the shapes: the reference modelling code; with `q_lora_rank` null there is one q_proj.
    """
    hidden, heads = g.dim("hidden_size"), g.count("num_attention_heads")
    nope, rope = g.dim("qk_nope_head_dim"), g.dim("qk_rope_head_dim")
    value = value or g.dim("v_head_dim")
    rank, query_rank = g.dim("kv_lora_rank"), g.optional("q_lora_rank")
    bias = g.flag("attention_bias")
    rules = []
    if query_rank is None:
        rules += linear(f"{prefix}.q_proj", (heads * (nope + rope), hidden), where)
    else:
        rules += linear(f"{prefix}.q_a_proj", (query_rank, hidden), where, bias=bias)
        rules.append(norm(f"{prefix}.q_a_layernorm", query_rank, where))
        rules += linear(f"{prefix}.q_b_proj", (heads * (nope + rope), query_rank), where)
    rules += linear(f"{prefix}.kv_a_proj_with_mqa", (rank + rope, hidden), where, bias=bias)
    rules.append(norm(f"{prefix}.kv_a_layernorm", rank, where))
    fused = (heads * (nope + value), rank)
    if split:
        rules.append(
            Rule.of(
                f"{prefix}.kv_b_proj.weight",
                (f"{prefix}.embed_q.weight", f"{prefix}.unembed_out.weight"),
                fused,
                SplitKvB(nope, value),
                where,
                Param(quantizable=True),
            )
        )
    else:
        rules += linear(f"{prefix}.kv_b_proj", fused, where)
    rules += linear(f"{prefix}.{output}", (hidden, heads * value), where, bias=bias)
    return rules


def mlp(prefix: str, hidden: int, inner: int, where: Where, target: str | None = None) -> list[Rule]:
    """Return the rules of a gated MLP."""
    target = target or prefix
    return [
        *linear(f"{prefix}.gate_proj", (inner, hidden), where, f"{target}.gate_proj"),
        *linear(f"{prefix}.up_proj", (inner, hidden), where, f"{target}.up_proj"),
        *linear(f"{prefix}.down_proj", (hidden, inner), where, f"{target}.down_proj"),
    ]


def experts(
    prefix: str,
    target: str,
    count: int,
    hidden: int,
    inner: int,
    where: Where,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Rule]:
    """Return the rules that stack the experts of a layer; `names` are the checkpoint's for gate, up, down."""
    where = {**where, "e": range(count)}
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    because = f"{label(count).replace(' ', ' = ', 1)} in config.json"
    return [
        Rule.of(
            f"{prefix}.{{e}}.{name}.weight",
            f"{target}.{theirs}.weight",
            shape,
            Stack(),
            where,
            EXPERT,
            because=because,
        )
        for name, theirs, shape in zip(names, ("gate_proj", "up_proj", "down_proj"), shapes, strict=True)
    ]


def fused_experts(prefix: str, target: str, count: int, hidden: int, inner: int, where: Where) -> list[Rule]:
    """Return the rules of experts that are stored as gate_up_proj [e, 2*i, h] and down_proj [e, h, i].

    As transformers 5 holds them: gate before up, and no ".weight" in the names. Checkpoints that have
    been quantized elsewhere store them one by one, which is understood as well.
    """
    gate, up, down = experts(prefix, target, count, hidden, inner, where)
    single = [rule.forms[0] for rule in (gate, up)]
    pair = Form(
        "unfused",
        tuple(form.source[0] for form in single),
        tuple(form.shapes[0] for form in single),
        Stack(),
        single[0].where,
        each=True,
        because=single[0].because,
    )
    fused = Form(
        HUB, (f"{prefix}.gate_up_proj",), ((count, inner * 2, hidden),), Split((inner, inner), axis=-2)
    )
    whole = Rule.of(f"{prefix}.down_proj", down.target, (count, hidden, inner), where=where, param=EXPERT)
    return [
        Rule((*gate.target, *up.target), (fused, pair), where, EXPERT),
        whole.also(replace(down.forms[0], layout="unfused")),
    ]


def router(prefix: str, count: int, hidden: int, where: Where, *, correction: bool = True) -> list[Rule]:
    """Return the rules of a router that mlx-lm keeps as a bare float parameter."""
    rules = [_rule(prefix, (count, hidden), where, None, Param())]
    if correction:
        rules.append(param(f"{prefix}.e_score_correction_bias", (count,), where, cast=False))
    return rules


def mtp_layers(
    g: Geometry,
    layer: Iterable[Rule],
    *,
    key: str = "num_hidden_layers",
    norms: Sequence[str] = ("enorm", "hnorm", "shared_head.norm"),
    tables: Sequence[str] = ("shared_head.head", "embed_tokens"),
) -> list[Drop]:
    """Return the drops of the multi-token-prediction layers, which lie beyond the last decoder layer.

    `layer` are the rules of one decoder layer, in `{l}`; an MTP layer has all of these, an eh_proj, and
    `norms` and `tables` (of the vocabulary) of its own.
    """
    count = g.layers(key).stop
    hidden, vocab = g.dim("hidden_size"), g.dim("vocab_size")
    where = {"l": range(count, OPEN)}
    reason = f"multi-token prediction, not part of the model's {count} layers ({key} in config.json)"
    prefix = "model.layers.{l}"
    own: dict[str, Shape] = {
        "eh_proj": (hidden, hidden * 2),
        **dict.fromkeys(norms, (hidden,)),
        **dict.fromkeys(tables, (vocab, hidden)),
    }
    shapes: dict[str, Shape] = {f"{prefix}.{name}.weight": shape for name, shape in own.items()}
    routes = [route for rule in layer for route in rule.hub_routes()]
    for route in routes:
        shapes |= zip(route.source, route.shapes, strict=True)
    indices = {name: domain for route in routes for name, domain in route.where.items()}
    marker = f"{prefix}.eh_proj.weight"
    return [
        *(
            Drop(
                text,
                reason,
                {index: where.get(index, indices.get(index, range(0))) for index in template(text).indices},
                shape,
                marker=marker,
            )
            for text, shape in shapes.items()
        ),
        # Whatever else a layer has that is one.
        Drop(prefix, reason, where, marker=marker, usual=False, whole=True),
    ]


def rotary_buffers(g: Geometry, *, usual: bool) -> list[Drop]:
    """Return the drop of stored rotary frequencies, which every class computes itself."""
    shape = (g.dim("qk_rope_head_dim") // 2,)
    text = "model.layers.{l}.self_attn.rotary_emb.inv_freq"
    return [Drop(text, "rotary buffer, computed from rope_theta", {"l": g.layers()}, shape, usual=usual)]
