"""What a config class of transformers 5 writes in config.json, in the words of the hub's.

Such a class reads the hub's config.json and writes one of its own. Some keys have another name there, some
lists stand for a number, and what the class computes without being told is left out. A family's `spelling`
says the hub's keys, and everything after it knows these alone. Where both are there, that key counts which
transformers reads. Source: configuration_*.py and configuration_utils.py of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mla_tools.architectures.rope import Config
from mla_tools.errors import Problem, clipped

__all__ = ["Spelled", "Speller", "layer_words", "mlp_layers", "renamed"]


class Spelled(NamedTuple):
    """The hub's keys that a config says in other words, and what the hub's keys cannot say."""

    keys: dict[str, Any]
    problems: list[Problem]

    def __or__(self, other: tuple[Any, ...]) -> Spelled:
        keys, problems = other
        return Spelled(self.keys | keys, [*self.problems, *problems])


Speller = Callable[[Config], Spelled]


def renamed(config: Config, names: Mapping[str, str]) -> Spelled:
    """Return the keys that have another name; `names` are those of transformers with the hub's.

    Two names with different values are a problem, for nothing tells which of them is meant.
    """
    keys, problems = {}, []
    for theirs, ours in names.items():
        if config.get(theirs) is None:
            continue
        if config.get(ours) is None:
            keys[ours] = config[theirs]
        elif config[ours] != config[theirs]:
            found = f"{ours} {clipped(config[ours])}, {theirs} {clipped(config[theirs])}"
            problems.append(Problem("config.json", f"{ours} and {theirs} differ", "one value", found))
    return Spelled(keys, problems)


def layer_words(config: Config, key: str, *words: str) -> tuple[list[str] | None, list[Problem]]:
    """Return the word that a list has for each layer, None where there is no list or it cannot be used.

    Words after those of the last layer are ignored, as transformers does.
    """
    given, count = config.get(key), config.get("num_hidden_layers")
    if given is None or type(count) is not int or count < 1:
        return None, []  # what is wrong with the number, the table says
    if isinstance(given, list) and len(given) >= count:
        found = [word for word in given[:count] if isinstance(word, str) and word in words]
        if len(found) == count:
            return found, []
    needed = f"a list of {count} words, each {' or '.join(words)}"
    return None, [Problem("config.json", f"{key} cannot be used", needed, clipped(given))]


def mlp_layers(config: Config) -> Spelled:
    """Return first_k_dense_replace and moe_layer_freq for mlp_layer_types, which names each layer's MLP."""
    kinds, problems = layer_words(config, "mlp_layer_types", "dense", "sparse")
    if kinds is None:
        return Spelled({}, problems)
    sparse = [layer for layer, kind in enumerate(kinds) if kind == "sparse"]
    said = config.get("first_k_dense_replace"), config.get("moe_layer_freq")
    for first, every in (said, *_schedules(sparse, len(kinds))):
        if _sparse(first, every or 1, len(kinds)) == sparse:
            keys = {"first_k_dense_replace": first}
            return Spelled(keys if every is None else {**keys, "moe_layer_freq": every}, [])
    needed = "from some layer on each layer sparse, or each whose number is a multiple of another"
    cause = "mlx-lm's model class reads first_k_dense_replace and moe_layer_freq, which can say no more."
    return Spelled(
        {}, [Problem("config.json", "mlp_layer_types cannot be used", needed, clipped(kinds), cause)]
    )


def _schedules(sparse: list[int], count: int) -> list[tuple[int, int | None]]:
    """Return the values of first_k_dense_replace and moe_layer_freq that may mean these layers."""
    if not sparse:
        return [(count, 1)]
    first = sparse[0]
    every = sparse[1] - first if len(sparse) > 1 else first or count
    return [(first, 1), (first, every)]


def _sparse(first: object, every: object, count: int) -> list[int] | None:
    """Return the layers with experts as Geometry.moe_layers tells them, None where these are no numbers."""
    if type(first) is not int or type(every) is not int or every < 1:
        return None
    return [layer for layer in range(count) if layer >= first and layer % every == 0]
