"""MLX's own quantization: codes packed in uint32 along the last axis, scales and maybe biases per group.

Source: the documentation of mx.quantize and the shapes that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Claim, Codec, Module, Rows, refuse
from mla_tools.kernels import encode_affine
from mla_tools.quantization import QuantSpec, dequantize, infer_spec, quantize, with_biases
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["GLOBAL_SCALE", "NEUTRAL", "MlxQuantized", "claim", "recast"]

# The part with one float32 number for each expert; MLX has it for nvfp4 in layers of experts alone.
GLOBAL_SCALE = "global_scale"

# MLX multiplies nvfp4 codes and scales with global_scale / 2688, the largest E2M1 times the largest E4M3.
NEUTRAL = 6.0 * 448.0

_FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})


@dataclass(frozen=True)
class MlxQuantized(Codec):
    """A tensor in one of MLX's four modes.

    `dtype` is the float dtype that it decodes to and that it was or is encoded from; affine scales and
    biases have it. An affine tensor without `biases` has biases of zero. `shared`: how many rows, those
    of an expert, have a global scale in common; None where there is none, and 0 for all rows.
    """

    spec: QuantSpec
    dtype: DType
    biases: bool
    shared: int | None = None

    @property
    def word(self) -> str:
        return str(self.spec) if self.shared is None else f"{self.spec} with global scales"

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
        if self.shared is not None:
            parts[GLOBAL_SCALE] = Spec((spec.rows // (self.shared or spec.rows),), DType.F32)
        return parts

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        rows = (start, stop)
        found = dict.fromkeys(("weight", "scales", "biases") if self.biases else ("weight", "scales"), rows)
        # It has one axis, so it is one row, and short enough to be read whole.
        return found if self.shared is None else {**found, GLOBAL_SCALE: (0, 1)}

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        wanted = getattr(mx, dtype.mlx)
        if self.shared is None:
            return dequantize(dict(parts), self.spec, wanted)
        factors = self._each_row(parts, start, stop) / NEUTRAL
        return (dequantize(parts, self.spec, mx.float32) * factors).astype(wanted)

    def keep(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        kept = with_biases(parts, self.spec)
        return kept if self.shared is None else {**kept, GLOBAL_SCALE: self._each_row(parts, start, stop)}

    def check(self, parts: Mapping[str, mx.array]) -> None:
        if self.shared is not None:
            refuse(parts[GLOBAL_SCALE], GLOBAL_SCALE)

    def _each_row(self, parts: Mapping[str, mx.array], start: int, stop: int) -> mx.array:
        """Return the global scale of each of the rows start..stop, [rows, 1]."""
        import mlx.core as mx

        rows = mx.arange(start, stop)
        return parts[GLOBAL_SCALE].reshape(-1, 1)[rows // self.shared if self.shared else rows * 0]

    def joined(self, parts: Mapping[str, mx.array], start: int) -> dict[str, mx.array]:
        """Return the parts of rows from `start` on with the global scales of the experts that begin there.

        They come as one for each row. Where rows lie in the midst of an expert there is none to write.
        """
        if self.shared is None or GLOBAL_SCALE not in parts:
            return dict(parts)
        rest = {part: array for part, array in parts.items() if part != GLOBAL_SCALE}
        each = parts[GLOBAL_SCALE].reshape(-1)
        first = -start % self.shared if self.shared else start
        return {**rest, GLOBAL_SCALE: each[first :: self.shared or each.size]} if first < each.size else rest

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        if self.shared is not None:
            raise TypeError("global scales are kept and never made")
        return quantize(array, self.spec)

    def encode_now(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        if self.spec.mode == "affine" and mx.default_device().type == mx.DeviceType.cpu and array.ndim > 1:
            return encode_affine(array, self.spec.group_size, self.spec.bits)
        return self.encode(array)


def recast(parts: Mapping[str, mx.array], dtype: DType) -> dict[str, mx.array]:
    """Return parts with those that are floats, scales and biases, in another float dtype."""
    import mlx.core as mx

    wanted = getattr(mx, dtype.mlx)
    return {
        part: array.astype(wanted) if mx.issubdtype(array.dtype, mx.floating) else array
        for part, array in parts.items()
    }


def neutral(rows: int) -> dict[str, mx.array]:
    """Return the global scale of rows that have none: MLX divides it by itself, and 1 changes nothing."""
    import mlx.core as mx

    return {GLOBAL_SCALE: mx.full((rows, 1), NEUTRAL, mx.float32)}


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
    shared = None
    if GLOBAL_SCALE in module.leaves:
        found, needed = module.leaves[GLOBAL_SCALE], Spec(weight.shape[:1], DType.F32)
        if spec.mode != "nvfp4" or len(weight.shape) != 3 or found != needed:
            raise ValueError(
                f"{GLOBAL_SCALE} is {found}; beside {spec} codes {weight} it must be one F32 number for each"
                " expert of nvfp4 [experts, rows, words]"
            )
        shared = weight.shape[1]
    codec = MlxQuantized(spec, dtype, biases is not None, shared)
    parts = {part: part for part in codec.cut(0, 0)}
    return [Claim("weight", Spec((*weight.shape[:-1], module.width), dtype), codec, parts)]
