"""FP8: E4M3 codes with one scale per block of 128 rows and 128 columns.

Source: DeepSeek-V3's README_WEIGHTS: `weight_scale_inv` is what a block is multiplied with (the
name notwithstanding); at the right and lower edges blocks are cut off, so a [576, 7168] weight has
scales [5, 56].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Claim, Module, Rows, Sample
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["SAMPLES", "Fp8Block", "claim"]

_BLOCK = 128

# mx.load gives uint8 for E4M3, so a dict of arrays has lost the dtype.
_CODES = frozenset({DType.F8_E4M3, DType.U8})


@dataclass(frozen=True)
class Fp8Block:
    """E4M3 codes and F32 scales of `block` x `block` values."""

    block: int = _BLOCK

    @property
    def word(self) -> str:
        return f"fp8 {self.block}x{self.block}"

    @property
    def quantized(self) -> bool:
        return True

    @property
    def kept(self) -> None:
        return None

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        rows, width = spec.shape
        scales = (-(-rows // self.block), -(-width // self.block))
        return {"weight": Spec(spec.shape, DType.F8_E4M3), "_scale_inv": Spec(scales, DType.F32)}

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        return {"weight": (start, stop), "_scale_inv": (start // self.block, -(-stop // self.block))}

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        import mlx.core as mx

        codes, scales = parts["weight"], parts["_scale_inv"]
        rows, width = codes.shape
        first = start // self.block
        # Which scale row each code row takes, counted from the first scale row at hand.
        which = (mx.arange(start, start + rows) // self.block) - first
        scales = mx.repeat(scales.astype(mx.float32), self.block, axis=1)[:, :width]
        values = mx.from_fp8(codes, dtype=mx.float32) * scales[which]
        return values.astype(getattr(mx, dtype.mlx))

    def keep(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        raise TypeError(f"MLX has no form of {self.word}")

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        import mlx.core as mx

        # For samples: the scale maps the largest value of a block to 448, the largest E4M3.
        rows, width = array.shape
        down, across = -rows % self.block, -width % self.block
        values = mx.pad(array.astype(mx.float32), [(0, down), (0, across)])
        tiles = values.reshape(values.shape[0] // self.block, self.block, -1, self.block)
        scales = mx.maximum(mx.abs(tiles).max(axis=(1, 3)), 1e-12) / 448.0
        codes = mx.to_fp8(tiles / scales[:, None, :, None]).reshape(values.shape)[:rows, :width]
        return {"weight": mx.contiguous(codes), "_scale_inv": scales}


SAMPLES = {
    "fp8": Sample(
        Fp8Block(),
        DType.BF16,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
    )
}


def claim(module: Module) -> list[Claim]:
    """Claim an E4M3 leaf together with its `_scale_inv`; ValueError where their shapes disagree."""
    claims = []
    block = module.quantization.get("weight_block_size", [_BLOCK, _BLOCK])
    for leaf, spec in module.leaves.items():
        scales = module.leaves.get(f"{leaf}_scale_inv")
        if spec.dtype not in _CODES or scales is None:
            continue
        if block != [_BLOCK, _BLOCK]:
            raise ValueError(f"weight_block_size {block} is not supported, only [{_BLOCK}, {_BLOCK}]")
        if scales.dtype is not DType.F32:
            raise ValueError(f"{leaf}_scale_inv is {scales.dtype.name}; FP8 scales must be F32 here")
        if len(spec.shape) != 2:
            raise ValueError(f"{leaf} is {spec}; FP8 weights must have two axes here")
        codec = Fp8Block()
        needed = codec.encoded(spec)["_scale_inv"]
        if scales != needed:
            raise ValueError(
                f"{leaf}_scale_inv is {scales}, but {leaf} {list(spec.shape)} in blocks of "
                f"{_BLOCK}x{_BLOCK} needs {needed}"
            )
        parts = {"weight": leaf, "_scale_inv": f"{leaf}_scale_inv"}
        # BF16 is what the values are nominally: the checkpoint's own dtype before it was quantized.
        claims.append(Claim(leaf, Spec(spec.shape, DType.BF16), codec, parts))
    return claims
