"""What MLX computes slowly on a CPU, in fewer or cheaper steps and to the same bits.

For mxfp4 and nvfp4 MLX has no kernel on a CPU: it lays the distances to all 16 code points out beside
every element and takes the smallest. Here the code is read off the bits of the same quotient by comparing
them with the seven midpoints between neighbouring code points. The scales come from MLX's own operations
in the dtype of the weight, one for each group, so that what they make of infinities and NaN is the same on
every platform. For affine codes and for E4M3 it has kernels that take one element after the other, and a
table is looked up more slowly still; here numbers are put together from operations on whole arrays. This
module can be imported without mlx.

Source: experiments with mlx 0.32.4, with the graph that its `quantize` builds, mlx/ops.cpp and
mlx/backend/cpu/quantized.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "AFFINE_BLOCK",
    "BLOCK",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "encode_affine",
    "encode_mxfp4",
    "encode_nvfp4",
]

# The magnitudes of E2M1, in the order of their codes.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# These lie halfway between them; a tie goes to the lower code, which is towards zero for either sign.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

# The largest magnitude of E2M1: the scale of a group is what brings its largest element here.
_LARGEST = 6.0

# MLX takes the distances of nvfp4 in float32. There 6 is less than half a unit in the last place of
# anything above 2^27: all code points are equally far, and the tie goes to code 0. An infinite or
# missing quotient is as far from all of them in every dtype.
_ALL_ALIKE = 2.0**27

# Elements that are encoded together: the temporaries of one block stay in the caches.
BLOCK = 1 << 18

# Those of affine codes: more of them, because the operations are fewer and cheaper.
AFFINE_BLOCK = 1 << 19

# Added to a float32 from 0 to 2^22, this rounds it, halves to even, and leaves the number in the low bits.
_ROUNDING = 1.5 * 2**23

# What MLX takes for the scale of a group whose elements are all alike.
_LEAST_SCALE = 1e-7


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


def encode_affine(array: mx.array, group_size: int, bits: int) -> dict[str, mx.array]:
    """Return the weight, scales and biases of `array` in affine codes of so many bits, evaluated.

    [..., width] bfloat16, float16 or float32 becomes weight [..., width * bits / 32] uint32, scales and
    biases [..., width / group_size] in the dtype of `array`. The bits are those of
    `mx.quantize(array, group_size, bits)` on a CPU, which makes them where `array` holds NaN or infinity.
    Raises ValueError for another dtype, fewer than two axes, or a width that the group does not divide.
    """
    import mlx.core as mx

    _refuse(array, group_size)
    if array.ndim < 2:
        raise ValueError(f"an array of shape {array.shape} has no rows to be encoded")
    groups = mx.contiguous(array).reshape(-1, group_size)
    bounds = _bounds(groups)
    if bounds is None:
        parts = dict(zip(("weight", "scales", "biases"), mx.quantize(array, group_size, bits), strict=True))
        mx.eval(parts)
        return parts
    scales, biases = _affine_scales(*bounds, top=2**bits - 1)
    words: list[mx.array] = []
    for start in range(0, len(groups), AFFINE_BLOCK // group_size):
        rows = slice(start, start + AFFINE_BLOCK // group_size)
        quotients = (groups[rows].astype(mx.float32) - biases[rows]) / scales[rows]
        # Below 8 bits what is one more than the largest code fits into a byte, too.
        codes = (quotients + _ROUNDING).view(mx.uint32).astype(mx.uint16 if bits == 8 else mx.uint8)
        if words:
            mx.eval(words[-1])
        words.append(_joined_bits(mx.minimum(codes, 2**bits - 1).astype(mx.uint8), bits))
    *head, width = array.shape
    parts = {
        "weight": _joined(words, mx.uint32).reshape(*head, width * bits // 32),
        "scales": scales.astype(array.dtype).reshape(*head, width // group_size),
        "biases": biases.astype(array.dtype).reshape(*head, width // group_size),
    }
    mx.eval(parts)
    return parts


def _bounds(groups: mx.array) -> tuple[mx.array, mx.array] | None:
    """Return the largest and the smallest element of each group, or None if one of them is not finite."""
    import mlx.core as mx

    # The bits of floats are in order as signed integers if they are positive, and in the opposite order
    # as unsigned ones if they are negative; MLX reduces integers several times faster than floats.
    bits = _bits(groups)
    signed = bits.view(mx.int32 if bits.dtype.size == 4 else mx.int16)
    sign = 1 << (8 * bits.dtype.size - 1)
    largest = mx.max(signed, axis=-1, keepdims=True).view(bits.dtype)
    smallest = mx.max(bits, axis=-1, keepdims=True)
    alike = mx.any(largest >= sign) | mx.any(smallest < sign)
    infinity = _bits(mx.array(math.inf, groups.dtype))
    unfit = mx.any(_magnitudes(largest) >= infinity) | mx.any(_magnitudes(smallest) >= infinity)
    mx.eval(largest, smallest, alike, unfit)
    if unfit.item():
        return None
    if alike.item():
        # Where all have the same sign, one bound is what lies nearest to zero.
        nearest = mx.min(bits, axis=-1, keepdims=True)
        largest = mx.where(largest < sign, largest, nearest)
        smallest = mx.where(smallest < sign, nearest, smallest)
    return largest.view(groups.dtype).astype(mx.float32), smallest.view(groups.dtype).astype(mx.float32)


def _affine_scales(largest: mx.array, smallest: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """Return the scales and biases of groups in float32, step for step as MLX's kernel makes them."""
    import mlx.core as mx

    below = mx.abs(smallest) > mx.abs(largest)
    scales = mx.maximum((largest - smallest) / top, _LEAST_SCALE)
    scales = mx.where(below, scales, -scales)
    # The end that is farther from zero is hit exactly.
    end = mx.where(below, smallest, largest)
    steps = mx.round(end / scales)
    return mx.where(steps == 0, scales, end / steps), mx.where(steps == 0, 0.0, end)


