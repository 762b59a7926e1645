"""GPTQ against loops over positions: both checkpoint formats, and what only the data can tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import gptq, narrow, pack
from native import mlx_form
from numpy.typing import NDArray

from mla_tools.codecs import MlxQuantized, Module, awq, repacking
from mla_tools.codecs.gptq import SAMPLES, Gptq, claim
from mla_tools.errors import MlaToolsError
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

Parts = dict[str, NDArray[Any]]

# bits, rows (out), width (in), group
CASES = [
    (4, 8, 64, 64),
    (4, 24, 128, 32),
    (4, 16, 512, 256),
    (4, 8, 48, 16),
    (8, 12, 128, 64),
    (8, 4, 96, 96),
]
# Any other, in whole words of eight codes of 4 bits or four of 8, on both axes.
ANY_CASE = st.builds(
    lambda bits, rows, words, count: (
        bits,
        32 // bits * rows,
        32 // bits * words * count,
        32 // bits * words,
    ),
    st.sampled_from([4, 8]),
    st.integers(1, 5),
    st.integers(1, 24),
    st.integers(1, 4),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))

# sym, what was subtracted from the zero points
KINDS = [(True, 1), (True, 0), (False, 1), (False, 0)]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["sym", "sym-v2", "asym", "asym-v2"])


def codec_of(case: tuple[int, ...], kind: tuple[bool, int]) -> Gptq:
    bits, _, width, group = case
    return Gptq(bits, group, kind[0], kind[1], DType.F16, width)


def stored(case: tuple[int, ...], kind: tuple[bool, int]) -> Parts:
    bits, rows, width, group = case
    symmetric, subtracted = kind
    rng = np.random.default_rng(rows + width)
    zeros = rng.integers(subtracted, 2**bits, (width // group, rows))
    if symmetric:
        zeros = np.full_like(zeros, 2 ** (bits - 1))
    return {
        "qweight": np.ascontiguousarray(pack(rng.integers(0, 2**bits, (rows, width)), bits).T),
        "qzeros": pack(zeros - subtracted, bits),
        "scales": rng.standard_normal((width // group, rows)).astype(np.float16),
        "g_idx": (np.arange(width) // group).astype(np.int32),
    }


def module(parts: Parts, width: int | None, **section: object) -> Module:
    dtypes = {"int32": DType.I32, "float16": DType.F16}
    return Module({p: Spec(a.shape, dtypes[str(a.dtype)]) for p, a in parts.items()}, width, section)


def cut(codec: Gptq, parts: Parts, start: int, stop: int) -> dict[str, mx.array]:
    """Return the rows that the codec asks for as a conversion reads them: with two axes."""
    two = {part: array.reshape(-1, array.shape[-1]) for part, array in parts.items()}
    return {part: mx.array(two[part][a:b]) for part, (a, b) in codec.cut(start, stop).items()}


def dequantized(parts: dict[str, mx.array], form: MlxQuantized) -> NDArray[Any]:
    scales, biases = (parts[part].astype(mx.float32) for part in ("scales", "biases"))
    return np.array(mx.dequantize(parts["weight"], scales, biases, form.spec.group_size, form.spec.bits))


@each_case
@each_kind
def test_decode_is_code_less_zero_times_scale(case: tuple[int, ...], kind: tuple[bool, int]) -> None:
    bits, rows, width, _ = case
    parts, codec = stored(case, kind), codec_of(case, kind)
    section = {"sym": kind[0], "checkpoint_format": "gptq" if kind[1] else "gptq_v2"}
    (found,) = claim(module(parts, width, **section))
    assert (found.leaf, found.spec, found.codec) == ("weight", Spec((rows, width), DType.F16), codec)
    assert found.parts == {part: part for part in parts}
    held, truth = cut(codec, parts, 0, rows), gptq(parts, bits, kind[1])
    assert np.array_equal(np.array(codec.decode(held, 0, rows, DType.F32)), truth)
    for dtype in (DType.BF16, DType.F16):
        wanted = narrow(truth, getattr(mx, dtype.mlx))
        narrowed = codec.decode(held, 0, rows, dtype)
        assert narrowed.dtype == getattr(mx, dtype.mlx)
        assert np.array_equal(np.array(narrowed.astype(mx.float32)), wanted)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CASES) | ANY_CASE, st.sampled_from(KINDS), st.booleans(), st.data())
def test_any_rows_are_those_of_the_whole(
    case: tuple[int, ...], kind: tuple[bool, int], g_idx: bool, data: st.DataObject
) -> None:
    bits, rows, width, _ = case
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    parts, codec = stored(case, kind), replace(codec_of(case, kind), g_idx=g_idx)
    held, truth = cut(codec, parts, start, stop), gptq(parts, bits, kind[1])[start:stop]
    assert ("g_idx" in held) == g_idx
    assert np.array_equal(np.array(codec.decode(held, start, stop, DType.F32)), truth)
    if codec.native is not None:
        made = codec.to_native(held, start, stop)
        specs = mlx_form(codec.native).encoded(Spec((stop - start, width), DType.F16))
        found = {part: Spec(array.shape, specs[part].dtype) for part, array in made.items()}
        assert found == specs
        assert made["biases"].dtype == made["scales"].dtype == getattr(mx, codec.native.dtype.mlx)
        assert np.array_equal(np.array(made["weight"]).view(np.int32), parts["qweight"].T[start:stop])
        assert np.array_equal(dequantized(made, codec.native), truth)


@each_kind
def test_a_narrower_target_rounds_each_bias_once(kind: tuple[bool, int]) -> None:
    case = (4, 24, 128, 32)
    parts, codec = stored(case, kind), codec_of(case, kind)
    held = cut(codec, parts, 0, 24)
    repack = repacking(codec, MlxQuantized(QuantSpec("affine", 4, 32), DType.F16, True))
    assert repack is not None
    made, exact = repack(held, 0, 24), codec.to_native(held, 0, 24)
    assert mx.array_equal(made["scales"], held["scales"].T).item()
    assert mx.array_equal(made["biases"], exact["biases"].astype(mx.float16)).item()
    assert mx.array_equal(made["biases"], exact["biases"]).item() == kind[0]


def test_groups_that_mlx_lacks_are_decoded() -> None:
    codec = Gptq(4, 16, False, 1, DType.F16, 48)
    assert codec.native is None
    with pytest.raises(TypeError, match="MLX has no form of gptq 4-bit g16"):
        codec.to_native({}, 0, 8)


# --- what only the data can tell ---------------------------------------------------------------------


def refusal(codec: Gptq, parts: Parts) -> str:
    """Return what decode and keep say when they refuse; both must say the same."""
    held = cut(codec, parts, 0, 8)
    said = set()
    with pytest.raises(MlaToolsError) as error:
        codec.decode(held, 0, 8, DType.F32)
    said.add(str(error.value))
    with pytest.raises(MlaToolsError) as error:
        codec.to_native(held, 0, 8)
    said.add(str(error.value))
    (text,) = said
    return text


@each_kind
def test_columns_in_the_order_of_activations_are_refused(kind: tuple[bool, int]) -> None:
    case = (4, 24, 128, 32)
    parts = stored(case, kind)
    parts["g_idx"][[3, 100]] = parts["g_idx"][[100, 3]]
    assert refusal(codec_of(case, kind), parts).startswith("act-order (g_idx) is not supported")


@pytest.mark.parametrize("subtracted", [0, 1])
def test_zero_points_that_are_not_symmetric_are_refused_where_config_says_so(subtracted: int) -> None:
    # What a checkpoint of one format looks like that is labelled as the other.
    case = (4, 24, 128, 32)
    parts = stored(case, (True, 1 - subtracted))
    text = refusal(codec_of(case, (True, subtracted)), parts)
    assert f"must be 8 (stored as {8 - subtracted})" in text
    assert "checkpoint_format" in text


@pytest.mark.parametrize(("bits", "top"), [(4, 15), (8, 255)])
def test_a_zero_point_that_readers_disagree_on_is_refused(bits: int, top: int) -> None:
    case = (bits, 24, 128, 32)
    parts, codec = stored(case, (False, 1)), codec_of(case, (False, 1))
    parts["qzeros"][0, 0] |= top
    text = refusal(codec, parts)
    assert text.startswith(f"a zero point is stored as {top}")
    # Rows that do not have it can be read, and the second format means what it says.
    assert codec.decode(cut(codec, parts, 1, 8), 1, 8, DType.F32).shape == (7, 128)
    later = codec_of(case, (False, 0))
    assert later.decode(cut(later, parts, 0, 8), 0, 8, DType.F32).shape == (8, 128)


# --- samples -----------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("g_idx", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_encoding_loses_little(kind: tuple[bool, int], g_idx: bool, bits: int) -> None:
    codec = Gptq(bits, 64, kind[0], kind[1], DType.F16, g_idx=g_idx)
    array = mx.random.normal((24, 192), key=mx.random.key(3)).astype(mx.float16)
    parts = codec.encode(array)
    specs = codec.encoded(Spec((24, 192), DType.F16))
    assert parts.keys() == specs.keys()
    for part, spec in specs.items():
        assert (parts[part].shape, parts[part].dtype) == (spec.shape, getattr(mx, spec.dtype.mlx))
    truth = gptq({part: np.array(value) for part, value in parts.items()}, bits, kind[1])
    step = np.repeat(np.array(parts["scales"]).T.astype(np.float32), 64, 1)
    error = np.abs(truth - np.array(array.astype(mx.float32))) / step
    assert error.max() <= 1.1
    assert np.median(error) < 0.3
    placed = replace(codec, width=192)
    held = {part: value.reshape(-1, value.shape[-1]) for part, value in parts.items()}
    assert np.array_equal(np.array(placed.decode(held, 0, 24, DType.F32)), truth)


def test_the_sample_is_of_the_first_format_and_symmetric() -> None:
    assert SAMPLES["gptq"].codec == Gptq(4, 64, True, 1, DType.F16)
    assert not np.any(np.array(SAMPLES["gptq"].codec.encode(mx.ones((8, 64)))["qzeros"]) - 0x77777777)


# --- claims ------------------------------------------------------------------------------------------

FULL = {
    "qweight": Spec((896, 576), DType.I32),
    "qzeros": Spec((56, 72), DType.I32),
    "scales": Spec((56, 576), DType.F16),
    "g_idx": Spec((7168,), DType.I32),
}


def full(
    width: int | None = 7168, section: dict[str, object] | None = None, **changed: Spec | None
) -> Module:
    leaves = {leaf: spec for leaf, spec in {**FULL, **changed}.items() if spec is not None}
    return Module(leaves, width, section or {})


def test_a_real_projection_is_claimed() -> None:
    (found,) = claim(full(section={"quant_method": "gptq", "sym": True, "desc_act": False}))
    assert found.codec == Gptq(4, 128, True, 1, DType.F16, 7168)
    assert found.spec == Spec((576, 7168), DType.F16)


def test_one_group_for_all_columns_and_no_g_idx() -> None:
    zeros, scales = Spec((1, 72), DType.I32), Spec((1, 576), DType.BF16)
    (found,) = claim(full(qzeros=zeros, scales=scales, g_idx=None))
    assert found.codec == Gptq(4, 7168, False, 1, DType.BF16, 7168, g_idx=False)
    assert "g_idx" not in found.parts


@pytest.mark.parametrize("width", [8, 64, 128, 1024])
def test_awq_and_gptq_are_never_taken_for_one_another(width: int) -> None:
    # Square ones too: the packed axis is another one.
    shapes = {"gptq": (width // 8, width), "awq": (width, width // 8)}
    for name, shape in shapes.items():
        leaves = {
            "qweight": Spec(shape, DType.I32),
            "qzeros": Spec((1, width // 8), DType.I32),
            "scales": Spec((1, width), DType.F16),
        }
        found = Module(leaves, width, {})
        assert [len(awq.claim(found)), len(claim(found))] == ([0, 1] if name == "gptq" else [1, 0])


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(Module({}, None, {}), id="nothing"),
        pytest.param(full(None), id="unknown_width"),
        pytest.param(full(qweight=None), id="no_codes"),
        pytest.param(full(qweight=Spec((896, 576), DType.BF16)), id="floats"),
        pytest.param(full(896), id="awq"),
    ],
)
def test_other_modules_are_left_alone(found: Module) -> None:
    assert claim(found) == []


REFUSED = [
    pytest.param(full(section={"desc_act": True}), r"act-order \(desc_act in config.json\)", id="desc_act"),
    pytest.param(
        full(section={"checkpoint_format": {"a": 1}}), "checkpoint_format {'a': 1} is", id="format_object"
    ),
    pytest.param(full(section={"checkpoint_format": "marlin"}), "checkpoint_format 'marlin' is", id="format"),
    pytest.param(full(1000), r"rows of 1000 codes: GPTQ with 4 bits has \[125, out\]", id="bits"),
    pytest.param(full(scales=None), "scales are None; beside qweight they must be", id="no_scales"),
    pytest.param(full(scales=Spec((56, 576), DType.U8)), r"scales are U8 \[56, 576\]", id="bytes"),
    pytest.param(full(scales=Spec((), DType.F16)), "equal groups", id="one_scale"),
    pytest.param(full(scales=Spec((55, 576), DType.F16)), r"\[55, 576\].*rows of 7168", id="groups"),
    pytest.param(
        full(scales=Spec((56, 575), DType.F16)), r"scales is F16 \[56, 575\].*\[56, 576\]", id="out"
    ),
    pytest.param(full(qzeros=None), r"qzeros is None.*needs I32 \[56, 72\]", id="no_zeros"),
    pytest.param(full(qzeros=Spec((56, 144), DType.I32)), r"\[56, 144\].*needs I32 \[56, 72\]", id="zeros"),
    pytest.param(full(g_idx=Spec((7167,), DType.I32)), r"g_idx is I32 \[7167\].*\[7168\]", id="g_idx"),
    pytest.param(
        full(qweight=Spec((896, 12), DType.I32)), r"\[12, 7168\] does not divide into words of 8", id="words"
    ),
]


@pytest.mark.parametrize(("found", "text"), REFUSED)
def test_parts_that_do_not_fit_are_refused_with_the_numbers(found: Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        claim(found)
