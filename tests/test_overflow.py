"""A finite number that would become infinite ends a conversion; the source's own infinities do not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from pairs import pairs, product

from mla_tools.codecs import FORMATS
from mla_tools.errors import MlaToolsError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.overflow import holds_infinity
from mla_tools.plan import Workload, make_plan
from mla_tools.quantization import QuantSpec
from mla_tools.samples import write_checkpoint, write_sample
from mla_tools.spec import DType

Arrays = dict[str, mx.array]
Numbers = dict[tuple[str, tuple[int, ...]], float]

# Every group and block divides these, and two layers have all that there is.
TINY = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "kv_lora_rank": 128,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
KV_B = "model.layers.0.self_attn.kv_b_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
OUT = {
    EXPERT: "model.layers.1.mlp.switch_mlp.up_proj.weight",
    DOWN: DOWN,
    NORM: NORM,
}
# The first half of a head's rows of kv_b_proj is K, the second V.
K, V = (KV_B, (3, 5)), (KV_B, (64 + 3, 5))

ENDS = "become infinite in float16, which ends at 65,504; use --dtype bfloat16"
F16 = Options(dtype=DType.F16)
F16_DECODED = Options(dtype=DType.F16, dequantize=True)
F16_QUANTIZED = Options(dtype=DType.F16, quantize=QuantSpec("affine", 8, 64))

# None of these is stored in float16 itself.
WIDE = [fmt for fmt in FORMATS if fmt != "f16"]


def loaded(folder: Path) -> Arrays:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: array for file in files for name, array in mx.load(str(file)).items()}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Arrays]:
    """Return the config and the tensors of a tiny model, in float32."""
    folder = tmp_path_factory.mktemp("tiny") / "f32"
    write_sample("deepseek_v3", folder, "f32", changes=TINY)
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    return config, loaded(folder)


Planted = Callable[..., Path]


@pytest.fixture
def planted(tensors: tuple[dict[str, Any], Arrays], tmp_path: Path) -> Planted:
    def write(fmt: str, numbers: Numbers) -> Path:
        config, arrays = tensors
        changed = dict(arrays)
        too_large = (
            {}
            if FORMATS[fmt].dtype is not DType.F16
            else {place: number for place, number in numbers.items() if 65504 < abs(number) < math.inf}
        )
        for (name, place), number in numbers.items():
            values = np.array(changed[name])
            values[place] = math.copysign(5e4, number) if (name, place) in too_large else number
            changed[name] = mx.array(values)
        folder = tmp_path / "source"
        write_checkpoint(folder, config, changed, fmt)
        for (name, (row, *_)), number in too_large.items():
            # Formats of float16 hold it by a larger scale: the code is 7 or, without sign, 15 from zero.
            scale = np.float16(abs(number) / (15 if fmt == "awq" else 7))
            overwrite(folder, name.replace("weight", "scales"), 2 * row, scale.tobytes())
        return folder

    return write


def overwrite(folder: Path, name: str, place: int, data: bytes) -> None:
    """Write bytes over a stored tensor, from byte `place` on."""
    stored = open_checkpoint(folder).tensors[name]
    with (folder / stored.file.name).open("r+b") as file:
        file.seek(stored.offset + place)
        file.write(data)


def made(source: Path, options: Options, workload: Workload | None = None) -> Arrays:
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    execute(make_plan(open_checkpoint(source), options), out, workload=workload)
    return loaded(out)


def refused(source: Path, options: Options, workload: Workload | None = None) -> str:
    with pytest.raises(MlaToolsError) as caught:
        made(source, options, workload)
    assert not [*(source.parent / "out").glob("*.safetensors")]
    return str(caught.value)


def short(name: str) -> str:
    return name.removesuffix(".weight")


# --- every format ------------------------------------------------------------------------------------


# Where the number is, and what becomes of it: a step of each kind, decoded and quantized again.
PLACES = {"down": (DOWN, (3, 5)), "expert": (EXPERT, (3, 5)), "k": K, "v": V}
HOW = {"decoded": F16_DECODED, "quantized": F16_QUANTIZED}
STEPS = [f"{place}-{how}" for place in PLACES for how in HOW]


@pytest.mark.parametrize(("fmt", "step"), product(WIDE, STEPS, pairs(WIDE, STEPS, times=3)))
def test_a_number_beyond_float16_ends_the_run(fmt: str, step: str, planted: Planted) -> None:
    place, options = PLACES[step.partition("-")[0]], HOW[step.partition("-")[2]]
    sentence = refused(planted(fmt, {place: -1e5}), options)
    assert sentence.startswith(f"{short(place[0])}: numbers as large as ")
    assert sentence.endswith(ENDS)
    assert 9e4 < float(sentence.split()[5]) < 1.15e5


@pytest.mark.parametrize("fmt", WIDE)
def test_what_the_sentence_advises_works(fmt: str, planted: Planted) -> None:
    source = planted(fmt, {(DOWN, (3, 5)): 1e5, (EXPERT, (3, 5)): 1e5, K: 1e5, V: 1e5})
    out = made(source, Options(dtype=DType.BF16, dequantize=True))
    assert 9e4 < out[DOWN][3, 5].item() < 1.1e5
    assert 9e4 < out[OUT[EXPERT]][3, 3, 5].item() < 1.1e5
    assert 9e4 < out["model.layers.0.self_attn.embed_q.weight"][0, 5, 3].item() < 1.1e5
    assert 9e4 < out["model.layers.0.self_attn.unembed_out.weight"][0, 3, 5].item() < 1.1e5


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_float16_holds_is_converted(fmt: str, planted: Planted) -> None:
    source = planted(fmt, {(DOWN, (3, 5)): 5e4, (EXPERT, (3, 5)): -5e4, K: 5e4})
    assert 4.5e4 < made(source, F16_DECODED)[DOWN][3, 5].item() < 5.5e4


@pytest.mark.parametrize("fmt", ["fp8-ue8m0", "quark-mxfp4", "ct-int4-asym"])
def test_of_codes_that_are_moved_no_number_is_made(fmt: str, planted: Planted) -> None:
    out = made(planted(fmt, {(DOWN, (3, 5)): 1e5, (EXPERT, (3, 5)): 1e5, V: 1e5}), F16)
    assert out[OUT[EXPERT]].dtype == mx.uint32


@pytest.mark.parametrize("fmt", ["fp8-ue8m0", "quark-mxfp4"])
def test_the_half_of_kv_b_proj_that_is_not_moved_is_looked_at(fmt: str, planted: Planted) -> None:
    affine = Options(dtype=DType.F16, embed_q=QuantSpec("affine", 8, 32))
    sentence = refused(planted(fmt, {K: 1e5, V: 3e5}), affine)
    assert sentence.startswith(f"{short(KV_B)}: numbers as large as ")
    assert 9e4 < float(sentence.split()[5]) < 1.15e5


# The bias is the lowest number that a group can hold, the largest scale a seventh of it or so.
@pytest.mark.parametrize("fmt", ["ct-int4", "ct-int4-asym", "awq", "gptq"])
@pytest.mark.parametrize("name", [DOWN, EXPERT])
def test_scales_and_biases_beyond_float16_end_the_run(fmt: str, name: str, planted: Planted) -> None:
    source = planted(fmt, {(name, (3, 5)): -1e5})
    sentence = refused(source, F16)
    assert sentence.startswith(f"{short(name)}: scales as large as ")
    assert sentence.endswith(ENDS)
    assert 9e4 < float(sentence.split()[5]) < 1.3e5
    parts = made(source, Options(dtype=DType.BF16))
    biases = parts[OUT[name].replace("weight", "biases")].astype(mx.float32)
    assert 9e4 < mx.max(mx.abs(biases)).item() < 1.3e5


def test_slabs_of_many_experts_and_of_a_few_rows_name_the_same_tensor(planted: Planted) -> None:
    source = planted("bf16", {(EXPERT, (100, 5)): 1e5})
    sentences = {refused(source, F16, Workload(1, elements, 10**9)) for elements in (1 << 20, 1 << 15, 1024)}
    assert sentences == {f"{short(EXPERT)}: numbers as large as 9.984e+04 {ENDS}"}


# --- the limits --------------------------------------------------------------------------------------

TIE_F16 = 65520.0  # halfway between the largest float16 and what would be the next
TIE_BF16 = (2 - 2**-8) * 2.0**127
LARGEST_BF16 = (2 - 2**-7) * 2.0**127

LIMITS = [
    ("f32", DType.F16, 65504.0, 65504.0),
    ("f32", DType.F16, 65519.9, 65504.0),
    ("f32", DType.F16, -65519.9, -65504.0),
    (
        "f32",
        DType.F16,
        TIE_F16,
        "65,520 become infinite in float16, which ends at 65,504; use --dtype bfloat16",
    ),
    (
        "f32",
        DType.F16,
        -TIE_F16,
        "65,520 become infinite in float16, which ends at 65,504; use --dtype bfloat16",
    ),
    (
        "f32",
        DType.F16,
        TIE_BF16,
        "3.396e+38 become infinite in float16, which ends at 65,504; use --dtype float32",
    ),
    ("bf16", DType.F16, 65280.0, 65280.0),
    (
        "bf16",
        DType.F16,
        65536.0,
        "65,536 become infinite in float16, which ends at 65,504; use --dtype bfloat16",
    ),
    ("f32", DType.BF16, float(np.nextafter(np.float32(TIE_BF16), np.float32(0))), LARGEST_BF16),
    (
        "f32",
        DType.BF16,
        TIE_BF16,
        "3.396e+38 become infinite in bfloat16, which ends at 3.39e+38; use --dtype float32",
    ),
    ("f32", DType.F32, 3.4e38, float(np.float32(3.4e38))),
    ("bf16", DType.F32, LARGEST_BF16, LARGEST_BF16),
    ("f16", DType.BF16, 65504.0, 65536.0),
]


@pytest.mark.parametrize("name", [DOWN, NORM, EXPERT])
@pytest.mark.parametrize(("fmt", "dtype", "number", "expected"), LIMITS)
def test_the_limit_is_where_rounding_puts_it(
    fmt: str, dtype: DType, number: float, expected: float | str, name: str, planted: Planted
) -> None:
    place = (7,) if name == NORM else (3, 5)
    source = planted(fmt, {(name, place): number})
    if isinstance(expected, str):
        assert refused(source, Options(dtype=dtype)) == f"{short(name)}: numbers as large as {expected}"
    else:
        found = made(source, Options(dtype=dtype))[OUT[name]]
        assert found[(3, *place) if name == EXPERT else place].item() == expected


def test_scales_whose_products_are_beyond_float32(planted: Planted) -> None:
    source = planted("fp8", {})
    overwrite(source, f"{DOWN}_scale_inv", 0, np.float32(3e38).tobytes())
    for options in (F16_DECODED, Options(dequantize=True), Options(quantize=QuantSpec())):
        assert refused(source, options) == (
            f"{short(DOWN)}: numbers become infinite even in float32, which ends at 3.403e+38; "
            "the checkpoint is damaged"
        )


def test_scales_in_bytes_whose_products_are_beyond_float32(planted: Planted) -> None:
    source = planted("fp8-ue8m0", {})
    overwrite(source, f"{DOWN}_scale_inv", 0, b"\xfe")
    assert "infinite even in float32" in refused(source, Options(dequantize=True))


def test_a_group_that_is_too_wide_to_be_quantized(planted: Planted) -> None:
    options = Options(dtype=DType.F32, quantize=QuantSpec())
    source = planted("f32", {(DOWN, (3, 5)): 3e38, (DOWN, (3, 6)): -3e38})
    assert refused(source, options) == (
        f"{short(DOWN)}: numbers as large as 3e+38 lie too far apart to be quantized together"
    )


def test_two_groups_can_be_as_far_apart_as_they_are(planted: Planted) -> None:
    source = planted("f32", {(DOWN, (3, 5)): 3e38, (DOWN, (3, 105)): -3e38})
    biases = made(source, Options(dtype=DType.F32, quantize=QuantSpec()))[DOWN.replace("weight", "biases")]
    assert biases[3].tolist() == [float(np.float32(3e38)), -float(np.float32(3e38))]


# --- the source's own --------------------------------------------------------------------------------

OWN: Numbers = {(DOWN, (0, 1)): math.inf, (DOWN, (0, 2)): -math.inf, (DOWN, (0, 3)): math.nan}


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_infinities_of_the_source_stay(dtype: DType, planted: Planted) -> None:
    found = made(planted("f32", OWN), Options(dtype=dtype))[DOWN][0, 1:4].tolist()
    assert found[:2] == [math.inf, -math.inf]
    assert math.isnan(found[2])


@pytest.mark.parametrize("fmt", ["f32", "bf16"])
def test_a_number_among_infinities_is_seen(fmt: str, planted: Planted) -> None:
    sentence = refused(planted(fmt, {**OWN, (DOWN, (9, 9)): 65536.0}), F16)
    assert sentence == f"{short(DOWN)}: numbers as large as 65,536 {ENDS}"


def test_infinities_of_the_source_can_be_quantized(planted: Planted) -> None:
    made(planted("f32", OWN), Options(dtype=DType.F32, quantize=QuantSpec()))


SCALE = DOWN.replace("weight", "scales")


@pytest.fixture
def affine(planted: Planted, tmp_path: Path) -> Path:
    """Return a source in MLX's affine mode, in which one scale is infinite."""
    folder = tmp_path / "affine"
    options = Options(dtype=DType.F32, quantize=QuantSpec())
    execute(make_plan(open_checkpoint(planted("f32", {(DOWN, (9, 99)): 2e6})), options), folder)
    overwrite(folder, SCALE, 0, np.float32(math.inf).tobytes())
    return folder


