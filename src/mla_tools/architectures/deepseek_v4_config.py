"""What DeepSeek V4's class reads in config.json, and what it computes otherwise than the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tools.architectures.rope import flat_rope, rope_type
from mla_tools.architectures.spelling import Spelled
from mla_tools.errors import Problem

__all__ = ["hub_keys", "refuse", "remarks", "spelling"]


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


def spelling(config: Mapping[str, Any]) -> Spelled:
    """Return what `hub_keys` does; what cannot be used in it, the table and `refuse` say."""
    return Spelled(hub_keys(config), [])


def refuse(config: Mapping[str, Any]) -> list[Problem]:
    """Return what the class does not compute, or computes differently from transformers."""
    keys = config
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
        Problem(
            "config.json", "the model class for DeepSeek V4 computes something else", "no such thing", what
        )
        for what, is_there in found.items()
        if is_there
    ]


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Return a note on ratios beyond the last layer."""
    ratios, layers = config.get("compress_ratios"), config.get("num_hidden_layers")
    if not isinstance(ratios, list) or not isinstance(layers, int) or len(ratios) <= layers:
        return []
    beyond = len(ratios) - layers
    return [
        f"compress_ratios in config.json has {len(ratios)} numbers for {layers} layers; the last {beyond}"
        f" {'belong to MTP layers and are' if beyond > 1 else 'belongs to an MTP layer and is'} ignored"
    ]
