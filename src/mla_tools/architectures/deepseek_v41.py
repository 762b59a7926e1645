"""DeepSeek V4.1, the text model: a latent that some layers compress and index for those after them.

The names are DeepSeek's own. Source: the released header listing, and the renaming in mlx-lm's model class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mla_tools.architectures import blocks
from mla_tools.architectures.deepseek_v4_attention import attention_parts
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import OPEN, Geometry
from mla_tools.errors import Problem, clipped
from mla_tools.rules import Drop, Param, Rule

__all__ = ["FAMILY"]

_THEIRS, _OURS = "layers.{l}", "model.layers.{l}"


def kept(rules: Iterable[Rule]) -> list[Rule]:
    """Return the rules of tensors whose dtype mlx-lm's model class keeps."""
    return [replace(rule, param=replace(rule.param, cast=False)) for rule in rules]


def gain(theirs: str, ours: str, size: int, where: blocks.Where) -> Rule:
    return blocks.param(f"{theirs}.weight", (size,), where, f"{ours}.weight")


def attention(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of what every layer has of the attention; the class has the names of transformers."""
    rules = []
    for part in attention_parts(g):
        source, target = f"{_THEIRS}.attn.{part.theirs}", f"{_OURS}.self_attn.{part.hub}"
        param = Param(quantizable=part.matrix, cast=source.endswith(".weight"))
        rules.append(Rule.of(source, target, part.shape, part.op, where, param))
    return rules


def compression(g: Geometry, layers: range) -> list[Rule]:
    """Return the rules of the layers that compress the latent, and of those that choose among it."""
    hidden, size, rank = g.dim("hidden_size"), g.dim("head_dim"), g.dim("q_lora_rank")
    heads, width = g.count("index_n_heads"), g.dim("index_head_dim")
    theirs, ours = f"{_THEIRS}.attn", f"{_OURS}.self_attn"
    # A ratio for each layer, and maybe for MTP layers after them.
    ratios = g.config.get("compress_ratios")
    if not isinstance(ratios, list) or len(ratios) < layers.stop:
        needed, found = f"a list of at least {layers.stop} numbers", repr(ratios)[:80]
        g.problems.append(Problem("config.json", "compress_ratios cannot be used", needed, found))
        ratios = [0] * layers.stop
    sources = g.indices("kv_source_layer_ids", below=layers.stop)
    indexers = g.indices("index_source_layer_ids", below=layers.stop)
    pooled = frozenset(layer for layer in sources if ratios[layer] != 1)

    compress: blocks.Where = {"l": sources}
    index: blocks.Where = {"l": indexers}
    keys: blocks.Where = {"l": indexers & sources}
    part = "compressor"
    compressor = [
        *blocks.linear(f"{theirs}.{part}.wkv", (size, hidden), compress, f"{ours}.{part}.kv_proj"),
        gain(f"{theirs}.{part}.norm", f"{ours}.{part}.kv_norm", size, compress),
        # With a ratio of 1 there is nothing to weigh.
        *blocks.linear(f"{theirs}.{part}.wgate", (size, hidden), {"l": pooled}, f"{ours}.{part}.gate_proj"),
    ]
    part = "indexer"
    weights = f"{part}.weights_proj"
    return [
        *kept(compressor),
        *blocks.linear(f"{theirs}.{part}.wq_b", (heads * width, rank), index, f"{ours}.{part}.q_b_proj"),
        *blocks.linear(f"{theirs}.{weights}", (heads, hidden), index, f"{ours}.{weights}"),
        *blocks.linear(f"{theirs}.{part}.wk", (width, size), keys, f"{ours}.{part}.k_proj"),
        gain(f"{theirs}.{part}.k_norm", f"{ours}.{part}.k_norm", width, keys),
    ]


def mixture(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of the experts, all of one size, the shared one too."""
    hidden, inner, count = g.dim("hidden_size"), g.dim("moe_intermediate_size"), g.count("n_routed_experts")
    theirs, ours = f"{_THEIRS}.ffn", f"{_OURS}.mlp"
    shared = (("w1", "gate_proj", (inner, hidden)), ("w3", "up_proj", (inner, hidden)))
    rules = [
        blocks.param(f"{theirs}.gate.weight", (count, hidden), where, f"{ours}.gate.weight"),
        blocks.param(
            f"{theirs}.gate.bias", (count,), where, f"{ours}.gate.e_score_correction_bias", cast=False
        ),
        *blocks.experts(
            f"{theirs}.experts",
            f"{ours}.experts.switch_mlp",
            count,
            hidden,
            inner,
            where,
            ("w1", "w3", "w2"),
        ),
    ]
    for name, target, shape in (*shared, ("w2", "down_proj", (hidden, inner))):
        part = "shared_experts"
        rules += blocks.linear(f"{theirs}.{part}.{name}", shape, where, f"{ours}.{part}.{target}")
    return rules


def connections(g: Geometry, where: blocks.Where) -> list[Rule]:
    """Return the rules of the norms and of the hyper-connections around attention and experts."""
    hidden, streams = g.dim("hidden_size"), g.dim("hc_mult", 4)
    mix = (streams + 2) * streams
    shapes: dict[str, blocks.Shape] = {"fn": (mix, streams * hidden), "base": (mix,), "scale": (3,)}
    rules = [
        gain(f"{_THEIRS}.attn_norm", f"{_OURS}.input_layernorm", hidden, where),
        gain(f"{_THEIRS}.ffn_norm", f"{_OURS}.post_attention_layernorm", hidden, where),
    ]
    for side in ("attn", "ffn"):
        for name, shape in shapes.items():
            theirs, ours = f"{_THEIRS}.hc_{side}_{name}", f"{_OURS}.{side}_hc.{name}"
            rules.append(blocks.param(theirs, shape, where, ours, cast=False))
    return rules


def other_drops(g: Geometry, layers: range) -> list[Drop]:
    """Return the drops of what mlx-lm's model class cannot run: vision tensors, engram memory, MTP layers."""
    count = g.count("n_routed_experts")
    vision = "vision tensor, not part of mlx-lm's model class"
    engram = "engram memory, which mlx-lm's model class cannot run"
    mtp = "multi-token prediction (mtp), which mlx-lm's model class does not run"
    names: dict[str, str] = {}
    for block in ("norm1", "norm2", "attn.wqkv", "attn.wo", "mlp.w1", "mlp.w2"):
        names[f"vision.blocks.{{l}}.{block}"] = vision
    for module in ("vision.patch_embed.proj", "vision.norm", "aligner.w1", "aligner.w2"):
        names[module] = vision
    weights = {f"{name}.{part}": why for name, why in names.items() for part in ("weight", "bias")}
    weights |= dict.fromkeys(("image_start", "image_end", "image_newline", "image_pad"), vision)
    for part in ("embed.weight", "wkv.weight", "q_weight", "k_weight"):
        weights[f"layers.{{l}}.engram.{part}"] = engram
    modules = ["main_proj", "main_norm", "norm", "markov_head.embed", "markov_head.head"]
    modules += ["confidence_head.proj", "enorm", "hnorm", "e_proj", "h_proj"]
    weights |= {f"mtp.{{l}}.{module}.weight": mtp for module in modules}
    weights["mtp.{l}.ffn.gate.bias_vl"] = mtp
    anywhere: blocks.Where = {"l": range(OPEN)}
    for rule in (*attention(g, anywhere), *mixture(g, anywhere), *connections(g, anywhere)):
        weights |= {f"mtp.{text.removeprefix('layers.')}": mtp for text in rule.forms[0].source}
    drops = [
        Drop(text, why, {i: range(OPEN) for i in "le" if f"{{{i}}}" in text}, usual=False)
        for text, why in weights.items()
    ]
    return [*drops, Drop("layers.{l}.ffn.gate.bias_vl", vision, {"l": layers}, (count,))]


def build(g: Geometry) -> tuple[list[Rule], list[Drop]]:
    layers, hidden, vocab = g.layers(), g.dim("hidden_size"), g.dim("vocab_size")
    where: blocks.Where = {"l": layers}
    if engram := g.config.get("engram_layer_ids"):
        # Without the memory the model would answer, and wrongly; mlx-lm refuses to build it.
        cause = "mlx-lm's model class lacks the part with the tensors layers.*.engram."
        needed = "a model without engram memory"
        g.problems.append(
            Problem(
                "config.json",
                "mlx-lm cannot run this model",
                needed,
                f"engram_layer_ids {clipped(engram)}",
                cause,
            )
        )
    rules = [
        *blocks.linear("embed", (vocab, hidden), {}, "model.embed_tokens"),
        gain("norm", "model.norm", hidden, {}),
        *blocks.linear("head", (vocab, hidden), {}, "lm_head"),
        *attention(g, where),
        *compression(g, layers),
        *mixture(g, where),
        *connections(g, where),
    ]
    return rules, other_drops(g, layers)


FAMILY = Family(
    "deepseek_v41",
    "deepseek_v41",
    build,
    architectures=("DeepseekV41ForCausalLM",),
    section="text_config",
    flat=True,
    rope=None,
    float32=("_fn", "_base", "_scale", "attn_sink", "gate.bias", "gate.bias_vl"),
)
