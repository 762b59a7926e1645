"""FP4: E2M1 codes, two in a byte with the low nibble first, and a scale for each group of a row.

Two kinds. MX: groups of 32, scales E8M0 (a power of two, stored as F8_E8M0 or as the same byte in U8);
AMD Quark and DeepSeek call the scale `weight_scale` and `scale`, compressed-tensors
(mxfp4-pack-quantized) stores `weight_packed` and `weight_scale`. NV: groups of 16, scales E4M3 and one
F32 scale for the whole tensor; ModelOpt multiplies with `weight_scale_2`, compressed-tensors
(nvfp4-pack-quantized) divides by `weight_global_scale`.

Sources: the OCP microscaling specification for E2M1 and E8M0; ModelOpt's and compressed-tensors'
exported checkpoints for names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import (
    GLOBAL_SCALE,
    NEUTRAL,
    Claim,
    Codec,
    Module,
    Native,
    Parts,
    Rows,
    Sample,
    TargetCodec,
    part_name,
    refuse,
)
from mla_tools.errors import MlaToolsError
from mla_tools.kernels import decode_e2m1, decode_e8m0
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["SAMPLES", "Fp4", "claim"]

_PACKED = frozenset({DType.U8, DType.I8})
_NAN = 255  # the E8M0 byte that is no number


@dataclass(frozen=True)
class Fp4(TargetCodec):
    """E2M1 codes; `e8m0` distinguishes MX from NV.

    `codes`, `scale` and `overall` are the parts; `overall` is the scale of the whole tensor, which
    `divides` or multiplies. `dtypes` are those in which codes and scales are stored.
    """

    e8m0: bool
    codes: str = "weight"
    scale: str = "_scale"
    overall: str | None = None
    divides: bool = False
    dtypes: tuple[DType, DType] = (DType.U8, DType.U8)
    overall_shape: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """The number of values that share a scale."""
        return 32 if self.e8m0 else 16

    @property
    def name(self) -> str:
        return "mxfp4 packed" if self.e8m0 else "nvfp4 packed"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def native(self) -> Native | None:
        return Native(QuantSpec("mxfp4" if self.e8m0 else "nvfp4"), global_scale=self.overall is not None)

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        *head, width = spec.shape
        if width % self.group:
            raise ValueError(f"groups of {self.group} do not divide a last axis of {width}")
        codes, scales = self.dtypes
        parts = {
            self.codes: Spec((*head, width // 2), codes),
            self.scale: Spec((*head, width // self.group), scales),
        }
        if self.overall is not None:
            parts[self.overall] = Spec(self.overall_shape, DType.F32)
        return parts

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        rows = {self.codes: (start, stop), self.scale: (start, stop)}
        if self.overall is not None:
            rows[self.overall] = (0, 1)
        return rows

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        packed, scales = parts[self.codes].view(mx.uint8), self._scales(parts)
        values = decode_e2m1(packed).reshape(*scales.shape, self.group) * scales[..., None]
        values = values.reshape(packed.shape[0], -1)
        if self.overall is not None:
            overall = parts[self.overall].reshape(())
            values = values / overall if self.divides else values * overall
        return values.astype(getattr(mx, dtype.mlx))

    def _scales(self, parts: Mapping[str, mx.array]) -> mx.array:
        """Return the scales of the groups in float32."""
        import mlx.core as mx

        if not self.e8m0:
            return mx.from_fp8(parts[self.scale], dtype=mx.float32)
        self._refuse_nan(parts)
        return decode_e8m0(parts[self.scale])

    def _refuse_nan(self, parts: Mapping[str, mx.array]) -> None:
        import mlx.core as mx

        if mx.any(parts[self.scale] == _NAN).item():
            raise MlaToolsError("an E8M0 scale is 255, which is not a number; the checkpoint is damaged")

    def to_native(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        import mlx.core as mx

        if self.e8m0:
            self._refuse_nan(parts)
        kept = {"weight": mx.contiguous(parts[self.codes]).view(mx.uint32), "scales": parts[self.scale]}
        if self.overall is not None:
            overall = parts[self.overall].reshape(1, 1)
            neutral = mx.array(NEUTRAL, mx.float32)
            each = neutral / overall if self.divides else overall * neutral
            kept[GLOBAL_SCALE] = mx.broadcast_to(each, (stop - start, 1))
        return kept

    def check(self, parts: Mapping[str, mx.array]) -> None:
        import mlx.core as mx

        if self.e8m0:
            self._refuse_nan(parts)
            return
        refuse(mx.from_fp8(parts[self.scale], dtype=mx.float32), self.scale)
        if self.overall is not None:
            overall = parts[self.overall]
            # What is divided by must not be zero, and the product that MLX is given must be finite.
            refuse(overall, self.overall)
            refuse(NEUTRAL / overall if self.divides else overall * NEUTRAL, self.overall, overall)

    def takes(self, native: Native) -> bool:
        return native == self.native and not native.global_scale

    def from_native(self, parts: Parts, native: Native, rows: int) -> dict[str, mx.array]:
        import mlx.core as mx

        codes = mx.contiguous(parts["weight"]).view(getattr(mx, self.dtypes[0].mlx))
        return {self.codes: codes, self.scale: parts["scales"]}

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        values = array.astype(mx.float32)
        parts = {}
        if self.overall is not None:
            overall = mx.maximum(mx.abs(values).max(), 1e-30) / NEUTRAL
            values = values / overall
            parts[self.overall] = (1 / overall if self.divides else overall).reshape(self.overall_shape)
        codes, scales, *_ = mx.quantize(values, mode="mxfp4" if self.e8m0 else "nvfp4")
        return {self.codes: codes.view(mx.uint8), self.scale: scales, **parts}


_QUARK = {"quant_method": "quark", "export": {"pack_method": "reorder", "weight_format": "real_quantized"}}
_CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
_E4M3 = (DType.U8, DType.F8_E4M3)

SAMPLES = {
    "quark-mxfp4": Sample(Fp4(e8m0=True), DType.BF16, _QUARK),
    "ct-mxfp4": Sample(
        Fp4(e8m0=True, codes="_packed"), DType.BF16, {**_CT, "format": "mxfp4-pack-quantized"}
    ),
    "ct-nvfp4": Sample(
        Fp4(False, "_packed", "_scale", "_global_scale", divides=True, dtypes=_E4M3, overall_shape=(1,)),
        DType.BF16,
        {**_CT, "format": "nvfp4-pack-quantized"},
    ),
    # ModelOpt keeps its section in hf_quant_config.json.
    "modelopt-nvfp4": Sample(Fp4(False, overall="_scale_2", dtypes=_E4M3), DType.BF16),
}


def without_global_scale(codecs: Iterable[Codec], part: str) -> tuple[list[Codec], list[Codec]]:
    """Return which NVFP4 codecs of a checkpoint lack the global scale that others have, and those others."""
    nv = [codec for codec in codecs if isinstance(codec, Fp4) and not codec.e8m0]
    others: list[Codec] = [codec for codec in nv if codec.overall == part]
    return [codec for codec in nv if others and codec.overall is None], others


def claim(module: Module) -> list[Claim]:
    """Claim packed codes of half the width together with their scales."""
    claims = []
    for leaf, spec in module.leaves.items():
        tensor = leaf.removesuffix("_packed")
        if spec.dtype not in _PACKED or module.width is None or 2 * spec.width != module.width:
            continue
        found = next((part for part in ("_scale", "scale") if part_name(tensor, part) in module.leaves), None)
        if found is None:
            continue
        codec = _codec(module, tensor, "_packed" if tensor != leaf else "weight", found)
        if codec is None:
            continue
        whole = Spec((*spec.shape[:-1], module.width), DType.BF16)
        parts = {part: part_name(tensor, part) for part in codec.encoded(whole)}
        for part, needed in codec.encoded(whole).items():
            if module.leaves[parts[part]] != needed:
                there = module.leaves[parts[part]]
                raise ValueError(
                    f"{parts[part]} is {there}, but {codec.name} {list(whole.shape)} needs {needed}"
                )
        claims.append(Claim(tensor, whole, codec, parts))
    return claims


def _codec(module: Module, tensor: str, codes: str, scale: str) -> Fp4 | None:
    """Return the codec of these leaves, or None if the scale is of another kind."""
    stored = module.leaves[part_name(tensor, codes)].dtype
    scales = module.leaves[part_name(tensor, scale)]
    dtype = scales.dtype
    # mx.load gives bytes for E4M3 as for E8M0, and then their number decides.
    is_nv = dtype is DType.F8_E4M3 or (dtype is DType.U8 and scales.width * 16 == module.width)
    if dtype in (DType.F8_E8M0, DType.U8) and not is_nv:
        return Fp4(True, codes, scale, dtypes=(stored, dtype))
    if not is_nv:
        return None
    for overall, divides in (("_scale_2", False), ("_global_scale", True)):
        there = module.leaves.get(part_name(tensor, overall))
        if there is not None:
            shape = there.shape if there.size == 1 else (1,)
            return Fp4(False, codes, scale, overall, divides, (stored, dtype), shape)
    if codes != "weight":
        raise ValueError(f"{tensor}{codes} with scales in E4M3 has no {tensor}_global_scale beside it")
    return Fp4(False, codes, scale, dtypes=(stored, dtype))
