"""`kernels` against MLX's own operations on the CPU, bit for bit.

Every comparison is made on the CPU, whose bits are the ones promised, whatever the default device is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tools import kernels, quantization
from mla_tools.kernels import decode_e2m1, decode_e4m3, encode_affine, encode_mxfp4, encode_nvfp4
from mla_tools.quantization import MODES as MODES_OF_MLX
from mla_tools.quantization import QuantSpec, quantize

Encode = Callable[[mx.array], dict[str, mx.array]]
ENCODERS: dict[str, Encode] = {"mxfp4": encode_mxfp4, "nvfp4": encode_nvfp4}
GROUP = {"mxfp4": 32, "nvfp4": 16}
# What fills a group of either mode, and two of nvfp4, which is what `mx.quantize` needs.
WIDTH = 32
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

MODES = pytest.mark.parametrize("mode", list(ENCODERS))
FLOATS = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])

MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with mx.stream(mx.cpu):
        yield


def normal(shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(7))


def word(dtype: mx.Dtype) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if dtype.size == 2 else np.uint32


def floats(bits: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(np.ascontiguousarray(bits.astype(word(dtype)))).view(dtype)


def bits_of(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = mx.array(values.astype(np.float32)).astype(dtype)
    return np.array(array.view(mx.uint16 if dtype.size == 2 else mx.uint32))


def check(array: mx.array, mode: str) -> None:
    ours = ENCODERS[mode](array)
    theirs = dict(zip(("weight", "scales"), mx.quantize(array, mode=mode), strict=True))
    assert ours.keys() == theirs.keys()
    for part, expected in theirs.items():
        assert (ours[part].dtype, ours[part].shape) == (expected.dtype, expected.shape)
        wrong = np.flatnonzero(np.array(ours[part] != expected))
        if len(wrong):
            per = (GROUP[mode] if part == "scales" else 8) * int(wrong[0])
            start = per // GROUP[mode] * GROUP[mode]
            group = array.reshape(-1)[start : start + GROUP[mode]].astype(mx.float32).tolist()
            raise AssertionError(f"{mode} {part} differ in {len(wrong)} places, first in the group {group}")


# ---- exhaustively


@MODES
@SIXTEEN_BITS
def test_every_value_is_the_largest_of_a_group(mode: str, dtype: mx.Dtype) -> None:
    # Of either sign, infinities and every NaN among them, alone in its group and beside smaller ones.
    bits = np.zeros((65536, WIDTH), np.uint16)
    bits[:, 0] = bits[:, 16] = np.arange(65536)
    fractions = np.random.default_rng(0).uniform(-1, 1, (65536, 6))
    largest = np.array(floats(np.arange(65536), dtype).astype(mx.float32))
    with np.errstate(all="ignore"):
        bits[:, 3:9] = bits[:, 20:26] = bits_of(np.nan_to_num(largest)[:, None] * fractions, dtype)
    check(floats(bits, dtype), mode)


def maxima(mode: str, dtype: mx.Dtype) -> list[float]:
    """Return largest elements that give scales of every kind: exact, rounded, least, most, zero."""
    return {
        "mxfp4": [6.0, 6.03125, 12.0 * 2.0**-9, 5.0, 2.0**-13 * 3],
        "nvfp4": [6.0, 0.0117, 0.0068, 0.0053, 6 * 1.125, 6 * 1.875, 0.047, 3000.0, 60000.0],
    }[mode] + ([] if dtype == mx.float16 else [2.0**-120, 1.1 * 2.0**100, 2.0**39])


@MODES
@SIXTEEN_BITS
def test_every_value_is_an_element_of_a_group(mode: str, dtype: mx.Dtype) -> None:
    every = np.arange(32768)
    for largest in maxima(mode, dtype):
        top = int(bits_of(np.array(largest), dtype))
        # Everything up to the largest, of either sign: all codes that a group of this scale can have.
        below = every[every <= top]
        bits = np.zeros(-(-len(below) * 2 // 15) * 15, np.int64)
        bits[: len(below)], bits[len(below) : 2 * len(below)] = below, below | 0x8000
        groups = np.insert(bits.reshape(-1, 15), 7, top, axis=1)
        if mode == "mxfp4":
            groups = np.tile(groups, 2)
        check(floats(groups[: len(groups) // 2 * 2].reshape(-1, WIDTH), dtype), mode)
        check(floats(groups[-2:].reshape(-1, WIDTH), dtype), mode)


@FLOATS
def test_every_scale_of_nvfp4_with_everything_near_a_midpoint(dtype: mx.Dtype) -> None:
    scales = np.array(mx.from_fp8(mx.arange(127, dtype=mx.uint8), mx.float32))
    edges = np.array([*MIDPOINTS, -2.5, -0.25])
    for offset in range(-4, 5):
        near = bits_of(scales[:, None] * edges, dtype).astype(np.int64)
        near = np.where(near & ~(1 << (8 * dtype.size - 1)), near + offset, near)
        groups = np.zeros((127, 16), np.int64)
        groups[:, : len(edges)], groups[:, 15] = near, bits_of(scales * 6, dtype)
        check(floats(np.tile(groups, 2), dtype), "nvfp4")


@FLOATS
def test_every_scale_of_mxfp4_with_everything_near_a_midpoint(dtype: mx.Dtype) -> None:
    exponents = np.arange(-24, 14) if dtype == mx.float16 else np.arange(-149, 126)
    scales = np.ldexp(1.0, exponents)
    edges = np.array([*MIDPOINTS, -1.75, -0.25])
    for offset in range(-4, 5):
        near = bits_of(scales[:, None] * edges, dtype).astype(np.int64)
        near = np.where(near & ~(1 << (8 * dtype.size - 1)), near + offset, near)
        groups = np.zeros((len(scales), 32), np.int64)
        groups[:, : len(edges)] = near
        # The largest itself on either side of the place where the next power of two is taken.
        groups[:, 31] = np.maximum(bits_of(scales * 6, dtype).astype(np.int64) + offset, 0)
        check(floats(groups, dtype), "mxfp4")


def test_nvfp4_beyond_its_scales() -> None:
    # The scale stops at 448. From about 2^25 times that on, MLX's distances in float32 are rounded
    # onto one another, and which code wins depends on the last bit of the quotient.
    for exponent in range(20, 30):
        quotients = np.ldexp(1.0, exponent).astype(np.float32).view(np.uint32) + np.arange(-200, 4000)
        x = (quotients.astype(np.uint32).view(np.float32) * np.float32(448)).view(np.uint32)
        groups = np.resize(np.concatenate([x, x | 0x8000_0000]), (600, WIDTH))
        check(floats(groups, mx.float32), "nvfp4")
    check(floats(np.arange(0x4500, 0x7F80).repeat(WIDTH).reshape(-1, WIDTH), mx.bfloat16), "nvfp4")


# ---- random groups


@MODES
@FLOATS
def test_random_bits(mode: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(1)
    for low, high in ((0, 1 << (8 * dtype.size)), (0, 1 << (8 * dtype.size - 4))):
        check(floats(rng.integers(low, high, (4000, WIDTH)), dtype), mode)


@MODES
@FLOATS
def test_random_weights_of_every_size(mode: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(2)
    sizes = 10.0 ** rng.uniform(
        -9 if dtype == mx.float16 else -44, 4 if dtype == mx.float16 else 38, (6000, 1)
    )
    check(floats(bits_of(rng.standard_normal((6000, WIDTH)) * sizes, dtype), dtype), mode)
    ordinary = rng.standard_normal((6000, WIDTH)) * 10.0 ** rng.uniform(-4, 1, (6000, 1))
    check(floats(bits_of(ordinary, dtype), dtype), mode)


SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 6e-8, 1e-30, 3e38, -3e38]


@MODES
@FLOATS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_groups_with_anything_in_them(mode: str, dtype: mx.Dtype, data: st.DataObject) -> None:
    element = st.one_of(
        st.sampled_from(SPECIAL),
        st.sampled_from([*LEVELS, *MIDPOINTS]).map(lambda value: -value),
        st.sampled_from([*LEVELS, *MIDPOINTS]),
        st.floats(-10, 10, width=32),
        st.floats(width=32),
    )
    values = np.array(data.draw(st.lists(element, min_size=WIDTH, max_size=WIDTH)), np.float32)
    exponents = np.array(data.draw(st.lists(st.integers(-24, 24), min_size=8, max_size=8)))
    with np.errstate(all="ignore"):
        rows = values * np.ldexp(np.float32(1), exponents)[:, None].astype(np.float32)
        nans = np.where(np.arange(WIDTH) % 5 == 2, -np.float32(np.nan), rows)
    check(floats(bits_of(np.concatenate([rows, nans]), dtype), dtype), mode)


@MODES
@FLOATS
def test_nothing_but_zeros(mode: str, dtype: mx.Dtype) -> None:
    check(mx.zeros((2, 64), dtype), mode)
    check(-mx.zeros((2, 64), dtype), mode)


# ---- shapes, blocks, laziness


@MODES
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (2, 3, 96), (2, 1, 3, 160)], ids=str)
def test_shapes(mode: str, shape: tuple[int, ...]) -> None:
    check(normal(shape).astype(mx.bfloat16), mode)


@MODES
@FLOATS
@pytest.mark.parametrize("groups", [1, 3, 7])
def test_blocks_do_not_show(mode: str, dtype: mx.Dtype, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", groups * GROUP[mode])
    check(normal((5, 11, 96)).astype(dtype), mode)


@MODES
def test_an_array_of_more_than_one_block(mode: str) -> None:
    check(normal((9, kernels.BLOCK // 8 + 32)).astype(mx.bfloat16), mode)


@MODES
def test_views_are_read_as_they_stand(mode: str) -> None:
    array = normal((64, 3, 96)).astype(mx.bfloat16)
    check(array.T, mode)
    check(array[::2, 1, 32:], mode)
    check(mx.broadcast_to(array[:1], (4, 3, 96)), mode)


@MODES
def test_one_axis_and_one_group(mode: str) -> None:
    # Neither of which mx.quantize takes in nvfp4.
    array = normal((GROUP[mode],)).astype(mx.bfloat16)
    parts = ENCODERS[mode](array)
    weight, scales = mx.quantize(mx.stack([array, array]), mode=mode)
    assert mx.array_equal(parts["weight"], weight[0])
    assert mx.array_equal(parts["scales"], scales[0])


@MODES
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 32), (3, 0)], ids=str)
def test_nothing_is_encoded_as_nothing(mode: str, shape: tuple[int, ...]) -> None:
    parts = ENCODERS[mode](mx.zeros(shape))
    assert parts["weight"].shape == (*shape[:-1], shape[-1] // 8)
    assert parts["scales"].shape == (*shape[:-1], shape[-1] // GROUP[mode])
    assert (parts["weight"].dtype, parts["scales"].dtype) == (mx.uint32, mx.uint8)


@MODES
def test_refusals(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"group size {GROUP[mode]} does not divide .* \(2, 40\)"):
        ENCODERS[mode](mx.zeros((2, 40)))
    with pytest.raises(ValueError, match="does not divide"):
        ENCODERS[mode](mx.array(1.0))
    with pytest.raises(ValueError, match="int32 cannot be encoded"):
        ENCODERS[mode](mx.zeros((2, 32), mx.int32))


@MODES
def test_the_result_is_lazy(mode: str) -> None:
    array = normal((1024, 1024)).astype(mx.bfloat16)
    mx.eval(array)
    before = mx.get_active_memory()
    parts = ENCODERS[mode](array)
    assert mx.get_active_memory() - before < 100_000
    mx.eval(parts)
    assert mx.get_active_memory() - before > 500_000


@MODES
def test_threads_with_streams_of_their_own(mode: str) -> None:
    array = normal((256, 512)).astype(mx.bfloat16)
    expected, _ = mx.quantize(array, mode=mode)
    mx.eval(array, expected)

    def work(_: int) -> np.ndarray:
        with mx.stream(mx.new_stream(mx.cpu)):
            return np.array(ENCODERS[mode](array)["weight"])

    with ThreadPoolExecutor(2) as pool:
        assert all(np.array_equal(result, np.array(expected)) for result in pool.map(work, range(8)))


# ---- affine


AFFINE = pytest.mark.parametrize(
    ("bits", "group"), [(bits, group) for bits in MODES_OF_MLX["affine"][0] for group in (32, 64, 128)]
)


def check_affine(array: mx.array, bits: int = 4, group: int = 32) -> None:
    ours = encode_affine(array, group, bits)
    theirs = dict(zip(("weight", "scales", "biases"), mx.quantize(array, group, bits), strict=True))
    assert ours.keys() == theirs.keys()
    for part, expected in theirs.items():
        assert (ours[part].dtype, ours[part].shape) == (expected.dtype, expected.shape)
        # As bytes: NaN is not equal to itself.
        assert np.array_equal(octets(ours[part]), octets(expected)), part


def octets(array: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(array).view(mx.uint8))


def finite(bits: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return the floats of these bits, 1 in the place of those that are none."""
    array = floats(bits, dtype)
    return mx.where(mx.isfinite(array), array, mx.array(1, dtype))