def _joined_bits(codes: mx.array, bits: int) -> mx.array:
    """Return codes, uint8, as words of uint32 without gaps, the first in the lowest bits."""
    import mlx.core as mx

    held = bits
    while held <= 4:
        # Two bytes with room for each other: the second's bits are moved into the first.
        pairs = codes.view(mx.uint16)
        codes = (pairs | (pairs >> (8 - held))).astype(mx.uint8)
        held *= 2
    if held == 8:
        return codes.view(mx.uint32)
    for lane in (mx.uint16, mx.uint32, mx.uint64):
        # Two lanes as one of twice the width, in which the second's bits lie above the first's.
        pairs, below = codes.view(lane), (1 << held) - 1
        codes = (pairs & below) | ((pairs >> (4 * lane.size - held)) & (below << held))
        held *= 2
    octets = codes.view(mx.uint8).reshape(*codes.shape, 8)[..., : held // 8]
    return mx.contiguous(octets.reshape(len(codes), -1)).view(mx.uint32)


def decode_e4m3(codes: mx.array) -> mx.array:
    """Return the numbers of E4M3 codes, uint8, in float32: those of `mx.from_fp8`, any NaN for NaN."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.gpu:  # which has no numbers as small as these below
        return mx.from_fp8(codes, dtype=mx.float32)
    # With its sign moved up, E4M3 is a bfloat16 of 2^-120 times its size. Copies of the sign fill the
    # bits above when the byte is widened, and all but the first are masked. S.1111.111 is NaN: adding
    # one carries into bit 7, and 255 times that are the exponent bits.
    small = ((codes.view(mx.int8).astype(mx.int16) << 4) & -0x7810).view(mx.uint16)
    nan = (((codes & 0x7F) + 1) & 0x80).astype(mx.uint16) * 0xFF
    return (small | nan).view(mx.bfloat16).astype(mx.float32) * 2.0**120


def decode_e2m1(packed: mx.array) -> mx.array:
    """Return in float32 the numbers of E2M1 codes, two in each uint8, the lower first: twice the width."""
    import mlx.core as mx

    pairs = packed.astype(mx.uint16)
    codes = ((pairs | (pairs << 4)) & 0x0F0F).view(mx.uint8)
    if mx.default_device().type == mx.DeviceType.gpu:  # as above
        return mx.array([*_E2M1, *(-number for number in _E2M1)], mx.float32)[codes]
    # As a bfloat16 of 2^-126 times its size: S at bit 15, EEM at 6 to 8, where nothing overlaps.
    return ((codes.astype(mx.uint16) * 0x1040) & 0x81C0).view(mx.bfloat16).astype(mx.float32) * 2.0**126


def decode_e8m0(codes: mx.array) -> mx.array:
    """Return in float32, which holds all of them, the powers of two that E8M0 bytes mean; 255 is NaN."""
    import mlx.core as mx

    # The byte is float32's exponent, but for 0, which is subnormal there, and 255.
    bits = [0x400000, *(byte << 23 for byte in range(1, 255)), 0x7FC00000]
    return mx.array(bits, dtype=mx.uint32).view(mx.float32)[codes]


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

    _refuse(array, group_size)
    count = array.size // group_size
    groups = array.reshape(count, group_size)
    words: list[mx.array] = []
    scales: list[mx.array] = []
    for start in range(0, count, BLOCK // group_size):
        block = groups[start : start + BLOCK // group_size]
        if words:
            # One block after the other, or MLX would begin several and hold their temporaries.
            (block,) = mx.depends([block], [words[-1]])
        largest = mx.max(_magnitudes(_bits(block)), axis=-1, keepdims=True).view(array.dtype)
        block_scales, divisors = scaling(largest / _LARGEST)
        words.append(_joined_bits(_codes(block, divisors), 4))
        scales.append(block_scales)
    rows, width = array.shape[:-1], array.shape[-1]
    return {
        "weight": _joined(words, mx.uint32).reshape(*rows, width // 8),
        "scales": _joined(scales, mx.uint8).reshape(*rows, width // group_size),
    }


def _refuse(array: mx.array, group_size: int) -> None:
    import mlx.core as mx

    if array.dtype not in (mx.bfloat16, mx.float16, mx.float32):
        raise ValueError(f"an array of {array.dtype} cannot be encoded; bfloat16, float16 and float32 can")
    if array.ndim == 0 or array.shape[-1] % group_size:
        raise ValueError(f"group size {group_size} does not divide the last axis of shape {array.shape}")


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
