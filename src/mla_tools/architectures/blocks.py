"""The pieces that the families share: MLA attention, experts, norms, embeddings, MTP layers.

Names and shapes are those of the checkpoints on the hub (left) and of mlx-lm's classes (right).
Axis letters: l layer, e expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mla_tools.architectures.geometry import OPEN, Geometry, label
from mla_tools.errors import Problem
from mla_tools.ops import SplitKvB, SplitRows, Stack
from mla_tools.quantization import QuantSpec
from mla_tools.rules import Domain, Drop, Param, Rule
from mla_tools.rules import name as template

__all__ = [
    "FOR_MLX_VLM",
    "NOT_FOR_MLX_VLM",
    "Family",
    "decoder_norms",
    "embeddings",
    "experts",
    "flat_rope",
    "fused_experts",
    "left_dense",
    "left_out",
    "linear",
    "mla_attention",
    "mlp",
    "mtp_layers",
    "nested_rope",
    "norm",
    "param",
    "refusal",
    "rope_parameters",
    "rope_type",
    "rotary_buffers",
    "router",
    "tied_embeddings",
    "under",
    "wrapped",
]

Where = Mapping[str, Domain]
Shape = tuple[int, ...]

# The experts of every class of mlx-lm are SwitchLinear, in a SwitchGLU.
EXPERT = Param(quantizable=True, global_scale=True)

# The routers that mlx-lm's classes quantize at a width of their own, whatever the rest gets.
ROUTER_SPEC = QuantSpec("affine", 8, 64)


Config = Mapping[str, Any]

# What an output with its tensors for images is for. Source: loading both with mlx-vlm 0.7.10.
FOR_MLX_VLM = "mlx-vlm loads all of it; mlx_lm.load leaves them out and loads the language model"
NOT_FOR_MLX_VLM = (
    "mlx_lm.load leaves them out and loads the language model; mlx-vlm 0.7.10 does not load it, as its class"
    " wants kv_b_proj in one piece"
)

# Makes the rules and drops of a family for one config.
Builder = Callable[[Geometry], tuple[list[Rule], list[Drop]]]


@dataclass(frozen=True)
class Family:
    """One architecture: its table, and what its config must say.

    `model_type` names mlx-lm's class. `defaults` are keys that this class needs and that checkpoints
    leave out, with the value that the reference implementation uses then. `architectures` recognise a
    config without a model_type. `float32` are the endings of the tensors that the hub's checkpoints store
    in F32.

    `section` is the key of config.json under which the language model's numbers stand in a multimodal
    config, and `inside` are the model_types that may stand there, none for any; with `flat` the numbers
    may also stand at the top, as mlx-lm's class reads them without the section. `build`, `defaults`,
    `rewrite` and `refuse` all see that section. `rewrite` returns the keys that the
    output's config must have instead, because mlx-lm's class reads them differently; without it,
    rope_parameters become rope_theta and rope_scaling. `refuse` returns what makes that class compute
    something else than the reference implementation, whatever the weights. `images` says what an output
    is for in which the tensors for images were kept. `runtime` is the module of `mla_tools.models` whose
    class loads the output where mlx-lm has none: a file that imports it is put beside the weights.
    `remarks` returns what a plan should say about a config that the tensors do not bear out.
    """

    name: str
    model_type: str
    build: Builder
    defaults: Mapping[str, Any] | None = None
    architectures: tuple[str, ...] = ()
    float32: tuple[str, ...] = ("e_score_correction_bias", "inv_freq")
    section: str | None = None
    inside: tuple[str, ...] = ()
    flat: bool = False
    rewrite: Callable[[Config], Config] | None = None
    refuse: Callable[[Config], list[Problem]] | None = None
    images: str = ""
    runtime: str = ""
    remarks: Callable[[Config], list[str]] | None = None

    def place(self, config: Config) -> str | None:
        """Return the key under which the numbers stand in a config, None where they stand at the top."""
        return None if self.flat and self.section not in config else self.section

    def numbers(self, config: Config) -> dict[str, Any]:
        """Return the part of a config that the table is made from, with the defaults filled in.

        A null is no value where there is a default.
        """
        place = self.place(config)
        part = config.get(place) if place else config
        defaults = self.defaults or {}
        given = part.items() if isinstance(part, Mapping) else ()
        return {**defaults, **{k: v for k, v in given if v is not None or k not in defaults}}

    def rewritten(self, config: Config) -> dict[str, Any]:
        """Return the config that mlx-lm's class needs; neither the dtype nor the quantization is touched."""
        numbers = self.numbers(config)
        numbers |= (self.rewrite or flat_rope)(numbers)
        place = self.place(config)
        whole = {**config, place: numbers} if place else numbers
        own = {"model_file": self.model_file} if self.runtime else {}
        return {**whole, **own, "model_type": self.model_type}

    @property
    def model_file(self) -> str:
        """The name of the file that brings the class into mlx-lm."""
        return f"{self.runtime}.py"

    def added(self) -> dict[str, str]:
        """Return the files that an output needs beside its weights, by name with their text."""
        if not self.runtime:
            return {}
        module = f"mla_tools.models.{self.runtime}"
        return {
            self.model_file: f'"""The class of this model is part of mla-tools."""\n'
            f"from {module} import Model, ModelArgs, ModelConfig  # noqa: F401\n"
        }

    def refusals(self, config: Config) -> list[Problem]:
        """Return what no conversion can make right in mlx-lm's class."""
        return self.refuse(self.numbers(config)) if self.refuse else []

    def remarked(self, config: Config) -> list[str]:
        """Return what is worth saying about a config."""
        return self.remarks(self.numbers(config)) if self.remarks else []


