"""The MTP layers of DeepSeek V4 as separate models, with the names of mlx-vlm's drafters.

The first release has one MTP layer, 0731 three stages of DSpark; their tensors tell which. They use the
embedding and the output head of the main model.
Source: mlx_vlm/speculative/drafters in mlx-vlm 0.7.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mla_tools.architectures import blocks
from mla_tools.architectures.deepseek_v4 import Place, attention, collapse, connections, mixture
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.errors import CheckpointError, Problem
from mla_tools.rules import Drop, Param, Rule

__all__ = ["PREFIX", "drafter"]

# The prefix of all MTP layers, in every layout that has them.
PREFIX = "mtp."

_LINEAR = Param(quantizable=True)
_KEPT = Param(cast=False)

Shapes = Mapping[str, tuple[int, ...]]


def drafter(shapes: Shapes) -> Family | None:
    """Return the family of the MTP layers among the stored tensors of a checkpoint, if it has some.

    Raises CheckpointError for layers that mlx-vlm has no drafter for.
    """
    numbers = {name.split(".")[1] for name in shapes if name.startswith(PREFIX)}
    layers = sorted({int(number) for number in numbers if number.isdecimal()})
    if not layers:
        return None
    if "mtp.0.main_proj.weight" in shapes:
        # Two sizes that config.json does not say for certain.
        wide, rank = (
            (shapes.get(name) or (1,))[-1]
            for name in ("mtp.0.main_proj.weight", f"mtp.{layers[-1]}.markov_head.markov_w1.weight")
        )
        kind, build = "dspark", partial(_dspark, wide=wide, rank=rank, count=len(layers))
    elif len(layers) == 1:
        kind, build, rank = "mtp", partial(_mtp, layer=layers[0]), None
    else:
        needed = "one MTP layer, or stages of DSpark with a mtp.0.main_proj"
        raise CheckpointError(
            [Problem("mtp", "mlx-vlm has no drafter for these layers", needed, f"layers {layers}")]
        )
    name = f"deepseek_v4_{kind}"
    return Family(
        name,
        name,
        build,
        defaults={"n_shared_experts": 1, "hc_mult": 4},
        rope=None,
        rewrite=partial(_config, count=len(layers), rank=rank),
        refuse=_refuse if kind == "dspark" else None,
    )


def _block(g: Geometry, at: Place, where: blocks.Where) -> list[Rule]:
    """Return the rules of a layer without compression, whose router scores every token."""
    return [*connections(g, at, where), *attention(g, at, where), *mixture(g, at, where, range(0))]


def _mtp(g: Geometry, layer: int) -> tuple[list[Rule], list[Drop]]:
    hidden = g.dim("hidden_size")
    where: blocks.Where = {"l": range(layer, layer + 1)}
    top = Place("mtp.{l}", "")
    rules = _block(g, Place("mtp.{l}", "decoder"), where) + collapse(g, top, where)
    for name in ("enorm", "hnorm"):
        rules.append(top.linear((name,), name, (hidden,), where, _KEPT))
    for name in ("e_proj", "h_proj"):
        rules.append(top.linear((name,), name, (hidden, hidden), where, _LINEAR))
    return rules, []


def _dspark(g: Geometry, wide: int, rank: int, count: int) -> tuple[list[Rule], list[Drop]]:
    hidden, vocab = g.dim("hidden_size"), g.dim("vocab_size")
    stage, top = Place("mtp.{l}", "stages.{l}"), Place("mtp.{l}", "")
    first: blocks.Where = {"l": range(1)}
    last: blocks.Where = {"l": range(count - 1, count)}
    rules = _block(g, stage, {"l": range(count)}) + collapse(g, stage, last)
    rules.append(stage.linear(("main_proj",), "main_proj", (hidden, wide), first))
    rules.append(stage.linear(("main_norm",), "main_norm", (hidden,), first, _KEPT))
    for name in ("markov_head.markov_w1", "markov_head.markov_w2"):
        rules.append(top.linear((name,), name, (vocab, rank), last))
    reason = "confidence head, which mlx-vlm's drafter does not use"
    return rules, [Drop("mtp.{l}.confidence_head.proj.weight", reason, last)]


def _config(config: Mapping[str, Any], count: int, rank: int | None) -> dict[str, Any]:
    """Return the keys that mlx-vlm's drafters read: the model's config inside, and the length of a draft."""
    inside = {
        key: value for key, value in config.items() if key not in ("quantization", "quantization_config")
    }
    keys: dict[str, Any] = {"text_config": inside, "block_size": count + 1, "tie_word_embeddings": False}
    if rank is None:
        return keys
    length = config["dspark_block_size"]
    return {
        **keys,
        "block_size": length + 1,
        "n_mtp_layers": count,
        "target_layer_ids": config["dspark_target_layer_ids"],
        "mask_token_id": config["dspark_noise_token_id"],
        "markov_rank": rank,
    }


def _refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Refuse a config without the settings of the DSpark stages."""
    kinds = {"dspark_block_size": int, "dspark_target_layer_ids": list, "dspark_noise_token_id": int}
    return [
        Problem(
            "config.json",
            f"{key} cannot be used",
            f"{'an integer' if kind is int else 'a list'}, for the DSpark stages in mtp",
            repr(config[key])[:80] if key in config else "no such key",
        )
        for key, kind in kinds.items()
        if not isinstance(config.get(key), kind)
    ]
