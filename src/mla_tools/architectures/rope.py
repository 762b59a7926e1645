"""How a config writes its rope, and how mlx-lm's model classes read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mla_tools.errors import Problem, clipped

__all__ = [
    "Config",
    "flat_rope",
    "lacking_in_rope",
    "nested_rope",
    "rope_parameters",
    "rope_type",
    "unlike_in_rope",
]

Config = Mapping[str, Any]


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return rope_theta and rope_scaling in one, however a config writes them.

    As transformers 5 reads both forms: rope_scaling goes before rope_parameters, and a rope_theta
    in either before the one beside them; rope_type before type.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters")
    found = dict(given) if isinstance(given, Mapping) else {}
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if _differ(found):
        del found["type"]  # mlx-lm would look at it first
    return found


def _differ(rope: Config) -> bool:
    """Whether the old and the new name of the kind of rope say different things."""
    return "rope_type" in rope and rope.get("type", rope["rope_type"]) != rope["rope_type"]


def rope_type(rope: Config) -> object:
    """Return the kind of rope, which has an old and a new name."""
    return rope.get("rope_type", rope.get("type", "default"))


# The kinds of rope that mlx-lm knows, with the keys that it asks for. Source: initialize_rope in 0.32.2.
_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "deepseek_yarn": ("factor",),
    "telechat3-yarn": ("factor",),
    "llama3": ("factor",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
    "proportional": (),
    "mrope": ("mrope_section",),
}


def lacking_in_rope(key: str, rope: object) -> list[Problem]:
    """Return the problems of a rope of which mlx-lm cannot make a module; `key` is where it stands."""
    if rope is None:
        return []
    if not isinstance(rope, Mapping):
        return [Problem("config.json", f"{key} cannot be used", "an object or null", clipped(rope))]
    # mlx-lm looks at the old name first.
    kind = rope.get("type") or rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = f"a rope_type that mlx-lm knows: {', '.join(_KINDS)}"
        return [Problem("config.json", f"{key} cannot be used", known, f"rope_type {clipped(kind)}")]
    return [
        Problem("config.json", f"{name} is missing in {key}", f"{name}, for rope_type {kind}", "no such key")
        for name in _KINDS[kind]
        if rope.get(name) is None
    ]


def unlike_in_rope(config: Config) -> list[Problem]:
    """Return the problems of a yarn that mlx-lm computes otherwise than the reference implementation.

    Source: _compute_yarn_parameters of transformers 5.23, and YarnRoPE of mlx-lm 0.32.2.
    """
    rope = rope_parameters(config)
    if rope_type(rope) not in ("yarn", "deepseek_yarn"):
        return []
    problems = []

    def problem(needed: str, found: str) -> None:
        what = "mlx-lm's model class computes another yarn than transformers"
        problems.append(Problem("config.json", what, needed, found))

    if rope.get("truncate", True) is not True:
        problem("truncate true", f"truncate {clipped(rope['truncate'])}")
    keys = ("factor", "mscale", "mscale_all_dim", "attention_factor")
    given = {key: rope[key] for key in keys if rope.get(key) is not None}
    if not all(isinstance(value, (int, float)) for value in given.values()) or "factor" not in given:
        return problems  # `lacking_in_rope` says so, or a number is none
    said = ", ".join(f"{key} {clipped(value)}" for key, value in given.items())
    try:
        theirs, reference = _attention_factors({key: float(value) for key, value in given.items()})
    except (OverflowError, ZeroDivisionError):
        problem("numbers that yarn can be computed with", said)
        return problems
    # Both are computed in float64, by other steps.
    if not math.isclose(theirs, reference, rel_tol=1e-6):
        problem(f"an attention factor of {theirs:.6g}, which mlx-lm takes", f"{reference:.6g} ({said})")
    return problems


def _attention_factors(yarn: Mapping[str, float]) -> tuple[float, float]:
    """Return the attention factor that mlx-lm takes, and that of transformers."""
    factor, mscale, all_dim = yarn["factor"], yarn.get("mscale"), yarn.get("mscale_all_dim")
    theirs = _mscale(factor, 1 if mscale is None else mscale) / _mscale(factor, all_dim or 0)
    reference = theirs if mscale and all_dim else _mscale(factor, 1)
    return theirs, yarn.get("attention_factor", reference)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def nested_rope(config: Config) -> dict[str, Any]:
    """Return the rewritten keys for a class of mlx-lm that reads rope_parameters alone."""
    return {"rope_parameters": rope_parameters(config)}


def flat_rope(config: Config) -> dict[str, Any]:
    """Return the rewritten keys for a class of mlx-lm that reads rope_theta and rope_scaling alone."""
    given = config.get("rope_scaling")
    usual = not isinstance(given, Mapping) or not ("rope_theta" in given or _differ(given))
    if config.get("rope_parameters") is None and usual:
        return {}
    found = rope_parameters(config)
    theta = found.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope_type(found) == "default" else found}
