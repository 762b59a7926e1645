"""compressed-tensors pack-quantized against loops over positions, number by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import compressed, narrow, pack
from native import mlx_form
from numpy.typing import NDArray

from mla_tools.codecs import Claim, MlxQuantized, Module, Native, repacking
from mla_tools.codecs.compressed_int import SAMPLES, CompressedInt, claim
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

Parts = dict[str, NDArray[Any]]

# bits, rows, width, group: rows that do not fill a word of zero points, rows of codes that do not fill
# their last word, groups that MLX has, multiples of them, none of them, and one scale per row.
CASES = [
    (4, 8, 64, 32),
    (4, 13, 128, 64),
    (4, 3, 256, 128),
    (4, 9, 512, 256),
    (4, 5, 96, 96),
    (4, 7, 64, 16),
    (4, 6, 20, 20),
    (4, 1, 160, 160),
    (8, 8, 64, 32),
    (8, 5, 384, 384),
    (8, 7, 48, 16),
    (8, 6, 22, 22),
]
# Any other: groups of any even size, the last word of a row full or not.
ANY_CASE = st.builds(
    lambda bits, rows, half, count: (bits, rows, 2 * half * count, 2 * half),
    st.sampled_from([4, 8]),
    st.integers(1, 19),
    st.integers(1, 80),
    st.integers(1, 4),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
each_kind = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
_FLOAT = {DType.BF16: mx.bfloat16, DType.F16: mx.float16, DType.F32: mx.float32}


def stored(case: tuple[int, int, int, int], *, symmetric: bool, dtype: DType = DType.BF16) -> Parts:
    """Return random parts; the scales, as float32, are numbers of `dtype`."""
    bits, rows, width, group = case
    rng = np.random.default_rng(bits * rows + width)
    scales = rng.standard_normal((rows, width // group)).astype(np.float32)
    parts: Parts = {
        "_packed": pack(rng.integers(0, 2**bits, (rows, width)), bits),
        "_scale": narrow(scales, _FLOAT[dtype]),
        "_shape": np.array([rows, width], np.int64),
    }
    if not symmetric:
        zeros = rng.integers(0, 2**bits, (rows, width // group))
        parts["_zero_point"] = pack(zeros.T, bits).T
    return parts


def claimed(parts: Mapping[str, NDArray[Any]], width: int, dtype: DType = DType.BF16) -> Claim:
    dtypes = {"_scale": dtype, "_shape": DType.I64}
    leaves = {f"weight{part}": Spec(a.shape, dtypes.get(part, DType.I32)) for part, a in parts.items()}
    (found,) = claim(Module(leaves, width, {}))
    assert found.parts == {part: f"weight{part}" for part in parts}
    return found


def cut(
    codec: CompressedInt, parts: Parts, start: int, stop: int, dtype: DType = DType.BF16
) -> dict[str, mx.array]:
    """Return the rows that the codec asks for, as a conversion reads them."""
    rows = {
        part: mx.array(np.ascontiguousarray(parts[part][a:b])) for part, (a, b) in _rows(codec, start, stop)
    }
    return {**rows, "_scale": rows["_scale"].astype(_FLOAT[dtype])}


def _rows(codec: CompressedInt, start: int, stop: int) -> list[tuple[str, tuple[int, int]]]:
    return list(codec.cut(start, stop).items())


def codec_of(case: tuple[int, int, int, int], *, symmetric: bool, dtype: DType = DType.BF16) -> CompressedInt:
    return CompressedInt(case[0], case[3], symmetric, dtype)


@each_case
@each_kind
def test_decode_is_code_less_zero_times_scale(case: tuple[int, int, int, int], symmetric: bool) -> None:
    parts = stored(case, symmetric=symmetric)
    found = claimed(parts, case[2])
    codec = codec_of(case, symmetric=symmetric)
    assert (found.leaf, found.spec, found.codec) == ("weight", Spec(case[1:3], DType.BF16), codec)
    got = codec.decode(cut(codec, parts, 0, case[1]), 0, case[1], DType.F32)
    truth = compressed(parts, case[0], case[2])
    assert np.array_equal(np.array(got), truth)
    for dtype in (DType.BF16, DType.F16):
        rounded = codec.decode(cut(codec, parts, 0, case[1]), 0, case[1], dtype)
        assert rounded.dtype == _FLOAT[dtype]
        assert np.array_equal(np.array(rounded.astype(mx.float32)), narrow(truth, _FLOAT[dtype]))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CASES) | ANY_CASE, st.booleans(), st.data())
def test_any_rows_are_those_of_the_whole(
    case: tuple[int, int, int, int], symmetric: bool, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, case[1] - 1))
    stop = data.draw(st.integers(start + 1, case[1]))
    parts, codec = stored(case, symmetric=symmetric), codec_of(case, symmetric=symmetric)
    held = cut(codec, parts, start, stop)
    truth = compressed(parts, case[0], case[2])
    assert np.array_equal(np.array(codec.decode(held, start, stop, DType.F32)), truth[start:stop])
    if codec.native is not None:
        assert np.array_equal(
            dequantized(codec.to_native(held, start, stop), codec.native), truth[start:stop]
        )


def dequantized(parts: Mapping[str, mx.array], form: Native) -> NDArray[Any]:
    """Return what MLX computes from parts in float32."""
    spec = form.spec
    scales, biases = (parts[part].astype(mx.float32) for part in ("scales", "biases"))
    return np.array(mx.dequantize(parts["weight"], scales, biases, spec.group_size, spec.bits))


KEPT = [(16, None), (20, None), (32, 32), (48, None), (64, 64), (96, 32), (128, 128), (192, 64), (7168, 128)]


@pytest.mark.parametrize(("group", "wanted"), KEPT)
@pytest.mark.parametrize("bits", [4, 8])
@each_kind
def test_the_form_kept_has_the_largest_group_that_divides(
    group: int, wanted: int | None, bits: int, symmetric: bool
) -> None:
    kept = CompressedInt(bits, group, symmetric, DType.F16).native
    dtype = DType.F16 if symmetric else DType.F32
    assert kept == (Native(QuantSpec("affine", bits, wanted), dtype) if wanted else None)


@each_case
@each_kind
@pytest.mark.parametrize("dtype", list(_FLOAT), ids=lambda dtype: dtype.name)
def test_kept_numbers_are_the_same_numbers(
    case: tuple[int, int, int, int], symmetric: bool, dtype: DType
) -> None:
    codec = codec_of(case, symmetric=symmetric, dtype=dtype)
    parts = stored(case, symmetric=symmetric, dtype=dtype)
    held = cut(codec, parts, 0, case[1], dtype)
    if codec.native is None:
        with pytest.raises(TypeError, match="MLX has no form of int"):
            codec.to_native(held, 0, case[1])
        return
    made = codec.to_native(held, 0, case[1])
    specs = mlx_form(codec.native).encoded(Spec(case[1:3], dtype))
    assert {part: array.shape for part, array in made.items()} == {p: s.shape for p, s in specs.items()}
    assert np.array_equal(np.array(made["weight"]).view(np.int32), parts["_packed"])
    kept = codec.native.dtype
    assert made["scales"].dtype == made["biases"].dtype == _FLOAT[kept]
    truth = compressed(parts, case[0], case[2])
    if dtype is not DType.F32:
        assert np.array_equal(dequantized(made, codec.native), truth)
    else:
        # A code times a scale of 24 bits is more than float32 holds: MLX rounds it before it adds the
        # bias, and a zero point times such a scale is rounded too. A symmetric bias is exact.
        assert np.allclose(dequantized(made, codec.native), truth, rtol=0, atol=2**-13)
        half = np.array(made["scales"]) * -np.float32(2 ** (case[0] - 1))
        assert np.array_equal(np.array(made["biases"]), half) == symmetric


@each_kind
def test_a_narrower_target_rounds_each_bias_once(symmetric: bool) -> None:
    case = (4, 13, 128, 64)
    codec, parts = codec_of(case, symmetric=symmetric), stored(case, symmetric=symmetric)
    repack = repacking(codec, MlxQuantized(QuantSpec("affine", 4, 64), DType.BF16, True))
    assert repack is not None
    held = cut(codec, parts, 0, 13)
    made, exact = repack(held, 0, 13), codec.to_native(held, 0, 13)
    assert made["scales"].dtype == made["biases"].dtype == mx.bfloat16
    assert mx.array_equal(made["scales"], held["_scale"]).item()
    assert mx.array_equal(made["biases"], exact["biases"].astype(mx.bfloat16)).item()
    assert mx.array_equal(made["biases"], exact["biases"]).item() == symmetric


def test_no_other_form_is_reached_without_decoding() -> None:
    codec = CompressedInt(4, 64, True, DType.BF16)
    for spec in (QuantSpec("affine", 8, 64), QuantSpec("affine", 4, 32), QuantSpec("mxfp4")):
        assert repacking(codec, MlxQuantized(spec, DType.BF16, spec.has_biases)) is None


def test_words_for_people() -> None:
    assert CompressedInt(4, 32, True, DType.BF16).name == "int4 g32"
    assert CompressedInt(8, None, True, DType.BF16).name == "int8 rows"
    assert CompressedInt(4, 64, False, DType.BF16).name == "int4 g64 asymmetric"


# --- samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_encoding_loses_at_most_half_a_step(name: str) -> None:
    codec = SAMPLES[name].codec
    assert isinstance(codec, CompressedInt)
    array = mx.random.normal((13, 192), key=mx.random.key(3)).astype(mx.bfloat16)
    parts = codec.encode(array)
    specs = codec.encoded(Spec((13, 192), DType.BF16))
    for part, spec in specs.items():
        assert (parts[part].shape, parts[part].dtype) == (spec.shape, getattr(mx, spec.dtype.mlx))
    assert parts["_shape"].tolist() == [13, 192]
    numbers = {part: np.array(value.astype(mx.float32)) for part, value in parts.items() if part == "_scale"}
    numbers |= {part: np.array(value) for part, value in parts.items() if part != "_scale"}
    truth = compressed(numbers, codec.bits, 192)
    step = np.repeat(numbers["_scale"], 192 // numbers["_scale"].shape[1], 1)
    # The scale is rounded to bf16, which moves the ends of the range.
    room = 0.5 + 2 ** (codec.bits - 1) * 2**-8
    assert (np.abs(truth - np.array(array.astype(mx.float32))) <= step * room).all()


# --- claims ------------------------------------------------------------------------------------------

PACKED, SCALE, SHAPE = Spec((2048, 896), DType.I32), Spec((2048, 224), DType.BF16), Spec((2,), DType.I32)
KIMI = {"weight_packed": PACKED, "weight_scale": SCALE, "weight_shape": SHAPE}
ZERO = Spec((256, 224), DType.I32)


def module(width: int | None = 7168, **changed: Spec | None) -> Module:
    leaves = {leaf: spec for leaf, spec in {**KIMI, **changed}.items() if spec is not None}
    return Module(leaves, width, {})


def test_the_parts_of_kimi_k2_are_one_tensor() -> None:
    (found,) = claim(module())
    assert found.codec == CompressedInt(4, 32, True, DType.BF16)
    assert found.spec == Spec((2048, 7168), DType.BF16)
    assert sorted(found.parts.values()) == sorted(KIMI)
    assert "_shape" not in found.codec.cut(0, 8)


@pytest.mark.parametrize("shape", [None, SHAPE, Spec((2,), DType.I64)])
def test_the_shape_may_be_missing_or_of_either_width(shape: Spec | None) -> None:
    (found,) = claim(module(weight_shape=shape))
    assert ("_shape" in found.parts) == (shape is not None)


def test_bits_follow_from_the_width() -> None:
    (found,) = claim(module(3584))
    assert found.codec == CompressedInt(8, 16, True, DType.BF16)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(Module({}, None, {}), id="nothing"),
        pytest.param(module(None), id="unknown_width"),
        pytest.param(module(weight_packed=None), id="no_codes"),
        pytest.param(module(weight_packed=Spec((2048, 3584), DType.U8)), id="packed_floats"),
    ],
)
def test_other_modules_are_left_alone(found: Module) -> None:
    assert claim(found) == []


REFUSED = [
    pytest.param(module(weight_scale=None), "weight_packed has no weight_scale", id="no_scale"),
    pytest.param(
        module(weight_g_idx=Spec((7168,), DType.I32)), "weight_g_idx.*activation order", id="act_order"
    ),
    pytest.param(module(weight_scale=Spec((2048, 224), DType.F8_E4M3)), "weight_scale is F8_E4M3", id="fp8"),
    pytest.param(module(weight_scale=Spec((1,), DType.BF16)), "must have two axes", id="one_scale"),
    pytest.param(module(weight_packed=Spec((2, 2048, 896), DType.I32)), "must have two axes", id="axes"),
    pytest.param(module(1000), "does not hold rows of 1000 codes of 4 or 8 bits", id="bits"),
    pytest.param(
        module(4, weight_packed=Spec((2048, 1), DType.I32), weight_scale=Spec((2048, 1), DType.BF16)),
        "rows of 4 codes of 4 or 8 bits and not of both",
        id="both",
    ),
    pytest.param(module(weight_scale=Spec((2048, 225), DType.BF16)), "equal groups", id="groups"),
    pytest.param(
        module(weight_scale=Spec((2047, 224), DType.BF16)), r"weight_scale is.*2047.*needs.*2048", id="rows"
    ),
    pytest.param(module(weight_shape=Spec((3,), DType.I64)), r"weight_shape is I64 \[3\].*needs", id="shape"),
    pytest.param(
        module(weight_zero_point=Spec((2048, 224), DType.I8)),
        r"weight_zero_point is I8 \[2048, 224\].*needs I32 \[256, 224\]",
        id="unpacked_zeros",
    ),
    pytest.param(
        module(weight_zero_point=Spec((255, 224), DType.I32)), r"needs I32 \[256, 224\]", id="zero_rows"
    ),
]


@pytest.mark.parametrize(("found", "text"), REFUSED)
def test_parts_that_do_not_fit_are_refused_with_the_numbers(found: Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        claim(found)


def test_zero_points_make_a_tensor_asymmetric() -> None:
    (found,) = claim(module(weight_zero_point=ZERO))
    assert found.codec == CompressedInt(4, 32, False, DType.BF16)
    assert found.codec.cut(13, 20)["_zero_point"] == (1, 3)
