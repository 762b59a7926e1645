"""Of two lists that have nothing to do with each other, a few pairs instead of the product.

What a family is called and how its layers are built is decided by its rules, how a weight is stored by its
codec, and neither sees the other. So each family in a few formats, and each format in a few families, show
what the product shows; `make test-all` runs the product.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import lcm
from typing import Any

import pytest

__all__ = ["PUBLISHED", "pairs", "product"]

Pair = tuple[str, str]

# Families in the formats in which they, or well-known versions of them, lie on the hub.
PUBLISHED: list[Pair] = [
    ("deepseek_v2", "bf16"),
    ("deepseek_v2_lite", "bf16"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v3", "awq"),
    ("deepseek_v3", "modelopt-nvfp4"),
    ("deepseek_v32", "fp8"),
    ("deepseek_v4", "deepseek-v4"),
    ("deepseek_v41", "deepseek-v4"),
    ("deepseek_v41_text", "deepseek-v4"),
    ("glm4_moe_lite", "bf16"),
    ("glm_moe_dsa", "fp8"),
    ("kimi_k2", "fp8"),
    ("kimi_k2", "ct-int4"),
    ("kimi_k25", "ct-int4"),
    ("kimi_k3", "ct-mxfp4"),
    ("kimi_linear", "bf16"),
    ("kimi_vl", "bf16"),
    ("longcat_flash", "fp8"),
    ("mistral3", "fp8-tensor"),
]


def pairs(
    rows: Collection[str], columns: Collection[str], special: Collection[Pair] = (), *, times: int = 2
) -> set[Pair]:
    """Return pairs that have each row and each column at least so many times, and the special ones.

    They lie on diagonals: both lists are gone through at once, each from the start again where it ends,
    and with the next column where both end together. Special ones of which the lists have one half or
    none are left out.
    """
    first, second = list(rows), list(columns)
    assert times <= min(len(first), len(second)), "there are not so many pairs"
    lap = lcm(len(first), len(second))
    count = times * max(len(first), len(second))
    chosen = {(first[k % len(first)], second[(k + k // lap) % len(second)]) for k in range(count)}
    assert len(chosen) == count
    return chosen | {(row, column) for row, column in special if row in first and column in second}


def product(rows: Collection[str], columns: Collection[str], chosen: Collection[Pair]) -> Sequence[Any]:
    """Return the product as parameters of a test; what is not chosen runs with `pytest --all` alone."""
    return [
        pytest.param(
            row, column, id=f"{row}-{column}", marks=[] if (row, column) in chosen else [ONLY_IN_ALL]
        )
        for row in rows
        for column in columns
    ]


ONLY_IN_ALL = pytest.mark.only_in_all
