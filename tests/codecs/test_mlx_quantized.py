"""MLX's quantization: claims from shapes alone, bits and rows as mlx has them."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same

from mla_tools.codecs import mlx_quantized
from mla_tools.codecs.codec import Module, recast
from mla_tools.codecs.mlx_quantized import MlxQuantized, claim
from mla_tools.quantization import MODES, QuantSpec
from mla_tools.spec import DType, Spec

WIDTH = 384  # every group size divides it, and no two specs pack it alike

FLOATS = {DType.F32: mx.float32, DType.F16: mx.float16, DType.BF16: mx.bfloat16}
BLOCK_FLOATS = [QuantSpec(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
AFFINE = [QuantSpec("affine", bits, group) for bits in MODES["affine"][0] for group in MODES["affine"][1]]

# Every quantization of MLX in every dtype that it takes, affine also without biases.
CODECS = [
    *(MlxQuantized(spec, dtype, biases) for spec in AFFINE for dtype in FLOATS for biases in (True, False)),
    *(MlxQuantized(spec, DType.BF16, False) for spec in BLOCK_FLOATS),
]
each_codec = pytest.mark.parametrize(
    "codec",
    CODECS,
    ids=lambda c: f"{c.name}-{c.dtype.name}-{'biases' if c.biases else 'none'}".replace(" ", "_"),
)
each_spec = pytest.mark.parametrize("spec", [*AFFINE, *BLOCK_FLOATS], ids=lambda s: str(s).replace(" ", "_"))


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(5)).astype(dtype)


def quantized(codec: MlxQuantized, *shape: int) -> dict[str, mx.array]:
    """Return what mx.quantize makes of random numbers, the biases left out where there are none."""
    spec = codec.spec
    parts = mx.quantize(
        random(*shape, dtype=FLOATS[codec.dtype]),
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
    )
    named = dict(zip(("weight", "scales", "biases"), parts, strict=False))
    return {part: array for part, array in named.items() if codec.biases or part != "biases"}


def specs(parts: dict[str, mx.array]) -> dict[str, Spec]:
    dtypes = {mx.uint32: DType.U32, mx.uint8: DType.U8, **{v: k for k, v in FLOATS.items()}}
    return {part: Spec(tuple(array.shape), dtypes[array.dtype]) for part, array in parts.items()}


@each_codec
def test_the_parts_alone_tell_mode_bits_and_group(codec: MlxQuantized) -> None:
    parts = quantized(codec, 5, WIDTH)
    (found,) = claim(Module(specs(parts), WIDTH, {}))
    assert found.codec == codec
    assert found.spec == Spec((5, WIDTH), codec.dtype)
    assert found.leaf == "weight"
    assert found.parts == {part: part for part in parts}


@each_codec
def test_encoded_tells_the_parts_that_mlx_makes(codec: MlxQuantized) -> None:
    for shape in ((5, WIDTH), (3, 5, WIDTH)):
        assert codec.encoded(Spec(shape, codec.dtype)) == specs(quantized(codec, *shape))


@each_spec
def test_the_word_is_what_people_call_it(spec: QuantSpec) -> None:
    codec = MlxQuantized(spec, DType.BF16, spec.has_biases)
    wanted = f"affine {spec.bits}-bit g{spec.group_size}" if spec.mode == "affine" else spec.mode
    assert codec.name == wanted
    assert codec.quantized


@each_spec
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_encode_gives_the_bits_of_mlx(spec: QuantSpec, dtype: DType) -> None:
    codec = MlxQuantized(spec, dtype, spec.has_biases)
    array, wanted = random(2, 5, WIDTH, dtype=FLOATS[dtype]), quantized(codec, 2, 5, WIDTH)
    for got in (codec.encode(array), codec.encode_now(array)):
        assert got.keys() == wanted.keys()
        assert all(same(got[part], wanted[part]) for part in wanted)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_affine_is_encoded_by_mlx_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    kind = getattr(mx.DeviceType, device)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    monkeypatch.setattr(mlx_quantized, "encode_affine", lambda *args: calls.append("cpu") or {})
    monkeypatch.setattr(mlx_quantized, "quantize", lambda *args: calls.append("gpu") or {})
    codec = MlxQuantized(QuantSpec("affine", 4, 64), DType.BF16, biases=True)
    codec.encode_now(random(2, WIDTH, dtype=mx.bfloat16))
    codec.encode(random(2, WIDTH, dtype=mx.bfloat16))  # lazily, and so by MLX everywhere
    assert calls == [device, "gpu"]


@pytest.mark.parametrize(
    "codec",
    [c for c in CODECS if c.spec.bits in (3, 4, 8)],
    ids=lambda c: f"{c.name}-{c.dtype.name}-{'biases' if c.biases else 'none'}".replace(" ", "_"),
)
def test_any_rows_decode_to_those_of_the_whole(codec: MlxQuantized) -> None:
    rows, spec = 9, codec.spec
    parts = quantized(codec, rows, WIDTH)
    biases = None
    if spec.mode == "affine":
        biases = parts.get("biases", mx.zeros_like(parts["scales"]))
    whole = mx.dequantize(
        parts["weight"], parts["scales"], biases, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
    )

    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, rows - 1), st.integers(1, rows))
    def check(start: int, count: int) -> None:
        stop = min(rows, start + count)
        cut = codec.cut(start, stop)
        assert cut == dict.fromkeys(parts, (start, stop))
        held = {part: array[start:stop] for part, array in parts.items()}
        assert same(codec.decode(held, start, stop, codec.dtype), whole[start:stop])

    check()


@each_spec
def test_decoding_to_float32_loses_nothing_of_what_the_parts_say(spec: QuantSpec) -> None:
    codec = MlxQuantized(spec, DType.BF16, spec.has_biases)
    parts = quantized(codec, 5, WIDTH)
    wide = {
        part: array if array.dtype in (mx.uint32, mx.uint8) else array.astype(mx.float32)
        for part, array in parts.items()
    }
    wanted = mx.dequantize(
        *wide.values(), group_size=spec.group_size, bits=spec.bits, mode=spec.mode, dtype=mx.float32
    )
    assert same(codec.decode(parts, 0, parts["weight"].shape[0], DType.F32), wanted)


def test_a_module_without_a_width_or_scales_is_left_alone() -> None:
    leaves = specs(quantized(MlxQuantized(QuantSpec(), DType.BF16, True), 5, WIDTH))
    assert claim(Module(leaves, None, {})) == []
    assert claim(Module({"weight": leaves["weight"]}, WIDTH, {})) == []
    assert claim(Module({"scales": leaves["scales"]}, WIDTH, {})) == []
    dense = {**leaves, "weight": Spec((5, WIDTH), DType.BF16)}
    assert claim(Module(dense, WIDTH, {})) == []


def test_a_bias_beside_the_parts_is_not_one_of_them() -> None:
    leaves = specs(quantized(MlxQuantized(QuantSpec(), DType.BF16, True), 5, WIDTH))
    (found,) = claim(Module({**leaves, "bias": Spec((5,), DType.BF16)}, WIDTH, {}))
    assert "bias" not in found.parts.values()


GOOD = {
    "weight": Spec((5, 48), DType.U32),
    "scales": Spec((5, 6), DType.BF16),
    "biases": Spec((5, 6), DType.BF16),
}
NO_BIASES = {part: GOOD[part] for part in ("weight", "scales")}

REFUSED = [
    pytest.param({**GOOD, "scales": Spec((4, 6), DType.BF16)}, "rows differ", id="rows"),
    pytest.param({**GOOD, "scales": Spec((6,), DType.BF16)}, "rows differ", id="axes"),
    pytest.param({**GOOD, "biases": Spec((5, 5), DType.BF16)}, "biases.*scales", id="biases"),
    pytest.param({**GOOD, "biases": Spec((5, 6), DType.F32)}, "biases.*scales", id="biases_dtype"),
    pytest.param({**NO_BIASES, "scales": Spec((5, 6), DType.I32)}, "I32", id="scales_dtype"),
    pytest.param({**NO_BIASES, "scales": Spec((5, 6), DType.F8_E8M0)}, "F8_E8M0", id="scales_e8m0"),
    pytest.param({**NO_BIASES, "scales": Spec((5, 6), DType.U8)}, "4 bits and group size 64", id="no_mode"),
    pytest.param({**NO_BIASES, "scales": Spec((5, 7), DType.BF16)}, "384 elements.*7 float", id="group"),
    pytest.param({**GOOD, "weight": Spec((5, 47), DType.U32)}, "47 uint32 words", id="words"),
    pytest.param(
        {name: spec._replace(dtype=DType.U8) if name != "weight" else spec for name, spec in GOOD.items()},
        "without biases, but there are biases",
        id="block_float_biases",
    ),
    pytest.param(
        {"weight": Spec((5, 0), DType.U32), "scales": Spec((5, 0), DType.BF16)}, "rows differ", id="empty"
    ),
    pytest.param({"weight": Spec((), DType.U32), "scales": Spec((), DType.BF16)}, "rows differ", id="scalar"),
]


@pytest.mark.parametrize(("leaves", "text"), REFUSED)
def test_parts_that_do_not_fit_are_refused(leaves: dict[str, Spec], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        claim(Module(leaves, WIDTH, {}))


def test_recast_changes_scales_and_biases_alone() -> None:
    parts = quantized(MlxQuantized(QuantSpec(), DType.F32, True), 5, WIDTH)
    cast = recast(parts, DType.BF16)
    assert cast["weight"] is parts["weight"]
    for part in ("scales", "biases"):
        assert same(cast[part], parts[part].astype(mx.bfloat16))
