"""FP4 against ml_dtypes' E2M1, E4M3 and E8M0."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from conversion import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sample

from mla_tools.codecs import bundle
from mla_tools.codecs.codec import Module
from mla_tools.codecs.fp4 import SAMPLES, Fp4
from mla_tools.errors import MlaToolsError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.spec import DType, Spec

NV = Fp4(False, overall="_scale_2", dtypes=(DType.U8, DType.F8_E4M3))
CT = SAMPLES["ct-nvfp4"].codec
MX = Fp4(e8m0=True)


def values(codec: Fp4, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Return what the parts stand for, in float64, by ml_dtypes and the formats' definitions."""
    packed = parts[codec.codes]
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = packed & 0xF
    codes[..., 1::2] = packed >> 4
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    kind, group = (ml_dtypes.float8_e8m0fnu, 32) if codec.e8m0 else (ml_dtypes.float8_e4m3fn, 16)
    numbers *= np.repeat(parts[codec.scale].view(kind).astype(np.float64), group, axis=-1)
    if codec.overall is not None:
        overall = float(parts[codec.overall].reshape(()))
        numbers = numbers / overall if codec.divides else numbers * overall
    return numbers


def random_parts(codec: Fp4, rows: int, width: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = {
        codec.codes: rng.integers(0, 256, (rows, width // 2), dtype=np.uint8),
        # Any exponent but the NaN byte and those whose products leave float32; any E4M3 but its NaN.
        codec.scale: rng.integers(
            0, 250 if codec.e8m0 else 127, (rows, width // codec.group), dtype=np.uint8
        ),
    }
    if codec.overall is not None:
        parts[codec.overall] = np.array(rng.random() + 0.01, np.float32).reshape(codec.overall_shape)
    return parts


def cut(codec: Fp4, parts: dict[str, np.ndarray], start: int, stop: int) -> dict[str, mx.array]:
    rows = codec.cut(start, stop)
    return {
        part: mx.array(value.reshape(-1, value.shape[-1] if value.ndim else 1)[slice(*rows[part])])
        for part, value in parts.items()
    }


@settings(deadline=None, max_examples=40)
@given(
    codec=st.sampled_from([MX, NV, CT]),
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_decodes_any_rows(codec: Fp4, rows: int, groups: int, seed: int, data: st.DataObject) -> None:
    parts = random_parts(codec, rows, groups * 32, seed)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    got = np.array(codec.decode(cut(codec, parts, start, stop), start, stop, DType.F32))
    wanted = values(codec, parts)[start:stop]
    if codec.overall is None:
        # The smallest subnormal products are halves of what float32 holds; all others are exact.
        assert np.array_equal(got, wanted.astype(np.float32))
    else:
        # One rounding to float32, of the product with the scale of the whole tensor.
        np.testing.assert_array_max_ulp(got, wanted.astype(np.float32), maxulp=1)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 6), groups=st.integers(1, 4), seed=st.integers(0, 1 << 30))
def test_mx_codes_move_to_mlx_as_they_are(rows: int, groups: int, seed: int) -> None:
    parts = random_parts(MX, rows, groups * 32, seed)
    kept = MX.to_native(cut(MX, parts, 0, rows), 0, rows)
    assert np.array(kept["weight"]).tobytes() == parts["weight"].tobytes()
    assert np.array(kept["scales"]).tobytes() == parts["_scale"].tobytes()
    got = mx.dequantize(kept["weight"], kept["scales"], mode="mxfp4", dtype=mx.float32)
    assert np.array_equal(np.array(got), values(MX, parts).astype(np.float32))


@pytest.mark.parametrize("codec", [NV, CT], ids=["times", "divided"])
def test_nv_codes_move_to_mlx_with_the_second_scale_beside_them(codec: Fp4) -> None:
    parts = random_parts(codec, 5, 64, 7)
    kept = codec.to_native(cut(codec, parts, 1, 4), 1, 4)
    assert np.array(kept["weight"]).tobytes() == parts[codec.codes][1:4].tobytes()
    assert np.array(kept["scales"]).tobytes() == parts[codec.scale][1:4].tobytes()
    second = np.float64(parts[codec.overall].reshape(())) ** (-1 if codec.divides else 1)
    assert np.array_equal(np.array(kept["global_scale"]), np.full((3, 1), second * 2688, np.float32))


def test_bytes_of_scales_are_told_by_their_number() -> None:
    leaves = {"weight": (U8, 8, 32), "weight_scale_2": (F32,)}
    for groups, e8m0 in ((4, False), (2, True)):
        (claim,) = bundle(module({**leaves, "weight_scale": (U8, 8, groups)})).claims[:1]
        assert isinstance(claim.codec, Fp4)
        assert claim.codec.e8m0 == e8m0


@pytest.mark.parametrize("byte", range(255))
def test_every_exponent(byte: int) -> None:
    parts = {"weight": np.arange(16, dtype=np.uint8)[None] * 17, "_scale": np.array([[byte]], np.uint8)}
    got = np.array(MX.decode(cut(MX, parts, 0, 1), 0, 1, DType.F32))
    with np.errstate(over="ignore"):
        assert np.array_equal(got, values(MX, parts).astype(np.float32))


@pytest.mark.parametrize("method", ["keep", "decode"])
def test_a_scale_that_is_no_number_is_refused(method: str) -> None:
    parts = cut(MX, {"weight": np.zeros((1, 16), np.uint8), "_scale": np.array([[255]], np.uint8)}, 0, 1)
    with pytest.raises(MlaToolsError, match="not a number; the checkpoint is damaged"):
        MX.to_native(parts, 0, 1) if method == "keep" else MX.decode(parts, 0, 1, DType.F32)


@pytest.mark.parametrize(
    ("codec", "second"),
    [(NV, np.nan), (NV, np.inf), (NV, 1e37), (CT, np.nan), (CT, np.inf), (CT, 0.0), (CT, 1e-37)],
)
def test_a_second_scale_that_is_none_is_refused(codec: Fp4, second: float) -> None:
    parts = random_parts(codec, 2, 32, 1)
    codec.check(cut(codec, parts, 0, 2))
    parts[codec.overall] = np.array(second, np.float32).reshape(codec.overall_shape)
    with pytest.raises(MlaToolsError, match=f"weight{codec.overall} holds .*which is not a valid scale"):
        codec.check(cut(codec, parts, 0, 2))


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_an_e4m3_scale_that_is_no_number_is_refused(byte: int) -> None:
    parts = random_parts(NV, 2, 32, 1)
    parts["_scale"][1, 1] = byte
    with pytest.raises(MlaToolsError, match="weight_scale holds nan"):
        NV.check(cut(NV, parts, 0, 2))


U8, I8, E4M3, E8M0, F32 = DType.U8, DType.I8, DType.F8_E4M3, DType.F8_E8M0, DType.F32
CLAIMS = {
    "quark": ({"weight": (U8, 8, 32), "weight_scale": (U8, 8, 2)}, Fp4(True)),
    "quark e8m0": (
        {"weight": (U8, 8, 32), "weight_scale": (E8M0, 8, 2)},
        Fp4(True, dtypes=(U8, E8M0)),
    ),
    "deepseek": (
        {"weight": (I8, 8, 32), "scale": (E8M0, 8, 2)},
        Fp4(True, scale="scale", dtypes=(I8, E8M0)),
    ),
    "compressed-tensors mx": (
        {"weight_packed": (U8, 8, 32), "weight_scale": (U8, 8, 2)},
        Fp4(True, codes="_packed"),
    ),
    "compressed-tensors nv": (
        {"weight_packed": (U8, 8, 32), "weight_scale": (E4M3, 8, 4), "weight_global_scale": (F32, 1)},
        CT,
    ),
    "modelopt": (
        {
            "weight": (U8, 8, 32),
            "weight_scale": (E4M3, 8, 4),
            "weight_scale_2": (F32,),
            "input_scale": (F32,),
        },
        NV,
    ),
    "stacked": ({"weight": (U8, 3, 8, 32), "weight_scale": (U8, 3, 8, 2)}, Fp4(True)),
}


def module(leaves: dict[str, tuple], width: int | None = 64) -> Module:
    return Module({leaf: Spec(tuple(shape), dtype) for leaf, (dtype, *shape) in leaves.items()}, width, {})


@pytest.mark.parametrize(("leaves", "codec"), CLAIMS.values(), ids=CLAIMS)
def test_claims(leaves: dict[str, tuple], codec: Fp4) -> None:
    found = bundle(module(leaves))
    (claim,) = found.claims
    assert claim.codec == codec
    assert claim.leaf == "weight"
    assert claim.spec.shape[-1] == 64
    assert found.unread == {}
    assert set(claim.parts.values()) | set(found.drops) == set(leaves)
    assert set(found.drops) <= {"input_scale"}


@pytest.mark.parametrize(
    ("leaves", "sentence"),
    [
        (
            {"weight": (U8, 8, 32), "weight_scale": (U8, 8, 3)},
            r"weight_scale is U8 \[8, 3\].*needs U8 \[8, 2\]",
        ),
        ({"weight": (U8, 8, 32), "weight_scale": (U8, 7, 2)}, r"weight_scale is U8 \[7, 2\]"),
        (
            {"weight": (U8, 8, 32), "weight_scale": (E4M3, 8, 4), "weight_scale_2": (F32, 8)},
            r"weight_scale_2 is F32 \[8\]",
        ),
    ],
)
def test_refuses_parts_that_do_not_fit(leaves: dict[str, tuple], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bundle(module(leaves))


@pytest.mark.parametrize("fmt", SAMPLES)
@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_conversion_keeps_every_number(family: str, fmt: str, tmp_path: Path) -> None:
    source = sample(family, fmt)
    plan = convert(source, tmp_path / "out", "--dtype", "float32", "--embed-q", "float")
    out = mx.load(str(tmp_path / "out" / "model.safetensors"))
    stored = open_checkpoint(source).tensors
    raw = {}
    for name, place in stored.items():
        data = np.fromfile(source / place.file.name, np.uint8, place.spec.nbytes, offset=place.offset)
        raw[name] = data.view(place.spec.dtype.numpy).reshape(place.spec.shape)
    checked = 0
    for step in plan.steps:
        if not isinstance(step.sources[0].codec, Fp4):
            continue
        decoded = [
            values(s.codec, {p: raw[n] for p, n in s.parts.items()}).astype(np.float32) for s in step.sources
        ]
        wanted = step.op.apply([mx.array(array) for array in decoded])
        for target, array in zip(step.targets, wanted, strict=True):
            # Experts with a global scale are looked at in test_convert_nvfp4.
            if "global_scale" in target.parts:
                continue
            parts = [out[target.parts[part]] for part in target.parts]
            got = mx.dequantize(*parts, mode="mxfp4", dtype=mx.float32) if len(parts) > 1 else parts[0]
            np.testing.assert_array_max_ulp(
                np.array(got), np.array(array), maxulp=0 if fmt.endswith("mxfp4") else 1
            )
            checked += 1
    assert checked > 10
