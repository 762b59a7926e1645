"""DeepSeek V4 (Flash, Pro, their Base versions, 0731), in every layout that the hub has it in.

One table reads them all, because no two layouts give one name to different things: DeepSeek's own names;
those of transformers, with fused experts; and those of three conversions to MLX, of which
one (early mlx-community) has stacked experts and an output projection in pieces, one (exo) two fused
projections, and one (mlx-vlm) the names of the class that loads the output.

Sources: the header listings of V4-Flash and V4-Flash-0731, the renaming in transformers 5.23, what its
`save_pretrained` writes, and the names that the MLX conversions have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_tools.architectures import blocks
from mla_tools.architectures.deepseek_v4_attention import attention_parts
from mla_tools.architectures.deepseek_v4_config import hub_keys, refuse, remarks, spelling
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import OPEN, Geometry, label
from mla_tools.errors import Problem
from mla_tools.names import Domain
from mla_tools.ops import Indices, Op, Same, Split, Stack
from mla_tools.rules import HUB, Drop, Form, Param, Rule

__all__ = ["FAMILY", "Place", "attention", "collapse", "connections", "mixture"]

# Groups of 4 tokens overlap, and an indexer chooses among them; the class knows no other ratios.
_SPARSE = 4
_RATIOS = (0, _SPARSE, 128)

_LINEAR = Param(quantizable=True)
# Unquantized in the official checkpoints, and exempt from -q in the class.
_UNQUANTIZED = Param(quantizable=True, unquantized=True, cast=False)
_KEPT = Param(cast=False)

# Theirs for gate, down and up projection.
_MLP = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))


# The layouts of others: transformers' save_pretrained, early conversions to MLX (with stacked experts, and
# wo_a in pieces), one with fused projections, and mlx-vlm's class.
_TRANSFORMERS, _STACKED, _FUSED, _VLM = "transformers", "mlx-community", "exo", "mlx-vlm"

_SAME = Same()

# Names without their place: DeepSeek's own, transformers', and then those of early conversions.
Names = Sequence[str]


@dataclass(frozen=True)
class Place:
    """Where a part of the model stands: in DeepSeek's layout, in the class, and in other layouts."""

    theirs: str
    ours: str
    others: tuple[str, ...] = ()

    def forms(
        self,
        names: Sequence[Names],
        shapes: tuple[blocks.Shape, ...],
        op: Op,
        where: blocks.Where | None = None,
        layouts: tuple[str, ...] = (HUB, _TRANSFORMERS, _STACKED),
        because: str = "",
    ) -> list[Form]:
        """Return a form for each way to write these names, DeepSeek's own first; several are separate forms.

        `layouts` are those of the names, the last for all further ones.
        """
        found = []
        for number, prefix in enumerate((self.theirs, *self.others)):
            for kind, texts in enumerate(zip(*names, strict=True)):
                layout = layouts[min(kind, len(layouts) - 1)]
                layout = _STACKED if number and layout == HUB else layout
                source = tuple(_join(prefix, text) for text in texts)
                found.append(Form(layout, source, shapes, op, where or {}, len(names) > 1, because))
        return found

    def rule(
        self,
        names: Sequence[Names],
        targets: Sequence[str],
        shapes: tuple[blocks.Shape, ...],
        where: blocks.Where,
        param: Param,
        op: Op = _SAME,
        more: Sequence[Form] = (),
    ) -> Rule:
        """Return the rule that makes the targets of any of their names, or in any of the `more` forms."""
        ours = tuple(_join(self.ours, target) for target in targets)
        again = Form(_STACKED, ours, shapes, op, each=len(targets) > 1)
        forms = [*self.forms(names, shapes, op), again, _vlm(ours, shapes, op), *more]
        # Two ways to write a name can be one; the first counts.
        unlike: dict[tuple[str, ...], Form] = {}
        for form in forms:
            unlike.setdefault(form.source, form)
        head, *rest = unlike.values()
        # The table adds the form that leaves the targets where they are.
        rest = [form for form in rest if form.source != ours or form.op != _SAME]
        return Rule(ours, (head, *rest), where, param)

    def one(
        self,
        names: Names,
        target: str,
        shape: blocks.Shape,
        where: blocks.Where,
        param: Param,
        op: Op = _SAME,
        more: Sequence[Form] = (),
    ) -> Rule:
        """Return the rule of one tensor."""
        return self.rule([names], [target], (shape,), where, param, op, more)

    def linear(
        self,
        names: Names,
        target: str,
        shape: blocks.Shape,
        where: blocks.Where,
        param: Param = _LINEAR,
        op: Op = _SAME,
    ) -> Rule:
        """Return the rule of the weight of a module."""
        return self.one([f"{name}.weight" for name in names], f"{target}.weight", shape, where, param, op)

    def fused(
        self, name: str, shapes: tuple[blocks.Shape, ...], op: Op, layout: str = _FUSED, **more: str
    ) -> list[Form]:
        """Return the forms that hold several targets as one tensor of this name."""
        return self.forms([[name]], shapes, op, None, (layout,), **more)


