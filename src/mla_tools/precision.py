"""How much of K is lost when its packed rows are decoded, transposed and encoded again.

The figures are root mean squares over the norm of K, for normally distributed weights; benchmarks/embed_q.py
measures them. Real weights are near to normal, so the figures compare choices and are not exact.
"""

from __future__ import annotations

import math

from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType

__all__ = ["expected_error"]

# Group size -> root mean square of the range (largest minus smallest) of so many standard normal numbers.
_RANGES = {32: 4.20, 64: 4.78, 128: 5.34}

# The modes that have no free scale.
_BLOCK_FLOATS = {"mxfp4": 0.115, "mxfp8": 0.0267, "nvfp4": 0.095}

# Codes of a block-float mode are almost at the points of another group's: (source, target).
_ON_THE_GRID = {
    ("mxfp4", "mxfp4"): 0.0167,
    ("mxfp4", "mxfp8"): 0.0,
    ("mxfp4", "nvfp4"): 0.0495,
    ("mxfp8", "mxfp8"): 0.0,
    ("nvfp4", "mxfp8"): 0.021,
}

# One rounding to a dtype, and what mx.dequantize does in it: the code times the scale is rounded
# before the bias, which is larger than most sums, is added.
_ROUNDED = {DType.BF16: 0.0016, DType.F16: 0.0002, DType.F32: 0.0}
_DECODED = {DType.BF16: 0.0045, DType.F16: 0.0006, DType.F32: 0.0}

# Below, the source's few values are nothing like normally distributed.
_LEAST_BITS = 4


def expected_error(
    source: QuantSpec, target: QuantSpec | None, dtype: DType, *, decoded_in_dtype: bool = True
) -> float | None:
    """Return the expected error of K, as a part of its norm, or None for what was not measured.

    `source` is the encoding of kv_b_proj, `target` that of embed_q, None for floats. `dtype` is that of
    the decoded numbers and of affine scales. `decoded_in_dtype`: they are those of `mx.dequantize`
    where the source is affine with scales of that dtype, and not decoded in float32 and rounded once.
    """
    if dtype not in _ROUNDED or source.bits < _LEAST_BITS:
        return None
    # Each number of a block-float mode is one of each float dtype.
    decoding = (_DECODED if decoded_in_dtype else _ROUNDED)[dtype] if source.mode == "affine" else 0.0
    if target is None:
        return decoding
    if (source.mode, target.mode) in _ON_THE_GRID:
        return _ON_THE_GRID[source.mode, target.mode]
    if target.mode != "affine":
        return math.hypot(_BLOCK_FLOATS[target.mode], decoding)
    # Uniform within steps of range / (2^bits - 1); the scales and biases are rounded as well.
    step = _RANGES[target.group_size] / (2**target.bits - 1)
    return math.hypot(step / math.sqrt(12), decoding, _DECODED[dtype])
