"""MLX's own quantization: codes packed in uint32 along the last axis, scales and maybe biases per group.

Source: the documentation of mx.quantize and the shapes that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Claim, Module, Rows
from mla_tools.quantization import QuantSpec, dequantize, infer_spec, quantize, with_biases
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["MlxQuantized", "claim", "recast"]

_FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})


@dataclass(frozen=True)
class MlxQuantized:
    """A tensor in one of MLX's four modes.

    `dtype` is the float dtype that it decodes to and that it was or is encoded from; affine scales and
    biases have it. An affine tensor without `biases` has biases of zero.
    """

    spec: QuantSpec
    dtype: DType
    biases: bool

    @property
    def word(self) -> str:
        return str(self.spec)

    @property
    def quantized(self) -> bool:
        return True

    @property
    def kept(self) -> MlxQuantized:
        return self if self.biases == self.spec.has_biases else replace(self, biases=True)

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        *head, width = spec.shape
        groups = (*head, self.spec.groups(width))
        scales = self.dtype if self.spec.has_biases else DType.U8
        parts = {
            "weight": Spec((*head, self.spec.packed_width(width)), DType.U32),
            "scales": Spec(groups, scales),
        }
        if self.biases:
            parts["biases"] = Spec(groups, self.dtype)
        return parts

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        rows = (start, stop)
        return dict.fromkeys(("weight", "scales", "biases") if self.biases else ("weight", "scales"), rows)

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        return dequantize(dict(parts), self.spec, getattr(mx, dtype.mlx))

    def keep(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        return with_biases(parts, self.spec)

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        return quantize(array, self.spec)


def recast(parts: Mapping[str, mx.array], dtype: DType) -> dict[str, mx.array]:
    """Return the parts of an affine tensor with scales and biases in another float dtype."""
    import mlx.core as mx

    floats = {part: parts[part].astype(getattr(mx, dtype.mlx)) for part in parts if part != "weight"}
    return {"weight": parts["weight"], **floats}


def claim(module: Module) -> list[Claim]:
    """Claim `weight` in uint32 together with `scales` and maybe `biases`."""
    weight, scales = module.leaves.get("weight"), module.leaves.get("scales")
    biases = module.leaves.get("biases")
    if weight is None or scales is None or weight.dtype is not DType.U32:
        return []
    if module.width is None:
        return []
    if weight.shape[:-1] != scales.shape[:-1] or not weight.shape or 0 in weight.shape + scales.shape:
        raise ValueError(f"scales {scales} do not belong to weight {weight}: the rows differ")
    if biases is not None and biases != scales:
        raise ValueError(f"biases {biases} differ from scales {scales}")
    is_block_float = scales.dtype is DType.U8
    if not is_block_float and scales.dtype not in _FLOATS:
        raise ValueError(f"scales are {scales.dtype.name}, which no MLX mode uses")
    if is_block_float and biases is not None:
        raise ValueError("scales in uint8 belong to a mode without biases, but there are biases")
    spec = infer_spec(
        width=module.width,
        packed_width=weight.shape[-1],
        groups=scales.shape[-1],
        scales_are_uint8=is_block_float,
    )
    # The block-float modes do not say what they were made from; bfloat16 is what MLX decodes them to.
    dtype = DType.BF16 if is_block_float else scales.dtype
    codec = MlxQuantized(spec, dtype, biases is not None)
    parts = {part: part for part in codec.cut(0, 0)}
    return [Claim("weight", Spec((*weight.shape[:-1], module.width), dtype), codec, parts)]
