"""FP8 in blocks of 128 x 128 against numpy and ml_dtypes, bit for bit."""

from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mla_tools.codecs.codec import Module
from mla_tools.codecs.fp8 import Fp8Block, claim
from mla_tools.spec import DType, Spec

Floats = NDArray[np.float32]

# Whole blocks, ragged ones below, to the right and at both edges, and tensors smaller than a block.
SHAPES = [(128, 128), (256, 384), (192, 256), (256, 200), (320, 144), (129, 257), (1, 1), (5, 300), (130, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def scales_shape(shape: tuple[int, int]) -> tuple[int, int]:
    return (shape[0] + 127) // 128, (shape[1] + 127) // 128


def stored(shape: tuple[int, int], seed: int = 0) -> tuple[NDArray[np.uint8], Floats]:
    """Return random codes, the two NaNs among them, and random scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = rng.lognormal(-6, 3, scales_shape(shape)).astype(np.float32)
    return codes, scales


def truth(codes: NDArray[np.uint8], scales: Floats) -> Floats:
    """Return what the codes and scales mean, block by block."""
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for i in range(scales.shape[0]):
        for k in range(scales.shape[1]):
            values[i * 128 : (i + 1) * 128, k * 128 : (k + 1) * 128] *= scales[i, k]
    return values


def decode(
    codes: NDArray[np.uint8], scales: Floats, start: int, stop: int, dtype: DType = DType.F32
) -> mx.array:
    codec = Fp8Block()
    cut = codec.cut(start, stop)
    whole = {"weight": codes, "_scale_inv": scales}
    parts = {part: mx.array(whole[part][first:last]) for part, (first, last) in cut.items()}
    return codec.decode(parts, start, stop, dtype)


def bits(array: mx.array) -> NDArray[np.uint8]:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def same_numbers(left: Floats, right: Floats) -> bool:
    """Return whether the bits are the same, but for those of NaNs, which must be in the same places."""
    nan = np.isnan(left)
    return np.array_equal(nan, np.isnan(right)) and np.array_equal(
        left[~nan].view(np.uint32), right[~nan].view(np.uint32)
    )


@each_shape
def test_decode_is_code_times_scale(shape: tuple[int, int]) -> None:
    codes, scales = stored(shape)
    assert same_numbers(np.array(decode(codes, scales, 0, shape[0])), truth(codes, scales))


@each_shape
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda dtype: dtype.name)
def test_narrow_dtypes_are_rounded_once(shape: tuple[int, int], dtype: DType) -> None:
    codes, scales = stored(shape)
    narrow = ml_dtypes.bfloat16 if dtype is DType.BF16 else np.float16
    with np.errstate(over="ignore"):
        wanted = truth(codes, scales).astype(narrow).astype(np.float32)
    got = decode(codes, scales, 0, shape[0], dtype)
    assert got.dtype == getattr(mx, dtype.mlx)
    assert same_numbers(np.array(got.astype(mx.float32)), wanted)


def test_all_256_codes() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    scales = np.ones((1, 2), np.float32)
    values = np.array(decode(codes, scales, 0, 1))[0]
    assert same_numbers(
        values, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    assert np.flatnonzero(np.isnan(values)).tolist() == [0x7F, 0xFF]
    assert np.nanmax(values) == 448
    assert np.signbit(values[0x80])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.data())
def test_any_rows_are_those_of_the_whole(shape: tuple[int, int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    codes, scales = stored(shape)
    whole = decode(codes, scales, 0, shape[0])
    assert np.array_equal(bits(decode(codes, scales, start, stop)), bits(whole[start:stop]))


@given(st.integers(0, 2000), st.integers(1, 2000))
def test_cut_takes_the_scale_rows_that_the_rows_touch_and_no_more(start: int, count: int) -> None:
    cut = Fp8Block().cut(start, start + count)
    assert cut["weight"] == (start, start + count)
    touched = {row // 128 for row in range(start, start + count)}
    assert list(range(*cut["_scale_inv"])) == sorted(touched)


@each_shape
def test_parts_of_a_tensor(shape: tuple[int, int]) -> None:
    assert Fp8Block().encoded(Spec(shape, DType.BF16)) == {
        "weight": Spec(shape, DType.F8_E4M3),
        "_scale_inv": Spec(scales_shape(shape), DType.F32),
    }
    assert Fp8Block().name == "fp8 128x128"
    assert Fp8Block().quantized


@each_shape
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
def test_encoding_loses_at_most_half_a_step(shape: tuple[int, int], size: float) -> None:
    rng = np.random.default_rng(1)
    array = (rng.standard_normal(shape) * size).astype(np.float32)
    parts = Fp8Block().encode(mx.array(array))
    assert {part: Spec(tuple(a.shape), _DTYPES[a.dtype]) for part, a in parts.items()} == (
        Fp8Block().encoded(Spec(shape, DType.BF16))
    )
    scales = np.array(parts["_scale_inv"])
    again = np.array(Fp8Block().decode(parts, 0, parts["weight"].shape[0], DType.F32))
    # 3 bits of mantissa: half a step is 2^-4 of the number, or 2^-10 scales where numbers are subnormal.
    per_value = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    allowed = np.maximum(np.abs(array) * 2**-4, per_value * 2**-10)
    assert (np.abs(again - array) <= allowed * (1 + 1e-5)).all()


_DTYPES = {mx.uint8: DType.F8_E4M3, mx.float32: DType.F32}


def test_the_largest_number_of_a_block_becomes_the_largest_code() -> None:
    array = mx.zeros((130, 130))
    array[0, 0], array[129, 129] = -7.0, 0.25
    parts = Fp8Block().encode(array)
    codes = np.array(parts["weight"])
    assert (codes[0, 0], codes[129, 129]) == (0xFE, 0x7E)
    assert not np.isnan(np.array(Fp8Block().decode(parts, 0, parts["weight"].shape[0], DType.F32))).any()


def test_what_was_encoded_is_encoded_to_the_same_bits_again() -> None:
    parts = Fp8Block().encode(mx.random.normal((200, 150), key=mx.random.key(0)))
    again = Fp8Block().encode(Fp8Block().decode(parts, 0, parts["weight"].shape[0], DType.F32))
    assert mx.array_equal(again["weight"], parts["weight"]).item()


# --- claims ------------------------------------------------------------------------------------------


def module(
    weight: Spec, scales: Spec | None, leaf: str = "weight", quantization: dict[str, object] | None = None
) -> Module:
    leaves = {leaf: weight}
    if scales is not None:
        leaves[f"{leaf}_scale_inv"] = scales
    return Module(leaves, 7168, quantization or {})


CODES, SCALES = Spec((576, 7168), DType.F8_E4M3), Spec((5, 56), DType.F32)


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.U8], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("leaf", ["weight", "other"])
@pytest.mark.parametrize("section", [{}, {"weight_block_size": [128, 128], "quant_method": "fp8"}])
def test_codes_with_their_scales_are_one_tensor(dtype: DType, leaf: str, section: dict[str, object]) -> None:
    (found,) = claim(module(Spec(CODES.shape, dtype), SCALES, leaf, section))
    assert (found.leaf, found.spec, found.codec) == (leaf, Spec(CODES.shape, DType.BF16), Fp8Block())
    assert found.parts == {"weight": leaf, "_scale_inv": f"{leaf}_scale_inv"}


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(module(CODES, None), id="no_scales"),
        pytest.param(module(Spec(CODES.shape, DType.BF16), SCALES), id="no_codes"),
        pytest.param(Module({"weight_scale_inv": SCALES}, 7168, {}), id="scales_alone"),
        pytest.param(Module({}, None, {}), id="nothing"),
    ],
)
def test_other_modules_are_left_alone(found: Module) -> None:
    assert claim(found) == []


REFUSED = [
    pytest.param(module(CODES, Spec((4, 56), DType.F32)), r"\[4, 56\].*\[576, 7168\].*\[5, 56\]", id="rows"),
    pytest.param(module(CODES, Spec((5, 57), DType.F32)), r"\[5, 57\].*\[5, 56\]", id="columns"),
    pytest.param(module(CODES, Spec((280,), DType.F32)), r"\[280\].*\[5, 56\]", id="axes"),
    pytest.param(module(Spec((2, 576, 7168), DType.U8), SCALES), r"\[2, 576, 7168\]", id="three_axes"),
    pytest.param(
        module(CODES, SCALES, quantization={"weight_block_size": [64, 64]}),
        r"\[9, 112\] in blocks of 64x64",
        id="block_size",
    ),
]


@pytest.mark.parametrize(("found", "text"), REFUSED)
def test_parts_that_do_not_fit_are_refused_with_the_numbers(found: Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        claim(found)
