"""The formats: which stored tensors together are one tensor.

Each format is a file with a codec class and a `claim` function. The bundling happens before any rule
sees a name, so a rule cannot forget a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mla_tools.codecs import awq, compressed_int, dense, fp4, fp8, gptq, mlx_quantized
from mla_tools.codecs.codec import (
    GLOBAL_SCALE,
    Claim,
    Codec,
    Module,
    Native,
    Parts,
    Quantized,
    Sample,
    TargetCodec,
    part_name,
    recast,
)
from mla_tools.codecs.dense import Dense
from mla_tools.codecs.fp8 import Fp8Block
from mla_tools.codecs.mlx_quantized import MlxQuantized, stored_as
from mla_tools.spec import DType

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "FORMATS",
    "GLOBAL_SCALE",
    "SCALES",
    "Bundle",
    "Claim",
    "Codec",
    "Dense",
    "Fp8Block",
    "MlxQuantized",
    "Module",
    "Native",
    "Quantized",
    "Sample",
    "TargetCodec",
    "bundle",
    "config_keys",
    "lacking",
    "part_name",
    "repacking",
    "stored_as",
]

# Endings of the stored tensors that belong to a weight, for messages about those that stand alone.
SCALES = ("_scale_inv", "_scale", ".scale", ".scales", ".biases")

# Formats that bundle several stored tensors; what none of them takes is dense or unknown.
BUNDLING = (fp4.claim, fp8.claim, mlx_quantized.claim, compressed_int.claim, awq.claim, gptq.claim)

# Every format that a sample can be written in, by the name that --format takes.
FORMATS: dict[str, Sample] = {
    **dense.SAMPLES,
    **fp8.SAMPLES,
    **fp4.SAMPLES,
    **compressed_int.SAMPLES,
    **awq.SAMPLES,
    **gptq.SAMPLES,
    # Experts in FP4, the rest in FP8.
    "deepseek-v4": Sample(
        Fp8Block(scales=DType.F8_E8M0, part="scale", packs=True),
        DType.BF16,
        fp8.SAMPLES["fp8-ue8m0"].section,
        experts=fp4.Fp4(True, "weight", "scale", dtypes=(DType.I8, DType.F8_E8M0)),
    ),
}

# Parts that hold rows start..stop, in the rows that the source codec's `cut` names, start, stop.
Repack = Callable[[Parts, int, int], Mapping[str, "mx.array"]]


# Stored tensors that say something about activations or caches, which MLX keeps in floats.
SIDE = {
    "input_scale": "scale of activations, which MLX does not quantize",
    "input_global_scale": "scale of activations, which MLX does not quantize",
    "activation_scale": "scale of activations, which MLX does not quantize",
    "output_scale": "scale of activations, which MLX does not quantize",
    "k_scale": "scale of a quantized KV cache, which the model does not use",
    "v_scale": "scale of a quantized KV cache, which the model does not use",
}


class Bundle(NamedTuple):
    """What the stored tensors of a module are: tensors, things left out and why, things unknown and why."""

    claims: list[Claim]
    drops: dict[str, str]
    unread: dict[str, str]


def bundle(module: Module) -> Bundle:
    """Return what the stored tensors of one module are, by the last components of their names.

    Raises ValueError where a format recognises its parts but they do not fit together, or where two
    formats claim the same stored tensor.
    """
    claims: list[Claim] = []
    taken: dict[str, Claim] = {}
    for take in BUNDLING:
        for claim in take(module):
            for leaf in claim.parts.values():
                if leaf in taken:
                    raise ValueError(f"{leaf} is {taken[leaf].codec.name} and {claim.codec.name} at once")
                taken[leaf] = claim
            claims.append(claim)
    rest = {leaf: spec for leaf, spec in module.leaves.items() if leaf not in taken}
    drops = {leaf: SIDE[leaf] for leaf in rest if leaf in SIDE}
    rest = {leaf: spec for leaf, spec in rest.items() if leaf not in drops}
    plain = dense.claim(replace(module, leaves=rest))
    claims += plain
    known: dict[str, Claim] = {}
    for claim in claims:
        if claim.leaf in known:
            names = f"{known[claim.leaf].codec.name} and {claim.codec.name}"
            raise ValueError(
                f"{claim.leaf} is stored in two formats, {names}: {', '.join(sorted(module.leaves))}"
            )
        known[claim.leaf] = claim
    unread = {leaf: _why_not(leaf, module) for leaf in rest.keys() - {claim.leaf for claim in plain}}
    return Bundle(claims, drops, unread)


def _why_not(leaf: str, module: Module) -> str:
    dtype = module.leaves[leaf].dtype.name
    if dtype == "F8_E8M0":
        return f"{dtype} is a dtype of scales, but no weight here uses this scale"
    if dtype == "F8_E5M2":
        return f"{dtype} codes are not supported, only F8_E4M3"
    if dtype.startswith("F8"):
        return f"{dtype} without a scale ({leaf}_scale_inv, {leaf}_scale or scale)"
    if dtype == "U32" and "scales" not in module.leaves:
        return "packed codes (U32) without scales"
    beside = ", ".join(sorted(module.leaves))
    return f"no known format stores a tensor in {dtype} with {beside} beside it"


def repacking(source: Codec, target: TargetCodec) -> Repack | None:
    """Return how the parts of one format become those of another without decoding, if they can.

    The codes and the numbers stay as they are, but for affine scales that are rounded to a narrower
    dtype. Parts are handed over in rows, and `target.finish` makes of them what is stored.
    """
    native = source.on_request
    shares = native is not None and native.global_scale
    if source == target and not shares:
        return lambda parts, start, stop: parts
    if native is not None and target.takes(native):
        form = native  # for the function below, which mypy checks separately
        widens = target.widens(form)

        def repack(parts: Parts, start: int, stop: int) -> Mapping[str, mx.array]:
            held = recast(parts, DType.F32) if widens else parts
            return target.from_native(source.to_native(held, start, stop), form, stop - start)

        return repack
    return None


def lacking(codecs: Collection[Codec]) -> Iterator[tuple[str, str, list[Codec], list[Codec]]]:
    """Yield what tensors of a checkpoint lack: what, its part, their codecs, and those that have it.

    MLX's affine mode always has biases; a global scale is missing only where other tensors have one.
    """
    missing, others = mlx_quantized.bare(codecs)
    if missing:
        yield "biases are", "biases", missing, others
    for part in ("_scale_2", "_global_scale"):
        missing, others = fp4.without_global_scale(codecs, part)
        if missing:
            yield "global scale is", part, missing, others


def config_keys(found: Quantized) -> dict[str, Any]:
    """Return the keys of config.json that say how an output's modules are stored; {} where all are floats."""
    formats = {type(codec): codec for codec in found.codecs.values()}
    if len(formats) > 1:
        names = ", ".join(sorted({codec.name for codec in found.codecs.values()}))
        raise ValueError(f"one config.json cannot describe formats of several kinds: {names}")
    codec = next(iter(formats.values()), None)
    return mlx_quantized.config_of(found) if codec is None else codec.config(found)
