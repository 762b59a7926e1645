"""`encode_mxfp4` and `encode_nvfp4`: the bits of `mx.quantize` on a CPU, an order of magnitude sooner.

MLX has no kernel for these modes on a CPU: it lays the distances to all 16 code points out beside every
element and takes the smallest. Here the code is read off the bits of the same quotient by comparing them
with the seven midpoints between neighbouring code points. The scales come from MLX's own operations in
the dtype of the weight, one for each group, so that what they make of infinities and NaN is the same on
every platform. The arrays stay lazy, and this module can be imported without mlx.

Source: experiments with mlx 0.32.4, with the graph that its `quantize` builds, and mlx/ops.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["encode_mxfp4", "encode_nvfp4"]

# The magnitudes of E2M1, in the order of their codes, are 0, 0.5, 1, 1.5, 2, 3, 4 and 6. These lie
# halfway between; a tie goes to the lower code, which is towards zero for either sign.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

# The largest magnitude of E2M1: the scale of a group is what brings its largest element here.
_LARGEST = 6.0

# MLX takes the distances of nvfp4 in float32. There 6 is less than half a unit in the last place of
# anything above 2^27: all code points are equally far, and the tie goes to code 0. An infinite or
# missing quotient is as far from all of them in every dtype.
_ALL_ALIKE = 2.0**27

# Elements that are encoded together: the temporaries of one block stay in the caches.
_BLOCK = 1 << 18


def encode_mxfp4(array: mx.array) -> dict[str, mx.array]:
    """Return the weight and scales of `array` in mxfp4: E2M1 codes, an E8M0 scale for every 32 of them.

    [..., width] bfloat16, float16 or float32 becomes weight [..., width / 8] uint32 and scales
    [..., width / 32] uint8. The bits are those of `mx.quantize(array, mode="mxfp4")` on a CPU. Raises
    ValueError for another dtype, no axes, or a width that 32 does not divide.
    """
    return _encode(array, 32, _e8m0)


def encode_nvfp4(array: mx.array) -> dict[str, mx.array]:
    """Return the weight and scales of `array` in nvfp4: E2M1 codes, an E4M3 scale for every 16 of them.

    [..., width] bfloat16, float16 or float32 becomes weight [..., width / 8] uint32 and scales
    [..., width / 16] uint8. The bits are those of `mx.quantize(array, mode="nvfp4")` on a CPU, without a
    global scale; MLX takes only an even number of groups there, this any. Raises ValueError for another
    dtype, no axes, or a width that 16 does not divide.
    """
    return _encode(array, 16, _e4m3)


def _e8m0(steps: mx.array) -> tuple[mx.array, mx.array]:
    """Return the uint8 scales of groups whose elements are `steps` of 6 high, and what they divide by."""
    import mlx.core as mx

    # The smallest power of two that is no less, by MLX's own operations. They also decide what a step
    # that is none, or beyond the powers of two, becomes as an exponent and, by another cast, in uint8.
    rounded = mx.round(mx.log2(steps)).astype(mx.int32)
    below = mx.power(mx.array(2.0, mx.float32), rounded.astype(mx.float32)) < steps.astype(mx.float32)
    exponents = mx.where(steps == 0, steps, (rounded + below).astype(steps.dtype))
    scales = (exponents + mx.array(127, mx.int32)).astype(mx.uint8)
    return scales, mx.power(mx.array(2.0, steps.dtype), exponents)


def _e4m3(steps: mx.array) -> tuple[mx.array, mx.array]:
    """Return the uint8 scales of groups whose elements are `steps` of 6 high, and what they divide by."""
    import mlx.core as mx

    scales = mx.to_fp8(steps.astype(mx.float32))
    return scales, mx.from_fp8(scales, steps.dtype)


def _encode(
    array: mx.array, group_size: int, scaling: Callable[[mx.array], tuple[mx.array, mx.array]]
) -> dict[str, mx.array]:
    import mlx.core as mx

    if array.dtype not in (mx.bfloat16, mx.float16, mx.float32):
        raise ValueError(f"an array of {array.dtype} cannot be encoded; bfloat16, float16 and float32 can")
    if array.ndim == 0 or array.shape[-1] % group_size:
        raise ValueError(f"group size {group_size} does not divide the last axis of shape {array.shape}")
    count = array.size // group_size
    groups = array.reshape(count, group_size)
    words: list[mx.array] = []
    scales: list[mx.array] = []
    for start in range(0, count, _BLOCK // group_size):
        block = groups[start : start + _BLOCK // group_size]
        if words:
            # One block after the other, or MLX would begin several and hold their temporaries.
            (block,) = mx.depends([block], [words[-1]])
        largest = mx.max(_magnitudes(_bits(block)), axis=-1, keepdims=True).view(array.dtype)
        block_scales, divisors = scaling(largest / _LARGEST)
        words.append(_packed(_codes(block, divisors)))
        scales.append(block_scales)
    rows, width = array.shape[:-1], array.shape[-1]
    return {
        "weight": _joined(words, mx.uint32).reshape(*rows, width // 8),
        "scales": _joined(scales, mx.uint8).reshape(*rows, width // group_size),
    }


def _joined(blocks: list[mx.array], dtype: mx.Dtype) -> mx.array:
    import mlx.core as mx

    return mx.concatenate(blocks) if blocks else mx.zeros((0, 1), dtype)


def _bits(floats: mx.array) -> mx.array:
    import mlx.core as mx

    return floats.view(mx.uint32 if floats.dtype == mx.float32 else mx.uint16)


def _magnitudes(bits: mx.array) -> mx.array:
    # As integers the bits of positive floats have the order of the floats, with infinity and then NaN
    # at the end, and MLX compares and reduces integers several times faster than 16-bit floats.
    return bits & ((1 << (8 * bits.dtype.size - 1)) - 1)


def _codes(block: mx.array, divisors: mx.array) -> mx.array:
    """Return the E2M1 codes of the elements over their divisors, uint8 of the same shape."""
    import mlx.core as mx

    joined = None
    if block.dtype == mx.bfloat16:
        bits = _bits(block / divisors)
    else:
        # All that a code depends on is kept by the upper half of the float32 and whether there is
        # anything in the lower, because the midpoints have nothing there. Rounded to float16, a quotient
        # in float32 is the quotient in float16: division is safe from rounding twice.
        quotients = _bits(block.astype(mx.float32) / divisors.astype(mx.float32))
        if block.dtype == mx.float16:
            # A quotient up to half a unit of float16 above a midpoint is rounded down to it. What lies
            # below that half wraps around to the bits of NaN, which are as good as zero: code 0.
            quotients = quotients - (1 << 12)
        else:
            joined = _joined_by_rounding(quotients)
        lower = quotients.astype(mx.uint16)
        bits = (quotients >> 16).astype(mx.uint16) | (lower != 0)
    magnitudes = _magnitudes(bits)

    def above(number: float) -> mx.array:
        return (magnitudes > _upper_bits(number)).view(mx.uint8)

    codes = above(_MIDPOINTS[0])
    for midpoint in _MIDPOINTS[1:]:
        codes = codes + above(midpoint)
    if joined is not None:
        codes = codes - joined
    codes = codes * (magnitudes <= _upper_bits(_ALL_ALIKE)).view(mx.uint8)
    # Code 8 is never taken: minus zero is as far from an element as zero, whose code is lower.
    negative = (bits > 0x7FFF).view(mx.uint8) * (codes > 0).view(mx.uint8)
    return codes + 8 * negative


def _joined_by_rounding(quotients: mx.array) -> mx.array:
    """Return by how much the codes of these bits of float32 fall short of 7 far above the midpoints.

    The distances themselves are rounded, which joins some of them before _ALL_ALIKE joins all, in the
    quotients that are odd in their last place. Above 2^25 that place is worth 4: the distances to 2, 3,
    4 and 6 become one, and the code is 4. Above 2^26 it is 8: those to 4 and 6 do, and it is 6. At
    2^25 + 4 the distance to 6 is below 2^25, where places are finer, and stands alone.
    """
    import mlx.core as mx

    magnitudes = _magnitudes(quotients)
    above_25 = (magnitudes > _upper_bits(2.0**25) * 0x1_0000 + 1).view(mx.uint8)
    above_26 = (magnitudes > _upper_bits(2.0**26) * 0x1_0000).view(mx.uint8)
    return (quotients.astype(mx.uint8) & 1) * (3 * above_25 - 2 * above_26)


def _upper_bits(number: float) -> int:
    """Return the bits of bfloat16, which are the upper half of those of float32."""
    return int.from_bytes(struct.pack(">f", number)[:2])


def _packed(codes: mx.array) -> mx.array:
    """Return the codes, uint8, as uint32 words of eight, the first in the lowest bits."""
    import mlx.core as mx

    # Two bytes, the high nibble of each empty, are folded into the lower byte.
    pairs = codes.view(mx.uint16)
    return (pairs | (pairs >> 4)).astype(mx.uint8).view(mx.uint32)
