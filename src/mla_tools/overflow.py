"""Finite numbers that become infinite on the way: they end a conversion, infinities of the source do not.

float16 ends at 65,504, and bfloat16 a little before float32. Arrays are scanned for infinities, which takes
about a millisecond for eight million numbers of 16 bits; only where there is one, it is asked whether the
source holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mla_tools.errors import MlaToolsError
from mla_tools.spec import DType

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["floats_of", "holds_infinity", "is_narrower", "refuse_far_apart", "refuse_infinite"]

Parts = Mapping[str, "mx.array"]

# The largest finite number of each float dtype: all bits of the mantissa are ones.
LARGEST = {
    DType.F16: (2 - 2**-10) * 2.0**15,
    DType.BF16: (2 - 2**-7) * 2.0**127,
    DType.F32: (2 - 2**-23) * 2.0**127,
}

# The bits of infinity, by whether it is one of float16 and the bytes that it has.
_INFINITY = {(True, 2): 0x7C00, (False, 2): 0x7F80, (False, 4): 0x7F800000}

# Numbers that are compared together: what is made of them stays in the caches.
_BLOCK = 1 << 17

# The next dtype for numbers that are too large for one.
_WIDER = {DType.F16: (DType.BF16, DType.F32), DType.BF16: (DType.F32,), DType.F32: ()}


def is_narrower(dtype: DType, other: DType) -> bool:
    """Return whether a finite number of the float dtype `other` can be infinite in `dtype`."""
    return dtype in LARGEST and other in LARGEST and LARGEST[dtype] < LARGEST[other]


def holds_infinity(array: mx.array) -> bool:
    """Return whether there is an infinity in a float array; evaluates it."""
    import mlx.core as mx
    import numpy as np

    if not array.size:
        return False
    width = array.dtype.size
    bits = np.array(array.view(mx.uint32 if width == 4 else mx.uint16), copy=False).reshape(-1)
    infinity, sign = _INFINITY[array.dtype == mx.float16, width], 1 << (8 * width - 1)
    # As signed integers the bits of floats are in order from zero up to infinity and NaN, and as unsigned
    # ones so are those of negative floats, above all others. numpy finds the largest of integers several
    # times faster than MLX, and far faster than either looks at floats of 16 bits.
    if bits.view(f"i{width}").max() < infinity and bits.max() < infinity | sign:
        return False
    blocks = (bits[start : start + _BLOCK] for start in range(0, bits.size, _BLOCK))
    return any(((block & (sign - 1)) == infinity).any() for block in blocks)


def floats_of(parts: Parts) -> dict[str, mx.array]:
    """Return the parts that are floats: scales and biases, or the numbers themselves."""
    import mlx.core as mx

    return {part: array for part, array in parts.items() if mx.issubdtype(array.dtype, mx.floating)}


def refuse_infinite(
    held: Parts, dtype: DType, make: Callable[[Parts, DType], dict[str, mx.array]], what: str
) -> None:
    """Raise MlaToolsError if a finite number becomes infinite in what `make(held, dtype)` returns.

    `held` are the parts of a source, `dtype` that of the floats that are made, and `what` the word for
    them. Evaluates what it needs.
    """
    import mlx.core as mx

    infinite = {part: mx.isinf(array) for part, array in floats_of(make(held, dtype)).items()}
    stored = floats_of(held)
    if any(map(holds_infinity, stored.values())):
        # With ones in place of what is finite, there is infinity only where the source has it. Codes and
        # scales in bytes can stay: none of them is infinite.
        ones = {part: mx.where(mx.isinf(array), array, mx.ones_like(array)) for part, array in stored.items()}
        own = make({**held, **ones}, dtype)
        infinite = {part: where & mx.isfinite(own[part]) for part, where in infinite.items()}
    if not any(mx.any(where).item() for where in infinite.values()):
        return
    exact = make(held, DType.F32)
    largest = max(_largest(exact[part], where) for part, where in infinite.items())
    wider = next((wider for wider in _WIDER[dtype] if _fits(largest, wider)), None)
    if wider is None:
        raise MlaToolsError(
            f"{what} become infinite even in float32, which ends at {_text(LARGEST[DType.F32])}; "
            "the checkpoint is damaged"
        )
    raise MlaToolsError(
        f"{what} as large as {_text(largest)} become infinite in {dtype.mlx}, which ends at "
        f"{_text(LARGEST[dtype])}; use --dtype {wider.mlx}"
    )


def refuse_far_apart(array: mx.array, parts: Parts) -> None:
    """Raise MlaToolsError if the finite numbers of a group have a scale or a bias that is infinite.

    `parts` are the encoded array: MLX takes the difference of two numbers in float32. Evaluates both.
    """
    import mlx.core as mx

    for encoded in floats_of(parts).values():
        if not holds_infinity(encoded):
            continue
        groups = array.reshape(*encoded.shape, -1)
        finite = mx.all(mx.isfinite(groups), axis=-1)
        if mx.any(finite & mx.isinf(encoded)).item():
            raise MlaToolsError(
                f"numbers as large as {_text(_largest(groups, finite[..., None]))} lie too far apart to be "
                "quantized together"
            )


def _largest(array: mx.array, where: mx.array) -> float:
    """Return the largest magnitude of a float array in the places in question."""
    import mlx.core as mx
    import numpy as np

    return float(np.array(mx.max(mx.where(where, mx.abs(array.astype(mx.float32)), 0))))


def _fits(number: float, dtype: DType) -> bool:
    """Return whether a number of float32 stays finite when it is rounded to a dtype."""
    import mlx.core as mx

    return bool(mx.isfinite(mx.array(number, mx.float32).astype(getattr(mx, dtype.mlx))).item())


def _text(number: float) -> str:
    return f"{number:,.0f}" if 65_000 < number < 66_000 else f"{number:.4g}"