def wrapped(
    inner: Family,
    model_type: str,
    *,
    inside: tuple[str, ...] = (),
    flat: bool = False,
    dropped: Mapping[str, str],
    architectures: tuple[str, ...] = (),
    spellings: tuple[tuple[str, str], ...] = (),
    images: str = FOR_MLX_VLM,
) -> Family:
    """Return the family of a multimodal config whose text_config is one of `inner`.

    The tensors are those of `inner` with "language_model." before their names. `dropped` are the other
    modules of the checkpoint, with the reason. `spellings` are further ways in which checkpoints write
    "language_model.model." before what is in the decoder, and "language_model." before the rest.
    """
    prefix = "language_model"

    def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
        inside_rules, inside_drops = inner.build(g)
        rules, drops = under(prefix, inside_rules, inside_drops)
        for model, rest in spellings:
            rules += [
                replace(
                    rule,
                    source=tuple(
                        model + text.removeprefix("model.") if text.startswith("model.") else rest + text
                        for text in plain.source
                    ),
                    alternative=True,
                )
                for plain, rule in zip(inside_rules, rules, strict=False)
            ]
            # The other modules stand beside "language_model", wherever that stands.
            drops += left_out(dropped, model.removesuffix(f"{prefix}."), usual=False)
        return rules, drops + left_out(dropped)

    return replace(
        inner,
        name=model_type,
        model_type=model_type,
        build=build,
        architectures=architectures,
        section="text_config",
        inside=inside,
        flat=flat,
        images=images,
    )


def left_out(modules: Mapping[str, str], place: str = "", *, usual: bool = True) -> list[Drop]:
    """Return the drops of the modules for images, by name with the reason, wherever they stand.

    The names are also those of mlx-vlm's classes.
    """
    return [
        Drop(place + name, reason, usual=usual, inside=("patch_embed.weight",), image=name)
        for name, reason in modules.items()
    ]


def refusal(what: str, *, needed: str = "", found: str = "", cause: str = "") -> Problem:
    """Return the problem of a config that mlx-lm's class would compute wrongly."""
    return Problem("config.json", f"mlx-lm's class computes something else: {what}", needed, found, cause)


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return rope_theta and rope_scaling in one, however a config spells them.

    As transformers 5 reads both spellings: rope_scaling goes before rope_parameters, and a rope_theta
    in either before the one beside them.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters")
    found = dict(given) if isinstance(given, Mapping) else {}
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def rope_type(rope: Config) -> object:
    """Return the kind of rope, which has an old and a new name."""
    return rope.get("rope_type", rope.get("type", "default"))


def nested_rope(config: Config) -> dict[str, Any]:
    """Return the rewritten keys for a class of mlx-lm that reads rope_parameters alone."""
    return {"rope_parameters": rope_parameters(config)}


def flat_rope(config: Config) -> dict[str, Any]:
    """Return the rewritten keys for a class of mlx-lm that reads rope_theta and rope_scaling alone."""
    if config.get("rope_parameters") is None:
        return {}
    found = rope_parameters(config)
    theta = found.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope_type(found) == "default" else found}


def linear(
    name: str, shape: Shape, where: Where, target: str | None = None, *, bias: bool = False
) -> list[Rule]:
    """Return the rules of a linear layer or an embedding: a quantizable weight, maybe a bias."""
    weight = _rule(name, shape, where, target, Param(quantizable=True))
    if not bias:
        return [weight]
    # The bias is as long as the first axis of the weight.
    moved = Rule((f"{name}.bias",), (f"{target or name}.bias",), (shape[:1],), where=where)
    return [weight, moved]


