"""What the integer formats mean, in numpy and position by position: the truth that the codecs are held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

__all__ = ["AWQ_COLUMNS", "awq", "compressed", "gptq", "narrow", "pack", "unpack"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

# Which column of its word each nibble of AWQ is, lowest nibble first.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: Array, bits: int) -> NDArray[np.int32]:
    """Return rows of codes as rows of words, the first code in the lowest bits."""
    rows, width = codes.shape
    count = 32 // bits
    words = np.zeros((rows, -(-width // count)), np.uint32)
    for k in range(width):
        words[:, k // count] |= codes[:, k].astype(np.uint32) << np.uint32(bits * (k % count))
    return words.view(np.int32)


def unpack(words: Array, bits: int) -> Array:
    """Return the codes of rows of words, those of a last word that is not full too."""
    count = 32 // bits
    codes = np.zeros((words.shape[0], words.shape[1] * count), np.int64)
    for k in range(codes.shape[1]):
        codes[:, k] = (words[:, k // count].astype(np.int64) >> (bits * (k % count))) & (2**bits - 1)
    return codes


def _awq_codes(words: Array) -> Array:
    nibbles = unpack(words, 4)
    codes = np.zeros_like(nibbles)
    for n in range(nibbles.shape[1]):
        codes[:, n - n % 8 + AWQ_COLUMNS[n % 8]] = nibbles[:, n]
    return codes


def _values(codes: Array, zeros: Array, scales: Array) -> Floats:
    """Return (code - zero) * scale for codes [rows, width], the others [rows, groups]."""
    group = codes.shape[1] // scales.shape[1]
    values = np.zeros(codes.shape, np.float32)
    for i in range(codes.shape[1]):
        g = i // group
        values[:, i] = (codes[:, i] - zeros[:, g]).astype(np.float32) * scales[:, g].astype(np.float32)
    return values


def compressed(parts: Mapping[str, Array], bits: int, width: int) -> Floats:
    """Return what `_packed`, `_scale` and maybe `_zero_point` mean, [out, in]."""
    codes = unpack(parts["_packed"], bits)[:, :width]
    scales = parts["_scale"]
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if "_zero_point" in parts:
        zeros = unpack(parts["_zero_point"].T, bits).T[: codes.shape[0]]
    return _values(codes, zeros, scales)


def awq(parts: Mapping[str, Array]) -> Floats:
    """Return what `qweight`, `qzeros` and `scales` of AWQ mean, [out, in]."""
    return _values(_awq_codes(parts["qweight"]).T, _awq_codes(parts["qzeros"]).T, parts["scales"].T)


def gptq(parts: Mapping[str, Array], bits: int, subtracted: int) -> Floats:
    """Return what `qweight`, `qzeros` and `scales` of GPTQ mean, [out, in]."""
    zeros = unpack(parts["qzeros"], bits) + subtracted
    return _values(unpack(parts["qweight"].T, bits), zeros.T, parts["scales"].T)


def narrow(values: Floats, dtype: mx.Dtype) -> Floats:
    """Return float32 numbers rounded once to another dtype, in float32 again."""
    return np.array(mx.array(values).astype(dtype).astype(mx.float32))
