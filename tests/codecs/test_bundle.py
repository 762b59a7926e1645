"""Which stored tensors together are one tensor, why the others are none, and what moves undecoded."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from mla_tools.codecs import Codec, Dense, Fp8Block, MlxQuantized, Module, bundle, repacking
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

WIDTH = 128
Leaves = dict[str, Spec]


def leaf(*shape: int, dtype: str = "BF16") -> Spec:
    return Spec(shape, DType[dtype])


AFFINE: Leaves = {"weight": leaf(6, 16, dtype="U32"), "scales": leaf(6, 2), "biases": leaf(6, 2)}
MXFP4: Leaves = {"weight": leaf(6, 16, dtype="U32"), "scales": leaf(6, 4, dtype="U8")}
FP8: Leaves = {"weight": leaf(6, 128, dtype="F8_E4M3"), "weight_scale_inv": leaf(1, 1, dtype="F32")}
DENSE: Leaves = {"weight": leaf(6, 128)}

WHOLE = [
    pytest.param(DENSE, {"weight": Dense(DType.BF16)}, id="dense"),
    pytest.param(FP8, {"weight": Fp8Block()}, id="fp8"),
    pytest.param(AFFINE, {"weight": MlxQuantized(QuantSpec(), DType.BF16, True)}, id="affine"),
    pytest.param(MXFP4, {"weight": MlxQuantized(QuantSpec("mxfp4"), DType.BF16, False)}, id="mxfp4"),
    pytest.param(
        {**AFFINE, "bias": leaf(6)},
        {"weight": MlxQuantized(QuantSpec(), DType.BF16, True), "bias": Dense(DType.BF16)},
        id="affine_with_bias",
    ),
    pytest.param(
        {**FP8, "bias": leaf(6, dtype="F32")},
        {"weight": Fp8Block(), "bias": Dense(DType.F32)},
        id="fp8_with_bias",
    ),
    pytest.param(
        {"A_log": leaf(1, 1, 4, 1, dtype="F32"), "dt_bias": leaf(4)},
        {"A_log": Dense(DType.F32), "dt_bias": Dense(DType.BF16)},
        id="parameters",
    ),
    pytest.param({}, {}, id="nothing"),
]


@pytest.mark.parametrize(("leaves", "wanted"), WHOLE)
def test_every_stored_tensor_belongs_to_one_tensor(leaves: Leaves, wanted: dict[str, Codec]) -> None:
    claims, _, rest = bundle(Module(leaves, WIDTH, {}))
    assert {claim.leaf: claim.codec for claim in claims} == wanted
    assert rest == {}
    held = [part for claim in claims for part in claim.parts.values()]
    assert sorted(held) == sorted(leaves)


LEFT_OVER = [
    pytest.param({"weight": leaf(6, 128, dtype="F8_E4M3")}, "weight", "without a scale", id="fp8_no_scale"),
    pytest.param({"weight": leaf(6, 128, dtype="F8_E5M2")}, "weight", "F8_E5M2", id="e5m2"),
    pytest.param({"weight": leaf(6, 16, dtype="U32")}, "weight", "U32.*without scales", id="codes_no_scales"),
    pytest.param({"scales": leaf(6, 4, dtype="U8")}, "scales", "U8 with scales", id="orphan_u8_scales"),
    pytest.param({**DENSE, "scales": leaf(6, 4, dtype="U8")}, "scales", "scales, weight", id="dense_scales"),
    pytest.param({"weight": leaf(6, 128, dtype="U8")}, "weight", "U8 with weight", id="bytes"),
    pytest.param({"weight": leaf(6, 128, dtype="F64")}, "weight", "F64", id="double"),
    pytest.param({"mask": leaf(6, dtype="BOOL")}, "mask", "BOOL", id="bool"),
]


@pytest.mark.parametrize(("leaves", "left", "text"), LEFT_OVER)
def test_what_no_format_takes_is_explained(leaves: Leaves, left: str, text: str) -> None:
    claims, _, rest = bundle(Module(leaves, WIDTH, {}))
    assert list(rest) == [left]
    assert re.search(text, rest[left])
    assert left not in {part for claim in claims for part in claim.parts.values()}


@pytest.mark.parametrize(
    "leaves",
    [
        pytest.param({"weight_scale_inv": leaf(1, 1, dtype="F32")}, id="fp8_scales_alone"),
        pytest.param({**DENSE, "weight_scale_inv": leaf(1, 1, dtype="F32")}, id="beside_a_dense_weight"),
        pytest.param({**DENSE, "scales": leaf(6, 2), "biases": leaf(6, 2)}, id="mlx_beside_a_dense_weight"),
    ],
)
def test_orphan_scales_are_not_swallowed(leaves: Leaves) -> None:
    # As tensors of their own they meet no rule, and are reported as unknown.
    claims, _, rest = bundle(Module(leaves, WIDTH, {}))
    assert sorted([claim.leaf for claim in claims] + list(rest)) == sorted(leaves)
    assert all(len(claim.parts) == 1 for claim in claims)


def test_a_quantized_weight_of_unknown_width_is_explained() -> None:
    claims, _, rest = bundle(Module(AFFINE, None, {}))
    assert list(rest) == ["weight"]
    assert "U32" in rest["weight"]
    assert [claim.leaf for claim in claims] == ["scales", "biases"]


def test_two_formats_that_take_one_stored_tensor_are_refused() -> None:
    # The scales of mxfp4 are bytes, and so may be FP8 codes.
    leaves = {**MXFP4, "scales_scale_inv": leaf(1, 1, dtype="F32")}
    with pytest.raises(ValueError, match="scales is fp8 128x128 and mxfp4 at once"):
        bundle(Module(leaves, WIDTH, {}))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows differ"):
        bundle(Module({**AFFINE, "scales": leaf(5, 2)}, WIDTH, {}))


# --- repacking ---------------------------------------------------------------------------------------

SPEC = QuantSpec()


def parts_of(spec: QuantSpec, dtype: mx.Dtype, *, biases: bool = True) -> dict[str, mx.array]:
    array = mx.random.normal((6, WIDTH), key=mx.random.key(1)).astype(dtype)
    made = mx.quantize(array, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    named = dict(zip(("weight", "scales", "biases"), made, strict=False))
    return named if biases else {part: named[part] for part in ("weight", "scales")}


@pytest.mark.parametrize(
    "codec",
    [
        Dense(DType.BF16),
        Fp8Block(),
        MlxQuantized(SPEC, DType.F16, True),
        MlxQuantized(SPEC, DType.F16, False),
        MlxQuantized(QuantSpec("nvfp4"), DType.BF16, False),
    ],
    ids=lambda codec: codec.name,
)
def test_equal_formats_need_no_repacking(codec: Codec) -> None:
    repack = repacking(codec, codec)
    assert repack is not None
    parts = {"weight": mx.zeros(3), "anything": mx.zeros(2)}
    assert repack(parts, 0, 3) == parts


def test_biases_are_added_and_nothing_else_changes() -> None:
    repack = repacking(MlxQuantized(SPEC, DType.BF16, False), MlxQuantized(SPEC, DType.BF16, True))
    assert repack is not None
    parts = parts_of(SPEC, mx.bfloat16, biases=False)
    made = repack(parts, 0, 3)
    assert {part: made[part] for part in parts} == parts
    assert made["biases"].dtype == mx.bfloat16
    assert not mx.any(made["biases"]).item()


@pytest.mark.parametrize("biases", [True, False])
def test_scales_are_recast_and_codes_are_not(biases: bool) -> None:
    repack = repacking(MlxQuantized(SPEC, DType.F32, biases), MlxQuantized(SPEC, DType.F16, True))
    assert repack is not None
    parts = parts_of(SPEC, mx.float32, biases=biases)
    made = repack(parts, 0, 3)
    assert set(made) == {"weight", "scales", "biases"}
    assert np.array_equal(np.array(made["weight"]), np.array(parts["weight"]))
    assert made["scales"].dtype == made["biases"].dtype == mx.float16
    assert mx.array_equal(made["scales"], parts["scales"].astype(mx.float16)).item()


def test_block_float_scales_are_bytes_whatever_the_dtype_computed_in() -> None:
    spec = QuantSpec("mxfp4")
    repack = repacking(MlxQuantized(spec, DType.BF16, False), MlxQuantized(spec, DType.F16, False))
    parts = parts_of(spec, mx.bfloat16)
    made = repack(parts, 0, 3) if repack is not None else parts
    assert made["scales"].dtype == mx.uint8


UNLIKE = [
    pytest.param(Dense(DType.BF16), Dense(DType.F16), id="dense_dtypes"),
    pytest.param(Fp8Block(), Dense(DType.BF16), id="fp8_to_dense"),
    pytest.param(Fp8Block(), MlxQuantized(QuantSpec("mxfp8"), DType.BF16, False), id="fp8_to_mxfp8"),
    pytest.param(Dense(DType.BF16), MlxQuantized(SPEC, DType.BF16, True), id="dense_to_affine"),
    pytest.param(
        MlxQuantized(SPEC, DType.BF16, True), MlxQuantized(QuantSpec(bits=8), DType.BF16, True), id="bits"
    ),
    pytest.param(
        MlxQuantized(SPEC, DType.BF16, True),
        MlxQuantized(QuantSpec(group_size=32), DType.BF16, True),
        id="group",
    ),
    pytest.param(
        MlxQuantized(QuantSpec("mxfp4"), DType.BF16, False),
        MlxQuantized(QuantSpec(bits=4, group_size=32), DType.BF16, True),
        id="mode",
    ),
]


@pytest.mark.parametrize(("source", "target"), UNLIKE)
def test_other_formats_must_be_decoded(source: Codec, target: Codec) -> None:
    assert repacking(source, target) is None
