"""compressed-tensors "pack-quantized": integer codes packed along the last axis, one scale per group.

Parts: `weight_packed` [out, words], the lowest bits first; `weight_scale` [out, groups], where one
group is a scale per row; `weight_zero_point` [words, groups] if the zero points are not all zero, packed
along out; and `weight_shape`, which says [out, in] once more. Codes and zero points are signed and
stored with half the range added, so (code - zero) is the same with or without it.

Source: pack_quantized/base.py and helpers.py in compressed-tensors 0.20.0, where `pack_to_int32` adds
1 << (num_bits - 1) to weights and zero points alike; Kimi K2 Thinking's headers for shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_tools.codecs.codec import Claim, Module, Native, Parts, Quantized, Rows, Sample, TargetCodec, refuse
from mla_tools.codecs.codes import FLOATS, affine, affine_form, dequantized, pack, steps, unpack
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["SAMPLES", "CompressedInt", "claim"]

_BITS = (4, 8)

# Bytes of working memory that encoding takes for each element, less twice those of the float dtype; the
# growth of mx.get_peak_memory.
_WORKING = 19


@dataclass(frozen=True)
class CompressedInt(TargetCodec):
    """Codes of 4 or 8 bits; `group` of them share a scale in `dtype`.

    `group` is None for whole rows of any width, which only a sample is; a claim gives their width.
    """

    bits: int
    group: int | None
    symmetric: bool
    dtype: DType

    @property
    def name(self) -> str:
        group = f"g{self.group}" if self.group else "rows"
        return f"int{self.bits} {group}" + ("" if self.symmetric else " asymmetric")

    @property
    def quantized(self) -> bool:
        return True

    @property
    def native(self) -> Native | None:
        return affine_form(self.bits, self.group, self.dtype if self.symmetric else DType.F32)

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        rows, width = spec.shape
        if width % (self.group or width):
            raise ValueError(f"groups of {self.group} do not divide rows of {width} elements")
        groups = width // (self.group or width)
        parts = {
            "_packed": Spec((rows, self._words(width)), DType.I32),
            "_scale": Spec((rows, groups), self.dtype),
            "_shape": Spec((2,), DType.I64),
        }
        if not self.symmetric:
            parts["_zero_point"] = Spec((self._words(rows), groups), DType.I32)
        return parts

    def _words(self, count: int) -> int:
        return -(-count * self.bits // 32)

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        rows = {"_packed": (start, stop), "_scale": (start, stop)}
        if not self.symmetric:
            rows["_zero_point"] = (start * self.bits // 32, self._words(stop))
        return rows

    def _zeros(self, parts: Mapping[str, mx.array], start: int, stop: int) -> mx.array | None:
        if self.symmetric:
            return None
        first = start - start % (32 // self.bits)
        zeros = unpack(parts["_zero_point"].T, self.bits)
        return zeros[:, start - first : stop - first].T

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        codes, scales = unpack(parts["_packed"], self.bits), parts["_scale"]
        # Where the last word of a row is not full, there are more codes than numbers.
        if self.group:
            codes = codes[:, : scales.shape[1] * self.group]
        zeros = self._zeros(parts, start, stop)
        return dequantized(codes, scales, 2 ** (self.bits - 1) if zeros is None else zeros, dtype)

    def to_native(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        form = self.native
        if form is None:
            return super().to_native(parts, start, stop)
        return affine(parts["_packed"], parts["_scale"], self._zeros(parts, start, stop), form)

    @property
    def rows_together(self) -> int:
        # Zero points are packed along the rows.
        return 1 if self.symmetric else 32 // self.bits

    def check(self, parts: Mapping[str, mx.array]) -> None:
        refuse(parts["_scale"], "_scale")

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        group = self.group or array.shape[1]
        codes, scales, zeros = steps(array, self.bits, group, self.dtype, symmetric=self.symmetric)
        parts = {
            "_packed": pack(codes, self.bits).view(mx.int32),
            "_scale": scales,
            "_shape": mx.array(array.shape, mx.int64),
        }
        if not self.symmetric:
            parts["_zero_point"] = mx.contiguous(pack(zeros.T, self.bits).T).view(mx.int32)
        return parts

    def finish(self, parts: Parts, start: int, spec: Spec) -> dict[str, mx.array]:
        import mlx.core as mx

        made = {part: array for part, array in parts.items() if part != "_shape"}
        return made if start else {**made, "_shape": mx.array(spec.shape, mx.int64)}

    def working_bytes(self, elements: int, nbytes: int) -> int:
        return elements * (_WORKING - 2 * nbytes)

    def config(self, found: Quantized) -> dict[str, Any]:
        section = _section(self.bits, self.group, symmetric=self.symmetric)
        return {"quantization_config": {**section, "ignore": list(found.floats)}}


def _section(bits: int, group: int | None, *, symmetric: bool) -> dict[str, object]:
    weights: dict[str, object] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    linear = {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": linear},
    }


def _sample(bits: int, group: int | None, *, symmetric: bool) -> Sample:
    codec = CompressedInt(bits, group, symmetric, DType.BF16)
    return Sample(codec, DType.BF16, {**_section(bits, group, symmetric=symmetric), "ignore": ["lm_head"]})


SAMPLES = {
    "ct-int4": _sample(4, 32, symmetric=True),
    "ct-int4-asym": _sample(4, 64, symmetric=False),
    "ct-int8": _sample(8, None, symmetric=True),
}


def claim(module: Module) -> list[Claim]:
    """Claim `weight_packed` in I32 with the parts beside it; ValueError where they do not fit together."""
    packed, scale = module.leaves.get("weight_packed"), module.leaves.get("weight_scale")
    # Packed 4-bit floats have the same names; they are in U8.
    if packed is None or packed.dtype is not DType.I32 or module.width is None:
        return []
    if scale is None:
        raise ValueError("weight_packed has no weight_scale beside it")
    if "weight_g_idx" in module.leaves:
        raise ValueError("weight_g_idx: columns in activation order (actorder) are not supported")
    if scale.dtype not in FLOATS:
        raise ValueError(f"weight_scale is {scale.dtype.name}; it must be BF16, F16 or F32 here")
    if len(packed.shape) != 2 or len(scale.shape) != 2 or 0 in packed.shape + scale.shape:
        raise ValueError(f"weight_packed {packed} and weight_scale {scale} must have two axes here")
    width, groups = module.width, scale.shape[1]
    fitting = [bits for bits in _BITS if -(-width * bits // 32) == packed.shape[1]]
    if len(fitting) != 1:
        raise ValueError(
            f"weight_packed {packed} does not hold rows of {width} codes of 4 or 8 bits"
            + (" and not of both" if fitting else "")
        )
    if width % groups:
        raise ValueError(f"weight_scale {scale} does not divide rows of {width} into equal groups")
    zero = module.leaves.get("weight_zero_point")
    codec = CompressedInt(fitting[0], width // groups, zero is None, scale.dtype)
    spec = Spec((packed.shape[0], width), scale.dtype)
    for part, needed in codec.encoded(spec).items():
        found = module.leaves.get(f"weight{part}")
        # The shape is stored in I64 and, in Kimi K2, in I32; nothing is read from it.
        as_wanted = found == needed or (part == "_shape" and found in (None, Spec((2,), DType.I32)))
        if not as_wanted:
            rows = f"[{spec.shape[0]}, {width}] with {groups} groups in a row"
            raise ValueError(f"weight{part} is {found}, but {rows} needs {needed}")
    leaves = ("_packed", "_scale", "_shape", "_zero_point")
    parts = {part: f"weight{part}" for part in leaves if f"weight{part}" in module.leaves}
    return [Claim("weight", spec, codec, parts)]
