"""How a config writes its rope, and how mlx-lm's model classes read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Config", "flat_rope", "nested_rope", "rope_parameters", "rope_type"]

Config = Mapping[str, Any]


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return rope_theta and rope_scaling in one, however a config writes them.

    As transformers 5 reads both forms: rope_scaling goes before rope_parameters, and a rope_theta
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