def _vlm(ours: Sequence[str], shapes: tuple[blocks.Shape, ...], op: Op) -> Form:
    """Return the form that has the class's names under those of mlx-vlm's language model."""
    return Form(_VLM, tuple(_join("language_model", name) for name in ours), shapes, op, each=len(ours) > 1)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


_TOP = Place("", "model", ("model",))
_HEAD = Place("", "", ("model",))
_LAYER = Place("layers.{l}", "model.layers.{l}", ("model.layers.{l}",))
_MTP = Place("mtp.{l}", "mtp.{l}")


def attention(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of what every layer has of the attention, in each way of holding it."""
    parts = {part.theirs: part for part in attention_parts(g)}
    names = {name: [f"attn.{name}", f"self_attn.{part.hub}"] for name, part in parts.items()}
    # What save_pretrained of transformers 5.23 writes.
    names["kv_norm.weight"].append("attn.norm.weight")
    groups, inner = g.count("o_groups"), g.dim("o_lora_rank")
    pieces = at.forms(
        [["attn.wo_a.{g}.weight"]],
        ((inner, parts["wo_a.weight"].shape[1]),),
        Stack(),
        {"g": range(groups)},
        (_STACKED,),
        _equals(groups),
    )
    queries, latent = parts.pop("wq_a.weight"), parts.pop("wkv.weight")
    pair = (queries.theirs, latent.theirs)
    lengths = (queries.shape[0], latent.shape[0])
    both = at.fused("attn.wqkv_a.weight", ((sum(lengths), queries.shape[1]),), Split(lengths))
    return [
        at.rule(
            [names[name] for name in pair],
            [f"attn.{name}" for name in pair],
            (queries.shape, latent.shape),
            where,
            _LINEAR,
            more=both,
        ),
        *(
            at.one(
                names[name],
                f"attn.{name}",
                part.shape,
                where,
                _LINEAR if part.matrix else _KEPT,
                part.op,
                pieces if name == "wo_a.weight" else (),
            )
            for name, part in parts.items()
        ),
    ]


def compressor(
    g: Geometry, at: Place, where: blocks.Where, ratio: int, size: int, name: str, others: str
) -> list[Rule]:
    """Return the rules of what makes one entry of `size` numbers out of each group of tokens."""
    hidden = g.dim("hidden_size")
    width = size * 2 if ratio == _SPARSE else size
    pair = (("wkv", "kv_proj"), ("wgate", "gate_proj"))
    both = at.fused(f"{name}.wkv_gate.weight", ((width * 2, hidden),), Split((width, width)))
    return [
        at.rule(
            [[f"{name}.{theirs}.weight", f"{others}.{hub}.weight"] for theirs, hub in pair],
            [f"{name}.{theirs}.weight" for theirs, _ in pair],
            ((width, hidden), (width, hidden)),
            where,
            _UNQUANTIZED,
            more=both,
        ),
        at.one((f"{name}.ape", f"{others}.position_bias"), f"{name}.ape", (ratio, width), where, _KEPT),
        at.linear((f"{name}.norm", f"{others}.kv_norm"), f"{name}.norm", (size,), where, _KEPT),
    ]


def compression(g: Geometry, at: Place, ratios: Sequence[int]) -> list[Rule]:
    """Return the rules of the layers that compress, and of those that choose among the entries."""
    hidden, size, rank = g.dim("hidden_size"), g.dim("head_dim"), g.dim("q_lora_rank")
    rules: list[Rule] = []
    for ratio in sorted(set(ratios) - {0}):
        where: blocks.Where = {"l": _layers(ratios, ratio)}
        rules += compressor(g, at, where, ratio, size, "attn.compressor", "self_attn.compressor")
    sparse: blocks.Where = {"l": _layers(ratios, _SPARSE)}
    if sparse["l"]:
        heads, width = g.count("index_n_heads"), g.dim("index_head_dim")
        name, others = "attn.indexer", "self_attn.compressor.indexer"
        weights = (f"{name}.weights_proj", f"{others}.scorer.weights_proj")
        rules += [
            at.linear((f"{name}.wq_b", f"{others}.q_b_proj"), f"{name}.wq_b", (heads * width, rank), sparse),
            at.linear(weights, f"{name}.weights_proj", (heads, hidden), sparse, _UNQUANTIZED),
        ]
        rules += compressor(g, at, sparse, _SPARSE, width, f"{name}.compressor", others)
    return rules


def mixture(g: Geometry, at: Place, where: blocks.Where, hashed: Domain) -> list[Rule]:
    """Return the rules of the experts; the `hashed` layers choose them by the token alone."""
    hidden, inner, count = g.dim("hidden_size"), g.dim("moe_intermediate_size"), g.count("n_routed_experts")
    shared = inner * g.count("n_shared_experts")
    vocab, chosen = g.dim("vocab_size"), g.count("num_experts_per_tok")
    scored: blocks.Where = {"l": frozenset(where["l"]) - frozenset(hashed)} if hashed else where
    rules = [at.linear(("ffn.gate", "mlp.gate"), "ffn.gate", (count, hidden), where, Param())]
    if hashed:
        table = ("ffn.gate.tid2eid", "mlp.gate.tid2eid")
        rules.append(
            at.one(table, table[0], (vocab, chosen), {"l": hashed}, Param(integer=True), Indices(count))
        )
    bias = ("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "ffn.gate.e_score_correction_bias")
    rules.append(at.one(bias, bias[-1], (count,), scored, _KEPT))
    for theirs, ours in _MLP:
        shape = (hidden, shared) if ours == "down_proj" else (shared, hidden)
        names = (f"ffn.shared_experts.{theirs}", f"mlp.shared_experts.{ours}", f"ffn.shared_experts.{ours}")
        rules.append(at.linear(names, names[-1], shape, where))
    # transformers holds two as one, and the down projections without a ".weight".
    fused, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    both = at.fused(fused, ((count, inner * 2, hidden),), Split((inner, inner), axis=-2), _TRANSFORMERS)
    whole = at.fused(down, ((count, hidden, inner),), _SAME, _TRANSFORMERS)
    return [
        *rules,
        experts(at, where, count, (inner, hidden), _MLP[:2], both),
        experts(at, where, count, (hidden, inner), _MLP[2:], whole),
    ]


def experts(
    at: Place,
    where: blocks.Where,
    count: int,
    shape: blocks.Shape,
    parts: Sequence[tuple[str, str]],
    more: Sequence[Form],
) -> Rule:
    """Return the rule of projections of all experts: one by one, or stacked already."""
    targets = [f"ffn.switch_mlp.{ours}.weight" for _, ours in parts]
    single = [
        [f"ffn.experts.{{e}}.{w}.weight", f"mlp.experts.{{e}}.{p}.weight", f"ffn.experts.{{e}}.{p}.weight"]
        for w, p in parts
    ]
    stacked = [
        [f"ffn.experts.{w}.weight", f"ffn.experts.{p}.weight", target]
        for (w, p), target in zip(parts, targets, strict=True)
    ]
    shapes = (shape,) * len(parts)
    each = at.forms(single, shapes, Stack(), {"e": range(count)}, because=_equals(count))
    wholes = at.forms(stacked, ((count, *shape),) * len(parts), _SAME, None, (_STACKED,))
    ours = tuple(_join(at.ours, target) for target in targets)
    vlm = _vlm(ours, ((count, *shape),) * len(parts), _SAME)
    forms = [form for form in (*each, *wholes, vlm, *more) if form.source != ours]
    return Rule(ours, tuple(forms), where, blocks.EXPERT)


def connections(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of the norms and of the hyper-connections around attention and experts."""
    hidden, streams = g.dim("hidden_size"), g.dim("hc_mult")
    mix = (streams + 2) * streams
    shapes: dict[str, blocks.Shape] = {"fn": (mix, streams * hidden), "base": (mix,), "scale": (3,)}
    rules: list[Rule] = []
    for side, norm in (("attn", "input_layernorm"), ("ffn", "post_attention_layernorm")):
        rules.append(at.linear((f"{side}_norm", norm), f"{side}_norm", (hidden,), where, _KEPT))
        for part, shape in shapes.items():
            names = (f"hc_{side}_{part}", f"{side}_hc.{part}", f"hc_{side}.{part}")
            rules.append(at.one(names, names[1], shape, where, _KEPT))
    return rules


def collapse(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of what makes one stream of all before the last norm, and of that norm."""
    hidden, streams = g.dim("hidden_size"), g.dim("hc_mult")
    shapes: dict[str, blocks.Shape] = {
        "fn": (streams, streams * hidden),
        "base": (streams,),
        "scale": (1,),
    }
    rules = [at.linear(("norm",), "norm", (hidden,), where, _KEPT)]
    for part, shape in shapes.items():
        names = (f"hc_head_{part}", f"hc_head.hc_{part}", f"hc_head.{part}")
        rules.append(at.one(names, names[-1], shape, where, _KEPT))
    return rules


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    config = g.config
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
        _TOP.linear(("embed", "embed_tokens"), "embed_tokens", (vocab, hidden), {}),
        _HEAD.linear(("head",), "lm_head", (vocab, hidden), {}),
        *collapse(g, _TOP, {}),
        *connections(g, _LAYER, where),
        *attention(g, _LAYER, where),
        *compression(g, _LAYER, ratios),
        *mixture(g, _LAYER, where, hashed),
    ]
    return rules, mtp_drops(g)


def mtp_drops(g: Geometry) -> list[Drop]:
    """Return the drops of the MTP layers: blocks without compression, and what is around them."""
    hidden, layers = g.dim("hidden_size"), g.layers().stop
    anywhere: blocks.Where = {"l": range(OPEN)}
    inside = [
        *connections(g, _MTP, anywhere),
        *attention(g, _MTP, anywhere),
        *mixture(g, _MTP, anywhere, range(0)),
        *collapse(g, _MTP, anywhere),
        _MTP.linear(("enorm",), "enorm", (hidden,), anywhere),
        _MTP.linear(("hnorm",), "hnorm", (hidden,), anywhere),
        _MTP.linear(("e_proj",), "e_proj", (hidden, hidden), anywhere),
        _MTP.linear(("h_proj",), "h_proj", (hidden, hidden), anywhere),
    ]
    # Of the DSpark stages in 0731, whose sizes config.json does not say.
    further = ("main_proj", "main_norm", "markov_head.markov_w1", "markov_head.markov_w2")
    more = (*further, "confidence_head.proj")
    reason = f"multi-token prediction (mtp), not part of the model's {layers} layers"
    marker = "mtp.{l}.attn.wkv.weight"
    known = [
        Drop(route.source[0], reason, route.where, route.shapes[0], marker)
        for rule in inside
        for route in rule.hub_routes()
    ]
    return [
        *known,
        *(Drop(f"mtp.{{l}}.{name}.weight", reason, anywhere, marker=marker, usual=False) for name in more),
        Drop("mtp.{l}", reason, anywhere, marker=marker, usual=False, whole=True),
    ]


def _layers(ratios: Sequence[int], ratio: int) -> frozenset[int]:
    return frozenset(layer for layer, found in enumerate(ratios) if found == ratio)


def _equals(count: int) -> str:
    return f"{label(count).replace(' ', ' = ', 1)} in config.json"


FAMILY = Family(
    "deepseek_v4",
    "deepseek_v4",
    build,
    # What the class needs and transformers has defaults for.
    defaults={
        "n_shared_experts": 1,
        "hc_mult": 4,
        "compress_rope_theta": 160000.0,
        "routed_scaling_factor": 1.5,
    },
    architectures=("DeepseekV4ForCausalLM",),
    float32=("_fn", "_base", "_scale", "attn_sink", "gate.bias", ".ape"),
    required=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "qk_rope_head_dim",
        "q_lora_rank",
        "o_lora_rank",
        "o_groups",
        "moe_intermediate_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "sliding_window",
        "compress_ratios",
        "compress_rope_theta",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "num_hash_layers",
    ),
    rope=None,
    spelling=spelling,
    rewrite=hub_keys,
    refuse=refuse,
    runtime="deepseek_v4",
    remarks=remarks,
)