def norm(name: str, size: int, where: Where) -> Rule:
    """Return the rule of a normalisation layer's gain."""
    return _rule(name, (size,), where, None, Param())


def param(name: str, shape: Shape, where: Where, target: str | None = None, *, cast: bool = True) -> Rule:
    """Return the rule of a bare parameter, which has no ".weight" in its name."""
    return Rule((name,), (target or name,), (shape,), where=where, param=Param(cast=cast))


def _rule(name: str, shape: Shape, where: Where, target: str | None, what: Param) -> Rule:
    return Rule((f"{name}.weight",), (f"{target or name}.weight",), (shape,), where=where, param=what)


def left_dense(rules: Iterable[Rule], *endings: str, raw: bool = False) -> list[Rule]:
    """Return the rules, those whose targets end so marked as what the class does not quantize."""
    marked = tuple(f"{ending}.weight" for ending in endings)
    return [
        replace(rule, param=replace(rule.param, dense=True, raw=raw))
        if rule.target[0].endswith(marked)
        else rule
        for rule in rules
    ]


def under(prefix: str, rules: Iterable[Rule], drops: Iterable[Drop]) -> tuple[list[Rule], list[Drop]]:
    """Return a table for a model that stands under `prefix` in the checkpoint and in mlx-lm's class."""

    def inside(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{prefix}.{text}" for text in texts)

    moved = [replace(rule, source=inside(rule.source), target=inside(rule.target)) for rule in rules]
    dropped = [
        replace(drop, source=f"{prefix}.{drop.source}", marker=drop.marker and f"{prefix}.{drop.marker}")
        for drop in drops
    ]
    return moved, dropped


def embeddings(g: Geometry, *, words: str = "model.embed_tokens") -> list[Rule]:
    """Return the rules of the token embedding, the final norm and the output head."""
    vocab, hidden = g.dim("vocab_size"), g.dim("hidden_size")
    return [
        *linear("model.embed_tokens", (vocab, hidden), {}, words),
        norm("model.norm", hidden, {}),
        *linear("lm_head", (vocab, hidden), {}),
    ]


def tied_embeddings(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    """Return the rules of the embeddings of a class that has no output head of its own where it is tied."""
    rules = embeddings(g)
    if not g.flag("tie_word_embeddings"):
        return rules, []
    shape = (g.dim("vocab_size"), g.dim("hidden_size"))
    drop = Drop("lm_head.weight", "tied to the embedding (tie_word_embeddings)", {}, shape, usual=False)
    return [rule for rule in rules if rule.source != ("lm_head.weight",)], [drop]


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
            Rule(
                (f"{prefix}.kv_b_proj.weight",),
                (f"{prefix}.embed_q.weight", f"{prefix}.unembed_out.weight"),
                (fused,),
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
        Rule(
            (f"{prefix}.{{e}}.{name}.weight",),
            (f"{target}.{theirs}.weight",),
            (shape,),
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
    halves = (f"{target}.gate_proj.weight", f"{target}.up_proj.weight")
    return [
        Rule((f"{prefix}.gate_up_proj",), halves, ((count, inner * 2, hidden),), SplitRows(), where, EXPERT),
        Rule(
            (f"{prefix}.down_proj",),
            (f"{target}.down_proj.weight",),
            ((count, hidden, inner),),
            where=where,
            param=EXPERT,
        ),
        *(replace(rule, alternative=True) for rule in experts(prefix, target, count, hidden, inner, where)),
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
    shapes |= {text: shape for rule in layer for text, shape in zip(rule.source, rule.shapes, strict=True)}
    indices = {name: domain for rule in layer for name, domain in rule.where.items()}
    return [
        Drop(
            text,
            reason,
            {index: where.get(index, indices.get(index, range(0))) for index in template(text).indices},
            shape,
            marker=f"{prefix}.eh_proj.weight",
        )
        for text, shape in shapes.items()
    ]


def rotary_buffers(g: Geometry, *, usual: bool) -> list[Drop]:
    """Return the drop of stored rotary frequencies, which every class computes itself."""
    shape = (g.dim("qk_rope_head_dim") // 2,)
    text = "model.layers.{l}.self_attn.rotary_emb.inv_freq"
    return [Drop(text, "rotary buffer, computed from rope_theta", {"l": g.layers()}, shape, usual=usual)]
