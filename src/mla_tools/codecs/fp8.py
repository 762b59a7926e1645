"""Which stored tensors are FP8: the names, the shapes and the dtypes of the scales."""

from __future__ import annotations

from collections.abc import Iterator

from mla_tools.codecs.codec import Claim, Module, Sample, part_name
from mla_tools.codecs.fp8_block import E8M0, GROUP, WHOLE, Fp8Block, compressed_tensors, deepseek
from mla_tools.errors import clipped
from mla_tools.spec import DType, Spec

__all__ = ["SAMPLES", "Fp8Block", "claim"]

# What DeepSeek V3 and Mistral, compressed-tensors and ModelOpt, and DeepSeek's own V4 call the scales.
_PARTS = ("_scale_inv", "_scale", "scale")

# Recognised by their shapes if the config names none; 1x32 is the format that OCP calls MXFP8.
_BLOCKS = ((128, 128), (32, 32), (1, 32))

Block = tuple[int, int]

_SCALES = frozenset({DType.F32, DType.BF16, DType.F16}) | E8M0


def claim(module: Module) -> list[Claim]:
    """Claim each leaf of E4M3 codes together with its scales.

    Raises ValueError where a leaf has two kinds of scales, or scales that do not fit it.
    """
    claims = []
    for leaf, spec in module.leaves.items():
        parts = [part for part in _PARTS if _has_scales(part, leaf, spec, module)]
        if not parts:
            continue
        names = [part_name(leaf, part) for part in parts]
        if len(parts) > 1:
            raise ValueError(f"{leaf} has two scales: {' and '.join(names)}")
        codec = _codec(leaf, spec, parts[0], names[0], module)
        # BF16 is what the values are nominally: the checkpoint's own dtype before it was quantized.
        nominal = Spec(spec.shape, DType.BF16)
        claims.append(Claim(leaf, nominal, codec, {"weight": leaf, parts[0]: names[0]}))
    return claims


def _has_scales(part: str, leaf: str, spec: Spec, module: Module) -> bool:
    if part_name(leaf, part) not in module.leaves or (part == "scale" and leaf != "weight"):
        return False
    # mx.load gives uint8 for E4M3, so a dict of arrays has lost the dtype. Two 4-bit codes are packed in
    # a byte under the same names, but then the rows have half the bytes.
    is_bytes = spec.dtype is DType.U8 and (part == "_scale_inv" or spec.width == module.width)
    return spec.dtype is DType.F8_E4M3 or is_bytes


def _codec(leaf: str, spec: Spec, part: str, name: str, module: Module) -> Fp8Block:
    scales = module.leaves[name]
    if scales.dtype not in _SCALES:
        raise ValueError(f"{name} is {scales.dtype.name}, which is not a dtype of FP8 scales")
    if len(spec.shape) not in (2, 3) or 0 in spec.shape:
        raise ValueError(
            f"{leaf} is {spec}; FP8 weights must have two axes, or three where experts are fused"
        )
    named = _named_block(module)
    declared = scales.dtype in E8M0 or module.quantization.get("scale_fmt") == "ue8m0"
    needed = []
    for block, experts, axes in _layouts(spec, named):
        packs = declared and spec.width % GROUP == 0 and block[1] % GROUP == 0
        codec = Fp8Block(block, scales.dtype, part, experts, axes, packs)
        shape = codec.encoded(spec)[part].shape
        if shape == scales.shape:
            return codec
        size = "" if WHOLE in block else f" in blocks of {block[0]}x{block[1]}"
        needed.append(f"{list(shape)}{size}")
    raise ValueError(
        f"{name} is {scales}, but {leaf} {list(spec.shape)} needs {' or '.join(dict.fromkeys(needed))}"
        + (" (weight_block_size in config.json)" if named else "")
    )


def _named_block(module: Module) -> Block | None:
    """Return the block size that the config names, if it does."""
    named = module.quantization.get("weight_block_size")
    if named is None:
        return None
    if isinstance(named, list) and len(named) == 2 and all(type(side) is int and side > 0 for side in named):
        return (named[0], named[1])
    raise ValueError(f"weight_block_size must be two integers, such as [128, 128], not {clipped(named)}")


def _layouts(spec: Spec, named: Block | None) -> Iterator[tuple[Block, int, int]]:
    """Yield the ways to lay out scales, as the `block`, `experts` and `axes` of an `Fp8Block`."""
    experts = spec.shape[-2] if len(spec.shape) == 3 else 0
    for block in [named] if named else _BLOCKS:
        yield block, experts, 2
    if named:
        return
    row, weight = (1, WHOLE), (WHOLE, WHOLE)
    yield from ((row, experts, axes) for axes in (2, 1))
    yield from ((weight, experts, axes) for axes in (2, 1, 0))
    # One scale for a whole stack of experts.
    yield from ((weight, 0, axes) for axes in (1, 0))


SAMPLES = {
    "fp8": Sample(Fp8Block(), DType.BF16, deepseek((128, 128))),
    # As DeepSeek V3.1 and V3.2 have them, powers of two in F32, and as V4 has them.
    "fp8-ue8m0-f32": Sample(Fp8Block(packs=True), DType.BF16, deepseek((128, 128), scale_fmt="ue8m0")),
    "fp8-ue8m0": Sample(
        Fp8Block(scales=DType.F8_E8M0, packs=True), DType.BF16, deepseek((128, 128), scale_fmt="ue8m0")
    ),
    "fp8-32x32": Sample(
        Fp8Block((32, 32), DType.F8_E8M0, "scale", packs=True),
        DType.BF16,
        deepseek((32, 32), scale_fmt="ue8m0"),
    ),
    "fp8-tensor": Sample(
        Fp8Block((WHOLE, WHOLE), DType.BF16, axes=0),
        DType.BF16,
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "ct-fp8-channel": Sample(
        Fp8Block((1, WHOLE), DType.BF16, "_scale"),
        DType.BF16,
        {**compressed_tensors(strategy="channel"), "ignore": ["lm_head"]},
    ),
    "ct-fp8-block": Sample(
        Fp8Block(scales=DType.BF16, part="_scale"),
        DType.BF16,
        {**compressed_tensors(strategy="block", block_structure=[128, 128]), "ignore": ["lm_head"]},
    ),
}