@pytest.mark.parametrize("dequantize", [False, True], ids=["moved", "decoded"])
def test_infinite_scales_of_the_source_stay(dequantize: bool, affine: Path) -> None:
    out = made(affine, Options(dtype=DType.F32, dequantize=dequantize))
    assert not mx.isfinite(out[DOWN if dequantize else SCALE][0, 0]).item()


@pytest.mark.parametrize("options", [F16, F16_DECODED], ids=["moved", "decoded"])
def test_a_finite_scale_among_infinite_ones_is_seen(options: Options, affine: Path) -> None:
    assert refused(affine, options).endswith(ENDS)


def test_codes_that_are_nan_stay(planted: Planted) -> None:
    source = planted("fp8", {})
    overwrite(source, DOWN, 5, b"\x7f")
    assert math.isnan(made(source, F16_DECODED)[DOWN][0, 5].item())


# --- the scan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_scan_knows_every_16_bits(dtype: mx.Dtype) -> None:
    # All but the infinities at once, and each of them alone among zeros.
    bits = mx.arange(1 << 16, dtype=mx.uint32).astype(mx.uint16)
    numbers, infinite = np.array(bits), np.array(mx.isinf(bits.view(dtype)))
    assert not holds_infinity(mx.array(numbers[~infinite]).view(dtype))
    assert infinite.sum() == 2
    for number in numbers[infinite]:
        array = mx.zeros((3, 4), mx.uint16)
        array[1, 2] = int(number)
        assert holds_infinity(array.view(dtype)), number


@pytest.mark.parametrize("number", [math.inf, -math.inf])
@pytest.mark.parametrize("around", [-1.0, 1.0, math.nan, -math.nan])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_the_scan_sees_any_place_of_any_layout(dtype: mx.Dtype, around: float, number: float) -> None:
    for place in ((0, 0, 0), (1, 2, 3), (2, 3, 4)):
        array = mx.full((3, 4, 5), around, dtype)
        assert not holds_infinity(array)
        array[place] = number
        for seen in (array, array.swapaxes(1, 2), array[:, ::-1], array.reshape(-1)):
            assert holds_infinity(seen)


def test_the_scan_of_nothing_and_of_the_largest() -> None:
    assert not holds_infinity(mx.zeros((0, 4)))
    assert not holds_infinity(mx.array([3.4028235e38, -3.4028235e38]))
