"""AWQ against loops over positions and against mlx-lm's own reading of it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import awq, narrow
from mlx_lm import utils as mlx_lm_utils
from native import mlx_form
from numpy.typing import NDArray

from mla_tools.codecs import MlxQuantized, Module, repacking
from mla_tools.codecs.awq import SAMPLES, Awq, claim
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

Parts = dict[str, NDArray[Any]]

# rows (out), width (in), group
CASES = [(8, 64, 64), (24, 128, 32), (40, 128, 128), (16, 512, 256), (8, 48, 16), (16, 96, 96)]
# Any other, in whole words of eight rows.
ANY_CASE = st.builds(
    lambda words, half, count: (8 * words, 2 * half * count, 2 * half),
    st.integers(1, 5),
    st.integers(1, 80),
    st.integers(1, 4),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


def stored(case: tuple[int, int, int]) -> Parts:
    rows, width, group = case
    rng = np.random.default_rng(rows + width)

    def words(count: int) -> NDArray[np.int32]:
        return rng.integers(-(2**31), 2**31, (count, rows // 8)).astype(np.int32)

    scales = rng.standard_normal((width // group, rows)).astype(np.float16)
    return {"qweight": words(width), "qzeros": words(width // group), "scales": scales}


def module(parts: Parts, width: int | None, **section: object) -> Module:
    dtypes = {"int32": DType.I32, "float16": DType.F16}
    return Module({p: Spec(a.shape, dtypes[str(a.dtype)]) for p, a in parts.items()}, width, section)


def cut(codec: Awq, parts: Parts, start: int, stop: int) -> dict[str, mx.array]:
    return {part: mx.array(parts[part][a:b]) for part, (a, b) in codec.cut(start, stop).items()}


def dequantized(parts: dict[str, mx.array], form: MlxQuantized) -> NDArray[Any]:
    scales, biases = (parts[part].astype(mx.float32) for part in ("scales", "biases"))
    return np.array(mx.dequantize(parts["weight"], scales, biases, form.spec.group_size, 4))


@each_case
def test_decode_is_code_less_zero_times_scale(case: tuple[int, int, int]) -> None:
    rows, width, group = case
    parts = stored(case)
    (found,) = claim(module(parts, width))
    codec = Awq(group, DType.F16, width)
    assert (found.leaf, found.spec, found.codec) == ("weight", Spec((rows, width), DType.F16), codec)
    assert found.parts == {part: part for part in parts}
    held = cut(codec, parts, 0, rows)
    assert all(np.array_equal(np.array(held[part]), parts[part]) for part in parts)
    truth = awq(parts)
    assert np.array_equal(np.array(codec.decode(held, 0, rows, DType.F32)), truth)
    for dtype in (DType.BF16, DType.F16):
        narrowed = codec.decode(held, 0, rows, dtype)
        kind = getattr(mx, dtype.mlx)
        assert narrowed.dtype == kind
        assert np.array_equal(np.array(narrowed.astype(mx.float32)), narrow(truth, kind))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES) | ANY_CASE, st.data())
def test_any_rows_are_those_of_the_whole(case: tuple[int, int, int], data: st.DataObject) -> None:
    rows, width, group = case
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    parts, codec = stored(case), Awq(group, DType.F16, width)
    held, truth = cut(codec, parts, start, stop), awq(parts)[start:stop]
    assert np.array_equal(np.array(codec.decode(held, start, stop, DType.F32)), truth)
    if codec.native is not None:
        made = codec.to_native(held, start, stop)
        specs = mlx_form(codec.native).encoded(Spec((stop - start, width), DType.F32))
        assert {part: array.shape for part, array in made.items()} == {p: s.shape for p, s in specs.items()}
        assert made["biases"].dtype == mx.float32
        assert np.array_equal(dequantized(made, codec.native), truth)


def test_mlx_lm_reads_the_same_bits() -> None:
    case = (24, 128, 32)
    parts, codec = stored(case), Awq(32, DType.F16, 128)
    named = {f"x.{part}": mx.array(array) for part, array in parts.items()}
    theirs, section = mlx_lm_utils._transform_awq_weights(named, {"bits": 4, "group_size": 32})
    assert section == {"group_size": 32, "bits": 4}
    repack = repacking(codec, MlxQuantized(QuantSpec("affine", 4, 32), DType.F16, True))
    assert repack is not None
    ours = repack(cut(codec, parts, 0, 24), 0, 24)
    for part in ("weight", "scales", "biases"):
        assert ours[part].dtype == theirs[f"x.{part}"].dtype
        assert mx.array_equal(ours[part], theirs[f"x.{part}"]).item(), part


def test_a_narrower_target_rounds_each_bias_once() -> None:
    case = (24, 128, 32)
    parts, codec = stored(case), Awq(32, DType.F16, 128)
    held = cut(codec, parts, 0, 24)
    repack = repacking(codec, MlxQuantized(QuantSpec("affine", 4, 32), DType.F16, True))
    assert repack is not None
    made, exact = repack(held, 0, 24), codec.to_native(held, 0, 24)
    assert mx.array_equal(made["scales"], held["scales"].T).item()
    assert mx.array_equal(made["biases"], exact["biases"].astype(mx.float16)).item()
    assert not mx.array_equal(made["biases"], exact["biases"]).item()


def test_groups_that_mlx_lacks_are_decoded() -> None:
    codec = Awq(16, DType.F16, 48)
    assert codec.native is None
    with pytest.raises(TypeError, match="MLX has no form of awq 4-bit g16"):
        codec.to_native({}, 0, 8)


def test_encoding_loses_at_most_half_a_step() -> None:
    codec = SAMPLES["awq"].codec
    array = mx.random.normal((24, 192), key=mx.random.key(3)).astype(mx.float16)
    parts = codec.encode(array)
    for part, spec in codec.encoded(Spec((24, 192), DType.F16)).items():
        assert (parts[part].shape, parts[part].dtype) == (spec.shape, getattr(mx, spec.dtype.mlx))
    truth = awq({part: np.array(value) for part, value in parts.items()})
    step = np.repeat(np.array(parts["scales"]).T.astype(np.float32), 64, 1)
    # Beside half a step of each code, half a step of the zero point where it clips at an end.
    assert (np.abs(truth - np.array(array.astype(mx.float32))) <= step * 1.02).all()
    assert np.median(np.abs(truth - np.array(array.astype(mx.float32))) / step) < 0.3


def test_what_does_not_divide_is_refused() -> None:
    codec = Awq(64, DType.F16)
    for shape in ((12, 64), (8, 96)):
        with pytest.raises(ValueError, match="does not divide into words of 8 and groups of 64"):
            codec.encoded(Spec(shape, DType.F16))


# --- claims ------------------------------------------------------------------------------------------

FULL = {
    "qweight": Spec((7168, 72), DType.I32),
    "qzeros": Spec((56, 72), DType.I32),
    "scales": Spec((56, 576), DType.F16),
}


def full(
    width: int | None = 7168, section: dict[str, object] | None = None, **changed: Spec | None
) -> Module:
    leaves = {leaf: spec for leaf, spec in {**FULL, **changed}.items() if spec is not None}
    return Module(leaves, width, section or {})


def test_a_real_projection_is_claimed() -> None:
    (found,) = claim(full(section={"quant_method": "awq", "version": "GEMM"}))
    assert (found.spec, found.codec) == (Spec((576, 7168), DType.F16), Awq(128, DType.F16, 7168))


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(Module({}, None, {}), id="nothing"),
        pytest.param(full(None), id="unknown_width"),
        pytest.param(full(qweight=None), id="no_codes"),
        pytest.param(full(qweight=Spec((7168, 72), DType.BF16)), id="floats"),
        pytest.param(full(57344), id="gptq"),
    ],
)
def test_other_modules_are_left_alone(found: Module) -> None:
    assert claim(found) == []


REFUSED = [
    pytest.param(full(section={"version": "gemv"}), "AWQ version 'gemv' is not supported", id="version"),
    pytest.param(full(g_idx=Spec((7168,), DType.I32)), "g_idx belongs to GPTQ", id="g_idx"),
    pytest.param(full(scales=None), "scales are None; beside qweight they must be", id="no_scales"),
    pytest.param(full(scales=Spec((56, 576), DType.U8)), r"scales are U8 \[56, 576\]", id="bytes"),
    pytest.param(full(scales=Spec((), DType.F16)), "equal groups", id="one_scale"),
    pytest.param(full(scales=Spec((55, 576), DType.F16)), r"\[55, 576\].*rows of 7168", id="groups"),
    pytest.param(
        full(scales=Spec((56, 575), DType.F16)), r"scales is F16 \[56, 575\].*\[56, 576\]", id="out"
    ),
    pytest.param(full(qzeros=None), r"qzeros is None.*needs I32 \[56, 72\]", id="no_zeros"),
    pytest.param(full(qzeros=Spec((56, 71), DType.I32)), r"\[56, 71\].*needs I32 \[56, 72\]", id="zeros"),
]


@pytest.mark.parametrize(("found", "text"), REFUSED)
def test_parts_that_do_not_fit_are_refused_with_the_numbers(found: Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        claim(found)
