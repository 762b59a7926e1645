"""The formats: which stored tensors together are one tensor.

Each format is a file with a codec class and a `claim` function. The bundling happens before any rule
sees a name, so a rule cannot forget a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mla_tools.codecs import dense, fp8, mlx_quantized
from mla_tools.codecs.codec import Claim, Codec, Module, part_name
from mla_tools.codecs.dense import Dense
from mla_tools.codecs.fp8 import Fp8Block
from mla_tools.codecs.mlx_quantized import MlxQuantized
from mla_tools.quantization import with_biases

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "SCALES",
    "Claim",
    "Codec",
    "Dense",
    "Fp8Block",
    "MlxQuantized",
    "Module",
    "bundle",
    "part_name",
    "repacking",
]

# Endings of the stored tensors that belong to a weight, for messages about those that stand alone.
SCALES = ("_scale_inv", "_scale", ".scale", ".scales", ".biases")

# Formats that bundle several stored tensors; what none of them takes is dense or unknown.
BUNDLING = (fp8.claim, mlx_quantized.claim)

Parts = Mapping[str, "mx.array"]


def bundle(module: Module) -> tuple[list[Claim], dict[str, str]]:
    """Return the tensors of one module, and for each stored tensor that is none the reason.

    Raises ValueError where a format recognises its parts but they do not fit together, or where two
    formats claim the same stored tensor.
    """
    claims: list[Claim] = []
    taken: dict[str, Claim] = {}
    for take in BUNDLING:
        for claim in take(module):
            for leaf in claim.parts.values():
                if leaf in taken:
                    raise ValueError(f"{leaf} is {taken[leaf].codec.word} and {claim.codec.word} at once")
                taken[leaf] = claim
            claims.append(claim)
    rest = {leaf: spec for leaf, spec in module.leaves.items() if leaf not in taken}
    if rest:
        plain = dense.claim(Module(rest, module.width, module.quantization))
        claims += plain
        for claim in plain:
            del rest[claim.leaf]
    return claims, {leaf: _why_not(leaf, module) for leaf in rest}


def _why_not(leaf: str, module: Module) -> str:
    dtype = module.leaves[leaf].dtype.name
    if dtype.startswith("F8"):
        return f"{dtype} without a scale ({leaf}_scale_inv)"
    if dtype == "U32" and "scales" not in module.leaves:
        return "packed codes (U32) without scales"
    return (
        f"no format known here stores a tensor in {dtype} with {', '.join(sorted(module.leaves))} beside it"
    )


def repacking(source: Codec, target: Codec) -> Callable[[Parts], Parts] | None:
    """Return how the parts of one format become those of another without decoding, if they can.

    The codes stay as they are and so do the numbers, but for affine scales that are rounded to a
    narrower dtype. Parts are handed over in rows.
    """
    if source == target:
        return lambda parts: parts
    if isinstance(source, MlxQuantized) and isinstance(target, MlxQuantized) and source.spec == target.spec:
        same = source.dtype == target.dtype

        def repack(parts: Parts) -> Parts:
            parts = with_biases(parts, target.spec) if target.biases else parts
            return parts if same or not target.spec.has_biases else mlx_quantized.recast(parts, target.dtype)

        return repack
    return None
