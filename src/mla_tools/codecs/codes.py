"""Integer codes in words of 32 bits, and the affine form in which MLX holds codes, scales and zero points."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mla_tools.codecs.codec import Native
from mla_tools.quantization import MODES, QuantSpec
from mla_tools.spec import DType

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["FLOATS", "affine", "affine_form", "dequantized", "pack", "steps", "unpack"]

# What scales are stored in.
FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})


def unpack(words: mx.array, bits: int) -> mx.array:
    """Return the codes of [rows, words] of 32 bits as [rows, codes] in uint8, the lowest bits first.

    `bits` is 4 or 8.
    """
    import mlx.core as mx

    octets = mx.contiguous(words).view(mx.uint8)
    if bits == 8:
        return octets
    return mx.stack([octets & 15, octets >> 4], axis=-1).reshape(words.shape[0], -1)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Return codes [rows, codes] in uint8 as [rows, words] in uint32, padded with zeros; undoes `unpack`."""
    import mlx.core as mx

    codes = mx.pad(codes, [(0, 0), (0, -codes.shape[1] % (32 // bits))])
    octets = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    return mx.contiguous(octets).view(mx.uint32)


@cache
def affine_form(bits: int, group: int | None, dtype: DType) -> Native | None:
    """Return the affine form of codes that share a scale in groups: the largest of MLX's that divides them.

    None where MLX has none, and for a group of unknown length.
    """
    sizes = [size for size in MODES["affine"][1] if group and group % size == 0]
    return Native(QuantSpec("affine", bits, max(sizes)), dtype) if sizes else None


def affine(words: mx.array, scales: mx.array, zeros: mx.array | None, form: Native) -> dict[str, mx.array]:
    """Return MLX's parts for words [rows, words], scales and zero points [rows, groups].

    MLX computes code * scale + bias, so the bias is -zero * scale. Without `zeros` the zero point is
    half the range, a power of two, and the bias exact in the dtype of the scales. Otherwise it needs
    the bits of both factors: it is exact in the float32 of the form for scales of 16 bits, and
    a plan with a narrower dtype says "rounded".
    """
    import mlx.core as mx

    width = words.shape[1] * 32 // form.spec.bits
    if zeros is None:
        biases = scales * -(2 ** (form.spec.bits - 1))
    else:
        scales = scales.astype(mx.float32)
        biases = -(zeros.astype(mx.float32) * scales)
    times = form.spec.groups(width) // scales.shape[1]
    return {
        "weight": words.view(mx.uint32),
        "scales": mx.repeat(scales, times, axis=1),
        "biases": mx.repeat(biases, times, axis=1),
    }


def dequantized(codes: mx.array, scales: mx.array, zeros: mx.array | int, dtype: DType) -> mx.array:
    """Return (code - zero) * scale, rounded once from float32: codes [rows, width], the rest [rows, groups].

    With scales of 16 bits the float32 numbers are exact.
    """
    import mlx.core as mx

    rows, groups = scales.shape
    if not isinstance(zeros, int):
        zeros = zeros.astype(mx.float32)[..., None]
    values = codes.reshape(rows, groups, -1).astype(mx.float32) - zeros
    values = values * scales.astype(mx.float32)[..., None]
    return values.reshape(rows, -1).astype(getattr(mx, dtype.mlx))


def steps(
    array: mx.array, bits: int, group: int, dtype: DType, *, symmetric: bool, least: int = 0
) -> tuple[mx.array, mx.array, mx.array]:
    """Return codes [rows, width], scales and zero points [rows, groups]: simple rounding, for samples.

    Codes and zero points are uint8; a symmetric zero point is half the range, others are `least` or more.
    """
    import mlx.core as mx

    top = 2**bits - 1
    values = array.astype(mx.float32).reshape(array.shape[0], -1, group)
    if symmetric:
        span = 2 * mx.abs(values).max(axis=-1)
    else:
        span = mx.maximum(values.max(axis=-1), 0) - mx.minimum(values.min(axis=-1), 0)
    # The smallest normal number of float16: a scale of zero would divide by zero.
    scales = mx.maximum(span / top, 2**-14).astype(getattr(mx, dtype.mlx))
    wide = scales.astype(mx.float32)
    if symmetric:
        zeros = mx.full(wide.shape, 2 ** (bits - 1))
    else:
        zeros = mx.clip(mx.round(-mx.minimum(values.min(axis=-1), 0) / wide), least, top)
    codes = mx.clip(mx.round(values / wide[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(array.shape).astype(mx.uint8), scales, zeros.astype(mx.uint8)
