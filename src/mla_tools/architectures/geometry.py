"""The numbers of a config.json, each remembering which keys it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_tools.errors import Problem
from mla_tools.names import Domain

__all__ = ["OPEN", "Geometry", "Num", "label"]

# Larger than any index a checkpoint can have: `range(n, OPEN)` is "n and all after it".
OPEN = 1 << 31

# No dimension of a real model comes near this; a larger one is a damaged or hostile config.
_LARGEST = 1 << 28

# Nor does a number of layers, experts or heads, of which names are made one by one.
_LARGEST_COUNT = 4096


class Num(int):
    """A number with the config keys it was made of, kept through sums and products for error messages."""

    label: str

    def __new__(cls, value: int, label: str) -> Num:
        self = super().__new__(cls, value)
        self.label = label
        return self

    def __add__(self, other: int) -> Num:
        return Num(int(self) + int(other), f"{self.label} + {label(other)}")

    def __mul__(self, other: int) -> Num:
        return Num(int(self) * int(other), f"{_factor(self)} x {_factor(other)}")

    def __floordiv__(self, other: int) -> Num:
        return Num(int(self) // int(other), f"{_factor(self)} / {_factor(other)}")


def label(number: int) -> str:
    """Return the config keys that a number was made of, with their values, or just the number."""
    return number.label if isinstance(number, Num) else str(number)


def _factor(number: int) -> str:
    text = label(number)
    return f"({text})" if " + " in text else text


class Geometry:
    """Reads dimensions from a config and collects what is missing or absurd instead of stopping at it.

    After a table has been built from it, `problems` says whether the table can be trusted.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[Problem] = []

    def _complain(self, key: str, needed: str, found: str) -> Num:
        self.problems.append(Problem("config.json", f"{key} cannot be used", needed, found))
        return Num(1, key)

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> Num:
        """Return how many of something there are: layers, experts, heads."""
        return self.dim(key, default, least=least, most=_LARGEST_COUNT)

    def dim(self, key: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST) -> Num:
        """Return a size from the config."""
        value = self.config.get(key, default)
        if value is None and default is not None:
            value = default
        needed = f"an integer between {least} and {most}"
        if value is None:
            return self._complain(key, needed, "no such key")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            return self._complain(key, needed, repr(value)[:80])
        return Num(value, f"{key} {value}")

    def optional(self, key: str) -> Num | None:
        """Return a size from the config, or None where the key is absent, null or 0."""
        value = self.config.get(key)
        absent = value is None or (value == 0 and type(value) is int)
        return None if absent else self.dim(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value from the config."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            self._complain(key, "true or false", repr(value)[:80])
            return default
        return value

    def section(self, key: str) -> Geometry:
        """Return the reader of a nested object; its problems join those of this one."""
        value = self.config.get(key)
        if not isinstance(value, Mapping):
            self._complain(key, "an object", "no such key" if value is None else repr(value)[:80])
            value = {}
        inner = Geometry(value)
        inner.problems = self.problems
        return inner

    def numbers(self, key: str, *, below: int) -> frozenset[int]:
        """Return a list of integers, each in 1..below, as a set (layer lists are 1-based)."""
        value = self.config.get(key)
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= below for item in value
        ):
            self._complain(key, f"a list of integers from 1 to {below}", repr(value)[:80])
            return frozenset()
        return frozenset(value)

    def indices(self, key: str, *, below: int) -> frozenset[int]:
        """Return a list of integers, each in 0..below - 1, as a set; empty where there is none."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item < below for item in value):
            self._complain(key, f"a list of integers from 0 to {below - 1}", repr(value)[:80])
            return frozenset()
        return frozenset(value)

    def layers(self, key: str = "num_hidden_layers") -> range:
        """Return the layer numbers."""
        return range(self.count(key))

    def moe_layers(self, experts: str = "n_routed_experts") -> tuple[Domain, Domain]:
        """Return the layers with a dense MLP and those with experts.

        As every DeepSeek-style class decides it: from `first_k_dense_replace` on, each layer whose
        number `moe_layer_freq` divides.
        """
        layers = self.layers()
        first = self.dim("first_k_dense_replace", 0, least=0)
        every = self.dim("moe_layer_freq", 1)
        sparse = frozenset(
            layer for layer in layers if self.optional(experts) and layer >= first and layer % every == 0
        )
        return frozenset(layers) - sparse, sparse