@AFFINE
@FLOATS
def test_affine_of_ordinary_weights(bits: int, group: int, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(bits * group)
    sizes = 10.0 ** rng.uniform(-4, 1, (400, 1))
    check_affine(floats(bits_of(rng.standard_normal((400, 384)) * sizes, dtype), dtype), bits, group)


@SIXTEEN_BITS
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_with_every_value_at_an_end_of_a_group(bits: int, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    ends = finite(np.arange(65536), dtype)
    wide = np.array(ends.astype(mx.float32))[:, None]
    between = floats(bits_of(wide * rng.uniform(-1, 1, (65536, WIDTH - 1)), dtype), dtype)
    check_affine(mx.concatenate([ends[:, None], between], axis=1), bits)
    # One sign only, so that zero lies outside of the group.
    check_affine(mx.concatenate([ends[:, None], between.abs() * mx.sign(ends)[:, None]], axis=1), bits)


@AFFINE
def test_affine_with_quotients_in_the_middle_between_two_codes(bits: int, group: int) -> None:
    rng = np.random.default_rng(3)
    quarters = rng.integers(-(2**bits) * 2, 2**bits * 2 + 1, (300, 128)) / 4
    check_affine(mx.array(quarters, mx.float32), bits, group)
    check_affine(mx.array(quarters, mx.bfloat16), bits, group)


@FLOATS
def test_affine_of_finite_numbers_of_any_size(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(4)
    for high in (1 << (8 * dtype.size), 1 << (8 * dtype.size - 1), 1 << (8 * dtype.size - 4)):
        check_affine(finite(rng.integers(0, high, (2000, WIDTH)), dtype))
    check_affine(-finite(rng.integers(0, 1 << (8 * dtype.size - 1), (2000, WIDTH)), dtype))


@FLOATS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_affine_of_groups_with_anything_in_them(dtype: mx.Dtype, data: st.DataObject) -> None:
    numbers = st.one_of(st.sampled_from([0.0, -0.0, 1e-45, 3e38, -3e38, 1e-8]), st.floats(width=32))
    few = data.draw(st.lists(numbers, min_size=1, max_size=6))
    rows = np.resize(np.array(few, np.float32), (2, 64))
    rows[1, 32:] = np.abs(rows[1, 32:])
    check_affine(floats(bits_of(rows, dtype), dtype), data.draw(st.sampled_from([2, 3, 4, 5, 6, 8])))


@FLOATS
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, -0.5, 3e-8, -3e-8])
def test_affine_of_groups_whose_elements_are_all_alike(value: float, dtype: mx.Dtype) -> None:
    check_affine(mx.full((3, 64), value, dtype))


@FLOATS
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_left_to_mlx(value: str, dtype: mx.Dtype) -> None:
    array = normal((64, 64)).astype(dtype)
    array[5, 7] = float(value)
    check_affine(array)


@pytest.mark.parametrize(
    "shape", [(1, 32), (3, 64), (2, 3, 96), (2, 1, 3, 160), (0, 64), (2, 0, 32)], ids=str
)
def test_affine_shapes(shape: tuple[int, ...]) -> None:
    check_affine(normal(shape).astype(mx.bfloat16))


@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("bits", [3, 4])
def test_affine_blocks_do_not_show(bits: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AFFINE_BLOCK", groups * 32)
    check_affine(normal((5, 11, 96)).astype(mx.bfloat16), bits)


def test_affine_of_more_than_one_block() -> None:
    check_affine(normal((9, kernels.AFFINE_BLOCK // 8 + 32)).astype(mx.bfloat16))


def test_affine_of_views() -> None:
    array = normal((64, 3, 96)).astype(mx.bfloat16)
    for view in (array.T, array[::2, 1, 32:], mx.broadcast_to(array[:1], (4, 3, 96))):
        check_affine(view)


def test_affine_refusals() -> None:
    for array, message in (
        (mx.zeros((2, 40)), r"group size 32 does not divide .* \(2, 40\)"),
        (mx.zeros((64,)), r"shape \(64,\) has no rows"),
        (mx.zeros((2, 32), mx.int32), "int32 cannot be encoded"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_affine(array, 32, 4)


def test_affine_in_threads_with_streams_of_their_own() -> None:
    array = normal((256, 512)).astype(mx.bfloat16)
    expected, *_ = mx.quantize(array, 64, 4)
    mx.eval(array, expected)

    def work(_: int) -> np.ndarray:
        with mx.stream(mx.new_stream(mx.cpu)):
            return np.array(encode_affine(array, 64, 4)["weight"])

    with ThreadPoolExecutor(2) as pool:
        assert all(np.array_equal(result, np.array(expected)) for result in pool.map(work, range(8)))


# ---- E4M3 and E2M1


def test_every_code_of_e4m3_is_the_number_of_mlx_and_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    numbers = np.array(decode_e4m3(mx.array(codes)))
    assert np.array_equal(numbers, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)
    assert np.array_equal(numbers, np.array(mx.from_fp8(mx.array(codes), mx.float32)), equal_nan=True)
    assert np.array_equal(np.signbit(numbers), codes >= 128)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_pair_of_codes_of_e2m1_is_that_of_ml_dtypes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(mx.DeviceType, device)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(2, 256)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    numbers = np.array(decode_e2m1(mx.array(packed)))
    assert np.array_equal(numbers.view(np.uint32), expected.view(np.uint32))


def test_a_gpu_decodes_e4m3_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    monkeypatch.setattr(mx, "from_fp8", lambda codes, dtype: (codes, dtype))
    codes = mx.array([1], mx.uint8)
    assert decode_e4m3(codes) == (codes, mx.float32)


# ---- quantize


@pytest.mark.parametrize(
    ("spec", "device", "ours"),
    [
        (QuantSpec("mxfp4"), mx.DeviceType.cpu, True),
        (QuantSpec("nvfp4"), mx.DeviceType.cpu, True),
        (QuantSpec("mxfp8"), mx.DeviceType.cpu, False),
        (QuantSpec(), mx.DeviceType.cpu, False),
        (QuantSpec("mxfp4"), mx.DeviceType.gpu, False),
        (QuantSpec("nvfp4"), mx.DeviceType.gpu, False),
    ],
    ids=lambda value: str(value).split(".")[-1],
)
def test_who_quantizes(
    spec: QuantSpec, device: mx.DeviceType, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = normal((2, 64)).astype(mx.bfloat16)
    expected = mx.quantize(array, spec.group_size, spec.bits, mode=spec.mode)
    calls: list[str] = []

    def noting(mode: str) -> Encode:
        return lambda array: calls.append(mode) or ENCODERS[mode](array)

    monkeypatch.setattr(quantization, "_CPU_ENCODERS", {mode: noting(mode) for mode in ENCODERS})
    # Which device MLX computes on stays as it is: this machine may have no other.
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    parts = quantize(array, spec)
    assert calls == [spec.mode] * ours
    assert all(map(mx.array_equal, parts.values(), expected))


@MODES
def test_quantize_refuses_as_before(mode: str) -> None:
    for array in (mx.zeros((64,)), mx.zeros((2, 40)), mx.zeros((2, 64), mx.int32)):
        with pytest.raises(ValueError):
            quantize(array, QuantSpec(mode))
