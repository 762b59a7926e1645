"""The families: which config belongs to which table."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from mla_tools.architectures import (
    bailing_moe_v3,
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v4_mtp,
    deepseek_v32,
    deepseek_v41,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k3,
    kimi_k25,
    kimi_linear,
    kimi_vl,
    longcat_flash,
    minicpm3,
    mistral4,
    youtu_llm,
)
from mla_tools.architectures.family import Family
from mla_tools.architectures.geometry import Geometry
from mla_tools.errors import CheckpointError, Problem, clipped
from mla_tools.table import Table

__all__ = ["DRAFTERS", "MODEL_TYPES", "Family", "family_of", "table_of"]

# model_type in config.json -> family. A new architecture is a file beside this one and a line here.
MODEL_TYPES: dict[str, Family] = {
    "bailing_hybrid": bailing_moe_v3.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "deepseek_v32": deepseek_v32.FAMILY,
    "deepseek_v4": deepseek_v4.FAMILY,
    "deepseek_v41": deepseek_v41.FAMILY,
    # The text_config of deepseek_v41 alone; mlx-lm has one class for both.
    "deepseek_v41_text": deepseek_v41.FAMILY,
    "glm4_moe_lite": glm4_moe_lite.FAMILY,
    "glm_moe_dsa": glm_moe_dsa.FAMILY,
    # As mlx-lm reads it.
    "joyai_llm_flash": deepseek_v3.FAMILY,
    "kimi_k2": deepseek_v3.KIMI_K2,
    "kimi_k25": kimi_k25.FAMILY,
    "kimi_k3": kimi_k3.FAMILY,
    "kimi_linear": kimi_linear.FAMILY,
    "kimi_vl": kimi_vl.FAMILY,
    "longcat_flash": longcat_flash.FAMILY,
    "longcat_flash_ngram": longcat_flash.NGRAM,
    "minicpm3": minicpm3.FAMILY,
    "mistral3": mistral4.MULTIMODAL,
    "mistral4": mistral4.FAMILY,
    # What transformers calls the model that the hub calls youtu_llm.
    "youtu": youtu_llm.FAMILY,
    "youtu_llm": youtu_llm.FAMILY,
}


# Names are made one by one; the largest models published have less than a tenth of this many.
_MOST_TENSORS = 4_000_000

# Family -> the prefix of its MTP layers, and what makes a separate family of them.
DRAFTERS = {"deepseek_v4": (deepseek_v4_mtp.PREFIX, deepseek_v4_mtp.drafter)}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config, by its model_type or, where it has none, its architectures.

    Raises CheckpointError that lists the known ones.
    """
    model_type = config.get("model_type")
    named = config.get("architectures")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        family = MODEL_TYPES[model_type]
        place = family.place(config)
        if place is not None and not family.inside and not isinstance(config.get(place), Mapping):
            found = repr(config[place])[:80] if place in config else "no such key"
            raise CheckpointError([Problem("config.json", f"{place} cannot be used", "an object", found)])
        inner = family.numbers(config).get("model_type")
        if place is None or not family.inside or inner in family.inside:
            return family
        needed = f"{model_type} with a {family.section} of model_type {' or '.join(family.inside)}"
        raise CheckpointError(
            [
                Problem(
                    "config.json",
                    "this architecture is not known",
                    needed,
                    f"model_type {clipped(inner)} there",
                )
            ]
        )
    if model_type is None and isinstance(named, list):
        for family in MODEL_TYPES.values():
            if any(name in family.architectures for name in named):
                return family
    found = f"model_type {clipped(model_type)}, architectures {clipped(named)}"
    raise CheckpointError(
        [Problem("config.json", "this architecture is not known", f"one of {', '.join(MODEL_TYPES)}", found)]
    )


def table_of(config: Mapping[str, Any], family: Family | None = None) -> tuple[Family, Table]:
    """Return the family of a config, or the given one, and its table with all numbers filled in.

    Raises CheckpointError that lists every config key that is missing or absurd.
    """
    family = family or family_of(config)
    misspelled = family.misspelled(config)
    geometry = Geometry(family.numbers(config))
    rules, drops = family.build(geometry)
    if misspelled or geometry.problems:
        raise CheckpointError(list(dict.fromkeys((*misspelled, *geometry.problems))))
    routes = [route for rule in rules for route in rule.routes()]
    wanted = sum(len(route.source) * prod(map(len, route.where.values())) for route in routes)
    if wanted > _MOST_TENSORS:
        needed, found = f"a model of at most {_MOST_TENSORS:,} tensors", f"{wanted:,}"
        cause = "Are the numbers of layers and experts right?"
        problem = Problem("config.json", "the model would have too many tensors", needed, found, cause)
        raise CheckpointError([problem])
    return family, Table(rules, drops)
