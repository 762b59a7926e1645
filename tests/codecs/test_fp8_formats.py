"""Every way that E4M3 codes and their scales are stored, against numpy and ml_dtypes, bit for bit."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from conversion import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from native import mlx_form
from numpy.typing import NDArray
from safetensors import safe_open
from support import sample

from mla_tools.codecs import Bundle, Dense, MlxQuantized, Module, bundle, repacking
from mla_tools.codecs.fp8 import SAMPLES, claim
from mla_tools.codecs.fp8_block import MXFP8, Fp8Block
from mla_tools.errors import MlaToolsError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.quantization import QuantSpec
from mla_tools.samples import write_sample
from mla_tools.spec import DType, Spec
from mla_tools.weights import sanitize

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NUMPY = {
    DType.F32: np.dtype(np.float32),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F8_E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
    DType.U8: np.dtype(ml_dtypes.float8_e8m0fnu),
}

UE8M0 = {"scale_fmt": "ue8m0"}


class Layout(NamedTuple):
    """Stored shapes, and the block that one scale covers in rows and columns of one expert."""

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    block: tuple[int, int]
    dtype: DType = DType.F32
    name: str = "weight_scale_inv"
    leaf: str = "weight"
    section: dict[str, object] = {}  # noqa: RUF012
    codes_dtype: DType = DType.F8_E4M3

    @property
    def module(self) -> Module:
        leaves = {self.leaf: Spec(self.codes, self.codes_dtype), self.name: Spec(self.scales, self.dtype)}
        return Module(leaves, self.codes[-1], self.section)


BIG = 1 << 20
GATE = {"leaf": "gate_up_proj", "name": "gate_up_proj_scale_inv"}

LAYOUTS = {
    "v3": Layout((192, 320), (2, 3), (128, 128)),
    "v3_bytes": Layout((192, 320), (2, 3), (128, 128), codes_dtype=DType.U8),
    "v3_small": Layout((5, 33), (1, 1), (128, 128)),
    "v3_config": Layout((192, 320), (2, 3), (128, 128), section={"weight_block_size": [128, 128]}),
    "config_64": Layout((150, 320), (3, 5), (64, 64), section={"weight_block_size": [64, 64]}),
    "config_1x128": Layout((6, 320), (6, 3), (1, 128), section={"weight_block_size": [1, 128]}),
    "config_null": Layout((192, 320), (2, 3), (128, 128), section={"weight_block_size": None}),
    "v3_bf16": Layout((192, 320), (2, 3), (128, 128), DType.BF16),
    "v3_f16": Layout((192, 320), (2, 3), (128, 128), DType.F16),
    "v31": Layout((192, 320), (2, 3), (128, 128), section=UE8M0),
    "e8m0": Layout((192, 320), (2, 3), (128, 128), DType.F8_E8M0),
    "e8m0_ragged_groups": Layout((192, 300), (2, 3), (128, 128), DType.F8_E8M0),
    "e8m0_in_bytes": Layout((192, 320), (2, 3), (128, 128), DType.U8),
    "all_bytes": Layout((192, 320), (2, 3), (128, 128), DType.U8, codes_dtype=DType.U8),
    "v4": Layout((192, 320), (2, 3), (128, 128), DType.F8_E8M0, "scale"),
    "v4_bytes": Layout((192, 320), (2, 3), (128, 128), DType.U8, "scale", codes_dtype=DType.U8),
    "v4_base": Layout((192, 320), (2, 3), (128, 128), DType.F32, "scale"),
    "v41": Layout((72, 160), (3, 5), (32, 32), DType.F8_E8M0, "scale"),
    "32x32": Layout((72, 150), (3, 5), (32, 32)),
    "1x32": Layout((6, 160), (6, 5), (1, 32), DType.U8, "weight_scale"),
    "tensor": Layout((6, 160), (), (BIG, BIG)),
    "tensor_1": Layout((6, 160), (1,), (BIG, BIG), DType.BF16),
    "tensor_1x1": Layout((600, 160), (1, 1), (BIG, BIG)),
    "tensor_e8m0": Layout((6, 160), (), (BIG, BIG), DType.F8_E8M0),
    "row": Layout((6, 160), (6,), (1, BIG)),
    "row_column": Layout((6, 160), (6, 1), (1, BIG), DType.F16),
    "row_e8m0": Layout((6, 160), (6, 1), (1, BIG), DType.F8_E8M0),
    "ct_tensor": Layout((6, 160), (1,), (BIG, BIG), DType.BF16, "weight_scale"),
    "ct_row": Layout((6, 160), (6, 1), (1, BIG), DType.BF16, "weight_scale"),
    "ct_row_bytes": Layout((6, 160), (6, 1), (1, BIG), DType.BF16, "weight_scale", codes_dtype=DType.U8),
    "ct_block": Layout((192, 320), (2, 3), (128, 128), DType.BF16, "weight_scale"),
    "modelopt": Layout((6, 160), (), (BIG, BIG), DType.F32, "weight_scale"),
    "fused": Layout((3, 200, 320), (3, 2, 3), (128, 128), **GATE),
    "fused_e8m0": Layout((3, 200, 320), (3, 2, 3), (128, 128), DType.F8_E8M0, **GATE),
    "fused_32": Layout((3, 40, 64), (3, 2, 2), (32, 32), DType.F8_E8M0, **GATE),
    "fused_v31": Layout((3, 200, 320), (3, 2, 3), (128, 128), section=UE8M0, **GATE),
    "fused_bytes": Layout((3, 40, 64), (3, 2, 2), (32, 32), codes_dtype=DType.U8, **GATE),
    "fused_expert": Layout((3, 7, 64), (3,), (BIG, BIG), DType.BF16, **GATE),
    "fused_expert_1": Layout((3, 7, 64), (3, 1), (BIG, BIG), **GATE),
    "fused_expert_1x1": Layout((3, 7, 64), (3, 1, 1), (BIG, BIG), **GATE),
    "fused_expert_e8m0": Layout((3, 7, 64), (3, 1, 1), (BIG, BIG), DType.F8_E8M0, **GATE),
    "fused_row": Layout((3, 7, 64), (3, 7), (1, BIG), **GATE),
    "fused_row_column": Layout((3, 7, 64), (3, 7, 1), (1, BIG), **GATE),
    "fused_row_e8m0": Layout((3, 7, 64), (3, 7), (1, BIG), DType.F8_E8M0, **GATE),
    "fused_all": Layout((3, 7, 64), (), (BIG, BIG), **GATE),
    "fused_all_1": Layout((3, 7, 64), (1,), (BIG, BIG), DType.BF16, **GATE),
    "one_expert": Layout((1, 7, 64), (1,), (BIG, BIG), **GATE),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

# Those that are a form of mxfp8: by themselves, and where the user asks for it.
KEPT = {name for name, layout in LAYOUTS.items() if layout.dtype in (DType.F8_E8M0, DType.U8)}
KEPT -= {"e8m0_ragged_groups"}
ASKED = KEPT | {"v31", "fused_v31"}
each_packed = pytest.mark.parametrize("layout", [LAYOUTS[name] for name in sorted(ASKED)], ids=sorted(ASKED))


def stored(layout: Layout, seed: int = 0) -> tuple[Bytes, NDArray[Any]]:
    """Return random codes, NaNs among them, and random scales in their own dtype."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, layout.codes, dtype=np.uint8)
    if layout.section == UE8M0:
        scales = np.exp2(rng.integers(-140, 120, layout.scales).clip(-127)).astype(np.float32)
    elif layout.dtype in (DType.F8_E8M0, DType.U8):
        scales = np.asarray(rng.integers(0, 255, layout.scales, dtype=np.uint8))
    else:
        scales = np.asarray(rng.lognormal(-3, 2, layout.scales)).astype(NUMPY[layout.dtype])
    return codes, np.asarray(scales)


def meant(codes: Bytes, scales: NDArray[Any], block: tuple[int, int]) -> Floats:
    """Return the numbers that codes and scales stand for, expert by expert and block by block."""
    numbers = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    experts = values.reshape(-1, *values.shape[-2:])
    count, rows, width = experts.shape
    down, across = -(-rows // block[0]), -(-width // block[1])
    # One scale for everything is the only case that experts share.
    wide = numbers.astype(np.float32).reshape(-1)
    wide = wide.repeat(count * down * across) if wide.size == 1 else wide
    tiles = wide.reshape(count, down, across)
    with np.errstate(over="ignore", invalid="ignore"):
        for e in range(count):
            for i in range(down):
                for k in range(across):
                    tile = (
                        e,
                        slice(i * block[0], (i + 1) * block[0]),
                        slice(k * block[1], (k + 1) * block[1]),
                    )
                    experts[tile] *= tiles[e, i, k]
    return experts.reshape(-1, width)


def array(values: NDArray[Any]) -> mx.array:
    """Return an array of MLX as the reader makes it."""
    if values.dtype == ml_dtypes.bfloat16:
        return mx.array(values.view(np.uint16)).view(mx.bfloat16)
    return mx.array(values)


def rows_of(values: NDArray[Any], first: int, last: int) -> mx.array:
    width = values.shape[-1] if values.ndim else 1
    return array(np.ascontiguousarray(values.reshape(-1, width)[first:last]))


def parts_of(layout: Layout, codec: Fp8Block, start: int, stop: int, seed: int = 0) -> dict[str, mx.array]:
    codes, scales = stored(layout, seed)
    held = {"weight": codes, codec.part: scales}
    return {part: rows_of(held[part], *rows) for part, rows in codec.cut(start, stop).items()}


def codec_of(layout: Layout) -> Fp8Block:
    (found,) = claim(layout.module)
    assert isinstance(found.codec, Fp8Block)
    return found.codec


def same(left: mx.array, right: Floats) -> bool:
    """Return whether all numbers are the same bits, and NaNs in the same places."""
    got = np.array(left.astype(mx.float32))
    nan = np.isnan(right)
    return (
        got.shape == right.shape
        and np.array_equal(np.isnan(got), nan)
        and np.array_equal(got[~nan].view(np.uint32), right[~nan].view(np.uint32))
    )


# --- claims ------------------------------------------------------------------------------------------


@each_layout
def test_codes_and_scales_are_one_tensor(layout: Layout) -> None:
    (found,) = claim(layout.module)
    assert (found.leaf, found.spec) == (layout.leaf, Spec(layout.codes, DType.BF16))
    assert sorted(found.parts.values()) == sorted(layout.module.leaves)
    # The codec says of itself what lies in the file.
    encoded = found.codec.encoded(found.spec)
    assert encoded["weight"] == Spec(layout.codes, DType.F8_E4M3)
    assert {found.parts[part]: spec for part, spec in encoded.items()} | {
        layout.leaf: layout.module.leaves[layout.leaf]
    } == layout.module.leaves
    assert bundle(layout.module) == Bundle([found], {}, {})


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("v3", "fp8 128x128"),
        ("v41", "fp8 32x32"),
        ("config_1x128", "fp8 1x128"),
        ("row", "fp8 per row"),
        ("fused_row", "fp8 per row"),
        ("tensor", "fp8 per tensor"),
        ("fused_all", "fp8 per tensor"),
    ],
)
def test_words(name: str, word: str) -> None:
    assert codec_of(LAYOUTS[name]).name == word


V3 = LAYOUTS["v3"]
FUSED = LAYOUTS["fused"]
REFUSED = {
    "rows": (
        V3._replace(scales=(3, 3)),
        r"F32 \[3, 3\], but weight \[192, 320\] needs \[2, 3\] in blocks of",
    ),
    "columns": (V3._replace(scales=(2, 4)), r"\[2, 3\] in blocks of 128x128 or \[6, 10\] in blocks of 32x32"),
    "every_way": (V3._replace(scales=(7,)), r"or \[192, 1\] or \[192\] or \[1, 1\] or \[1\] or \[\]"),
    "per_column": (V3._replace(scales=(1, 320)), r"\[1, 320\], but"),
    "config": (
        V3._replace(section={"weight_block_size": [64, 64]}),
        r"\[2, 3\], but.*needs \[3, 5\] in blocks of 64x64 \(weight_block_size in config.json\)",
    ),
    "config_and_one_scale": (V3._replace(scales=(), section={"weight_block_size": [128, 128]}), r"\[2, 3\]"),
    "config_word": (V3._replace(section={"weight_block_size": "128"}), "two integers.*'128'"),
    "config_zero": (V3._replace(section={"weight_block_size": [0, 128]}), r"two integers.*\[0, 128\]"),
    "config_three": (V3._replace(section={"weight_block_size": [1, 2, 3]}), "two integers"),
    "config_truth": (V3._replace(section={"weight_block_size": [True, 128]}), "two integers"),
    "f64": (V3._replace(dtype=DType.F64), "weight_scale_inv is F64"),
    "e4m3_scales": (V3._replace(dtype=DType.F8_E4M3), "weight_scale_inv is F8_E4M3"),
    "vector": (V3._replace(codes=(192,), scales=(2,)), r"F8_E4M3 \[192\]; FP8 weights must have two axes"),
    "four_axes": (V3._replace(codes=(1, 1, 192, 320)), "two axes, or three"),
    "empty": (V3._replace(codes=(0, 320), scales=(0, 3)), r"\[0, 320\]"),
    "experts": (
        FUSED._replace(scales=(2, 2, 3)),
        r"\[2, 2, 3\], but gate_up_proj \[3, 200, 320\].*\[3, 2, 3\]",
    ),
    # Blocks do not run across experts.
    "across_experts": (FUSED._replace(scales=(5, 3)), r"\[5, 3\], but"),
}


@pytest.mark.parametrize(("layout", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_scales_that_do_not_fit_are_refused_with_the_numbers(layout: Layout, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        claim(layout.module)


def test_scales_under_two_names_are_refused() -> None:
    leaves = {**V3.module.leaves, "weight_scale": Spec((), DType.F32)}
    with pytest.raises(ValueError, match="weight has two scales: weight_scale_inv and weight_scale"):
        claim(Module(leaves, 320, {}))


def other(**leaves: tuple[str, tuple[int, ...]]) -> Module:
    return Module({leaf: Spec(shape, DType[dtype]) for leaf, (dtype, shape) in leaves.items()}, 320, {})


NVFP4 = other(
    weight=("U8", (192, 160)),
    weight_scale=("F8_E4M3", (192, 20)),
    weight_scale_2=("F32", ()),
    input_scale=("F32", ()),
)
OTHERS = {
    "nvfp4": NVFP4,
    "nvfp4_bytes": Module({**NVFP4.leaves, "weight_scale": Spec((192, 20), DType.U8)}, 320, {}),
    "quark_mxfp4": other(weight=("U8", (192, 160)), weight_scale=("U8", (192, 10))),
    "v4_fp4": other(weight=("I8", (192, 160)), scale=("F8_E8M0", (192, 10))),
    "v4_fp4_bytes": other(weight=("U8", (192, 160)), scale=("U8", (192, 10))),
    "unknown_bytes": Module({"weight": Spec((6, 64), DType.U8), "scale": Spec((), DType.F32)}, None, {}),
    "int4": other(weight_packed=("I32", (192, 40)), weight_scale=("BF16", (192, 10))),
    "int8": other(weight=("I8", (192, 320)), weight_scale=("BF16", (192, 1))),
    "dense": other(weight=("BF16", (192, 320)), weight_scale_inv=("F32", (2, 3))),
    "e5m2": other(weight=("F8_E5M2", (192, 320)), weight_scale_inv=("F32", (2, 3))),
    "no_scale": other(weight=("F8_E4M3", (192, 320))),
    "parameters": other(scale=("F32", (3,)), fn=("F32", (24, 320)), base=("F32", (24,))),
    "scale_of_another_leaf": other(gate_up_proj=("F8_E4M3", (3, 7, 64)), scale=("F32", (3,))),
}


@pytest.mark.parametrize("module", OTHERS.values(), ids=OTHERS.keys())
def test_other_formats_are_left_alone(module: Module) -> None:
    assert claim(module) == []


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("F8_E4M3", r"F8_E4M3 without a scale \(weight_scale_inv, weight_scale or scale\)"),
        ("F8_E5M2", "F8_E5M2 codes are not supported"),
        ("F8_E8M0", "F8_E8M0 is a dtype of scales"),
    ],
)
def test_what_is_not_read_is_explained(dtype: str, text: str) -> None:
    assert re.search(text, bundle(other(weight=(dtype, (192, 320)))).unread["weight"])


# --- decoding ----------------------------------------------------------------------------------------


@each_layout
def test_decode_is_code_times_scale(layout: Layout) -> None:
    codec = codec_of(layout)
    wanted = meant(*stored(layout), layout.block)
    rows = len(wanted)
    got = codec.decode(parts_of(layout, codec, 0, rows), 0, rows, DType.F32)
    assert got.dtype == mx.float32
    assert same(got, wanted)


@each_layout
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_rows_are_those_of_the_whole(layout: Layout, data: st.DataObject) -> None:
    codec = codec_of(layout)
    wanted = meant(*stored(layout), layout.block)
    start = data.draw(st.integers(0, len(wanted) - 1))
    stop = data.draw(st.integers(start + 1, len(wanted)))
    parts = parts_of(layout, codec, start, stop)
    assert same(codec.decode(parts, start, stop, DType.F32), wanted[start:stop])
    if codec.packs:
        assert_same_numbers(codec.to_native(parts, start, stop), wanted[start:stop])


def test_no_rows_take_no_scales() -> None:
    assert codec_of(V3).cut(0, 0) == {"weight": (0, 0), "_scale_inv": (0, 0)}


@pytest.mark.parametrize("name", ["v3", "e8m0", "ct_row", "fused_expert"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16], ids=lambda dtype: dtype.name)
def test_narrow_dtypes_are_rounded_once(name: str, dtype: DType) -> None:
    layout = LAYOUTS[name]
    codec = codec_of(layout)
    with np.errstate(over="ignore"):
        wanted = meant(*stored(layout), layout.block).astype(NUMPY[dtype]).astype(np.float32)
    got = codec.decode(parts_of(layout, codec, 0, len(wanted)), 0, len(wanted), dtype)
    assert got.dtype == getattr(mx, dtype.mlx)
    assert same(got, wanted)


def test_every_byte_of_e8m0_is_a_power_of_two() -> None:
    codec = Fp8Block((1, 32), DType.F8_E8M0)
    codes = mx.full((256, 32), 0x38, dtype=mx.uint8)
    scales = mx.arange(256, dtype=mx.uint8).reshape(256, 1)
    got = codec.decode({"weight": codes, "_scale_inv": scales}, 0, 256, DType.F32)
    wanted = np.exp2(np.arange(256) - 127.0)
    wanted[255] = np.nan
    wanted = wanted.astype(np.float32)
    assert same(got, wanted[:, None].repeat(32, 1))
    assert got[0, 0].item() == 2.0**-127


# --- mxfp8 -------------------------------------------------------------------------------------------


def assert_same_numbers(made: dict[str, mx.array], wanted: Floats) -> None:
    assert {part: value.dtype for part, value in made.items()} == {"weight": mx.uint32, "scales": mx.uint8}
    again = mx.dequantize(
        made["weight"], made["scales"], mode="mxfp8", group_size=32, bits=8, dtype=mx.float32
    )
    assert same(again, wanted)


@each_layout
def test_who_is_kept_as_mxfp8(layout: Layout) -> None:
    name = next(name for name, entry in LAYOUTS.items() if entry is layout)
    codec = codec_of(layout)
    assert codec.native == (MXFP8 if name in KEPT else None)
    assert codec.on_request == (MXFP8 if name in ASKED else None)
    assert (repacking(codec, mlx_form(MXFP8)) is not None) == (name in ASKED)
    for target in (Dense(DType.BF16), MlxQuantized(QuantSpec(), DType.BF16, True)):
        assert repacking(codec, target) is None


@each_packed
def test_keep_moves_bits_and_changes_no_number(layout: Layout) -> None:
    codec = codec_of(layout)
    codes, scales = stored(layout)
    wanted = meant(codes, scales, layout.block)
    repack = repacking(codec, mlx_form(MXFP8))
    assert repack is not None
    made = dict(repack(parts_of(layout, codec, 0, len(wanted)), 0, len(wanted)))
    assert {part: value.shape for part, value in made.items()} == {
        part: (len(wanted), spec.width)
        for part, spec in mlx_form(MXFP8).encoded(Spec(layout.codes, DType.BF16)).items()
    }
    assert np.array_equal(np.array(made["weight"]).view(np.uint8), codes.reshape(len(wanted), -1))
    assert_same_numbers(made, wanted)


def test_every_code_at_every_exponent_is_the_same_number_in_mxfp8() -> None:
    codec = Fp8Block((1, 32), DType.F8_E8M0, packs=True)
    codes = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
    scales = np.arange(255, dtype=np.uint8)[:, None].repeat(8, 1)
    parts = {"weight": array(codes), "_scale_inv": array(scales)}
    wanted = meant(codes, scales, (1, 32))
    assert_same_numbers(codec.to_native(parts, 0, 255), wanted)
    # NaN codes stay NaN, 448 x 2^127 is infinite, and 2^-9 x 2^-127 is still a number.
    assert np.isnan(wanted[:, [0x7F, 0xFF]]).all()
    assert np.isinf(wanted[254, 0x7E])
    assert wanted[0, 1] == 2.0**-136


def test_declared_powers_of_two_move_whatever_the_dtype_asked_for() -> None:
    layout = LAYOUTS["v31"]
    codec = codec_of(layout)
    repack = repacking(codec, MlxQuantized(QuantSpec("mxfp8"), DType.F16, False))
    assert repack is not None
    assert_same_numbers(
        dict(repack(parts_of(layout, codec, 0, 192), 0, 192)), meant(*stored(layout), layout.block)
    )


BAD = [3.0, 0.0, -0.0, -0.5, np.nan, np.inf, -np.inf, 2.0**-128, 2.0**-149, 1 + 2.0**-23]


@pytest.mark.parametrize("number", BAD, ids=str)
def test_a_scale_that_is_no_power_of_two_is_named(number: float) -> None:
    codec = codec_of(LAYOUTS["v31"])
    scales = np.ones((2, 3), np.float32)
    scales[1, 2] = number
    codes = np.zeros((192, 320), np.uint8)
    parts = {"weight": array(codes), "_scale_inv": array(scales)}
    with pytest.raises(MlaToolsError, match=re.escape(f"but one is {float(np.float32(number))}")):
        codec.to_native(parts, 0, 192)
    # Rows that it does not concern are kept.
    codec.to_native({"weight": array(codes[:128]), "_scale_inv": array(scales[:1])}, 0, 128)


@pytest.mark.parametrize("power", [-127, -126, -1, 0, 127])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_extreme_powers_of_two_are_kept(power: int, dtype: Any) -> None:
    codec = Fp8Block((1, 32), DType.F32 if dtype is np.float32 else DType.BF16, packs=True)
    codes = np.arange(256, dtype=np.uint8)[None]
    scales = np.full((1, 8), 2.0**power).astype(dtype)
    parts = {"weight": array(codes), "_scale_inv": array(scales)}
    assert_same_numbers(codec.to_native(parts, 0, 1), meant(codes, scales, (1, 32)))


def test_nan_scales_are_refused_because_mlx_reads_infinity() -> None:
    scales = mx.full((1, 1), 255, dtype=mx.uint8)
    codes = mx.full((1, 32), 0x38, dtype=mx.uint8)
    read = mx.dequantize(codes.view(mx.uint32), scales, mode="mxfp8", dtype=mx.float32)
    assert mx.all(mx.isinf(read)).item()
    codec = codec_of(LAYOUTS["e8m0"])
    with pytest.raises(MlaToolsError, match="but one is nan"):
        codec.to_native(
            {"weight": mx.zeros((1, 320), mx.uint8), "_scale_inv": mx.full((1, 3), 255, mx.uint8)}, 0, 1
        )


def test_what_cannot_be_kept_says_so() -> None:
    with pytest.raises(TypeError, match="fp8 128x128"):
        codec_of(V3).to_native({}, 0, 1)


# --- encoding ----------------------------------------------------------------------------------------


@each_layout
def test_encoding_loses_at_most_half_a_step(layout: Layout) -> None:
    codec = codec_of(layout)
    values = np.random.default_rng(1).standard_normal(layout.codes).astype(np.float32)
    parts = codec.encode(mx.array(values))
    encoded = codec.encoded(Spec(layout.codes, DType.BF16))
    assert {part: (tuple(value.shape), value.dtype) for part, value in parts.items()} == {
        part: (spec.shape, getattr(mx, spec.dtype.mlx)) for part, spec in encoded.items()
    }
    flat = {part: value.reshape(-1, value.shape[-1] if value.ndim else 1) for part, value in parts.items()}
    values = values.reshape(-1, layout.codes[-1])
    again = np.array(codec.decode(flat, 0, len(values), DType.F32))
    # 3 bits of mantissa: half a step is 2^-4 of the number, or 2^-10 scales where numbers are subnormal.
    largest = 2 * np.abs(values).max() / 448
    assert (np.abs(again - values) <= np.maximum(np.abs(values) * 2**-4, largest * 2**-10) * 1.01).all()
    if codec.packs:
        assert_same_numbers(codec.to_native(flat, 0, len(values)), again)


# --- whole checkpoints -------------------------------------------------------------------------------

NEW = [name for name in SAMPLES if name != "fp8"]
# (rows, columns) of a block of the samples
BLOCKS = {
    "fp8": (128, 128),
    "fp8-ue8m0-f32": (128, 128),
    "fp8-ue8m0": (128, 128),
    "fp8-32x32": (32, 32),
    "fp8-tensor": (BIG, BIG),
    "ct-fp8-channel": (1, BIG),
    "ct-fp8-block": (128, 128),
}
MXFP8_SAMPLES = ("fp8-ue8m0", "fp8-32x32")
HEADERS = {
    "fp8-ue8m0-f32": ("weight_scale_inv", "F32", [3, 1]),
    "fp8-ue8m0": ("weight_scale_inv", "F8_E8M0", [3, 1]),
    "fp8-32x32": ("scale", "F8_E8M0", [12, 4]),
    "fp8-tensor": ("weight_scale_inv", "BF16", []),
    "ct-fp8-channel": ("weight_scale", "BF16", [384, 1]),
    "ct-fp8-block": ("weight_scale", "BF16", [3, 1]),
}
FAMILIES = ("deepseek_v3", "glm4_moe_lite")
each_sample = pytest.mark.parametrize(
    ("family", "fmt"), [(family, fmt) for family in FAMILIES for fmt in NEW]
)


def entries(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(name)
                found[name] = (piece.get_dtype(), piece.get_shape())
    assert found, f"{folder} holds no weights"
    return found


def raw(folder: Path) -> dict[str, NDArray[Any]]:
    """Return all tensors of a folder in numpy's dtypes, from the bytes of its files."""
    dtypes = {dtype.name: kind for dtype, kind in NUMPY.items()} | {
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "U8": np.dtype(np.uint8),
        "U32": np.dtype(np.uint32),
    }
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                flat = np.frombuffer(data[first:last], dtypes[entry["dtype"]])
                found[name] = flat.reshape(entry["shape"])
    assert found, f"{folder} holds no weights"
    return found


@cache
def expected(family: str, fmt: str) -> dict[str, Floats]:
    """Return the weights under mlx-lm's names that a sample stands for, made with numpy alone."""
    stored_tensors = raw(sample(family, fmt))
    config = json.loads((sample(family, fmt) / "config.json").read_text())
    part, _, _ = HEADERS[fmt]
    floats: dict[str, Floats] = {}
    for name, values in stored_tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == part or ".layers.4." in name:
            continue
        if values.dtype == ml_dtypes.float8_e4m3fn:
            scales = stored_tensors[f"{module}.{part}"]
            floats[name] = meant(values.view(np.uint8), scales, BLOCKS[fmt])
        else:
            floats[name] = values.astype(np.float32)
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    wanted: dict[str, Floats] = {}
    experts: dict[str, dict[int, Floats]] = {}
    for name, values in floats.items():
        if name.endswith("kv_b_proj.weight"):
            prefix = name.removesuffix("kv_b_proj.weight")
            per_head = values.reshape(heads, -1, values.shape[-1])
            wanted[f"{prefix}embed_q.weight"] = per_head[:, :nope].swapaxes(1, 2)
            wanted[f"{prefix}unembed_out.weight"] = per_head[:, nope:]
        elif match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(.*)", name):
            experts.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = values
        else:
            wanted[name] = values
    return wanted | {name: np.stack([some[e] for e in sorted(some)]) for name, some in experts.items()}


def written(folder: Path) -> dict[str, Floats]:
    """Return the weights of an output in float32, its mxfp8 and affine modules decoded by MLX."""
    config = json.loads((folder / "config.json").read_text())
    section = config.get("quantization", {})
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(file))
    assert tensors, f"{folder} holds no weights"
    found = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases"):
            continue
        if f"{path}.scales" in tensors and leaf == "weight":
            entry = section.get(path, section)
            value = mx.dequantize(
                value,
                tensors[f"{path}.scales"],
                tensors.get(f"{path}.biases"),
                group_size=entry["group_size"],
                bits=entry["bits"],
                mode=entry["mode"],
                dtype=mx.float32,
            )
        found[name] = np.array(value.astype(mx.float32))
    return found


def assert_loads(folder: Path) -> None:
    model, _ = load_model(folder, strict=True)
    # On CPU, MLX has the experts' product in float32 alone.
    model.set_dtype(mx.float32)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.all(mx.isfinite(logits)).item()


@each_sample
def test_samples_have_the_headers_of_the_format(family: str, fmt: str) -> None:
    found = entries(sample(family, fmt))
    part, dtype, shape = HEADERS[fmt]
    # 4 heads of 64 + 32 rows, from a rank of 128
    module = "model.layers.0.self_attn.q_b_proj"
    assert found[f"{module}.weight"] == ("F8_E4M3", [384, 128])
    assert found[f"{module}.{part}"] == (dtype, shape)
    assert found["model.embed_tokens.weight"][0] == "BF16"
    # Our own reader agrees with the safetensors package.
    ours = {
        name: (t.spec.dtype.name, list(t.spec.shape))
        for name, t in open_checkpoint(sample(family, fmt)).tensors.items()
    }
    assert ours == found


@each_sample
def test_in_float32_every_number_is_the_checkpoints_own(family: str, fmt: str, tmp_path: Path) -> None:
    convert(sample(family, fmt), tmp_path / "out", "--dtype", "float32", "--embed-q", "float")
    wanted, got = expected(family, fmt), written(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(got[name], values), name
    assert_loads(tmp_path / "out")


@each_sample
def test_by_default_only_bfloat16_rounds(family: str, fmt: str, tmp_path: Path) -> None:
    plan = convert(sample(family, fmt), tmp_path / "out")
    moves = [target for step in plan.steps for target in step.targets if target.moved]
    assert bool(moves) == (fmt in MXFP8_SAMPLES)
    assert {target.exactness for target in moves} <= {"repacked"}
    assert ("quantization" in plan.config) == (fmt in MXFP8_SAMPLES)
    wanted, got = expected(family, fmt), written(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        if "embed_q" in name and fmt in MXFP8_SAMPLES:
            # 8 bits in groups of 32, which is the default of --embed-q.
            scale = np.abs(values).reshape(-1, 32).max(-1, keepdims=True)
            assert (np.abs(got[name] - values).reshape(-1, 32) <= scale / 50).all(), name
        elif name.endswith("e_score_correction_bias"):
            assert np.array_equal(got[name], values), name
        else:
            rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
            assert np.array_equal(got[name], rounded), name
            exact = fmt in (*MXFP8_SAMPLES, "fp8-ue8m0-f32")
            assert not exact or np.array_equal(got[name], values), name
    assert_loads(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ["fp8-ue8m0-f32", "fp8-ue8m0", "fp8-32x32"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_asked_for_mxfp8_moves_the_bits(family: str, fmt: str, dtype: str | None, tmp_path: Path) -> None:
    flags = ["-q", "--q-mode", "mxfp8", *(["--dtype", dtype] if dtype else [])]
    plan = convert(sample(family, fmt), tmp_path / "out", *flags)
    moves = {target.name for step in plan.steps for target in step.targets if target.moved}
    wanted, got = expected(family, fmt), written(tmp_path / "out")
    assert got.keys() == wanted.keys()
    assert any("switch_mlp" in name for name in moves)
    assert any("unembed_out" in name for name in moves)
    for name in moves:
        assert np.array_equal(got[name], wanted[name]), name
    assert_loads(tmp_path / "out")


def test_asked_for_mxfp8_what_is_not_what_it_is_declared_to_be_stops_the_run(tmp_path: Path) -> None:
    write_sample("glm4_moe_lite", tmp_path / "source", "fp8")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlaToolsError, match=r"must be powers of two.*but one is 0\.0"):
        convert(tmp_path / "source", tmp_path / "out", "-q", "--q-mode", "mxfp8")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    convert(tmp_path / "source", tmp_path / "plain")


@each_sample
def test_arrays_that_have_lost_their_dtypes_are_read_alike(family: str, fmt: str) -> None:
    folder = sample(family, fmt)
    weights: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        weights |= mx.load(str(file))
    made = sanitize(weights, json.loads((folder / "config.json").read_text()), embed_q="float")
    assert any(name.endswith(".scales") for name in made) == (fmt in MXFP8_SAMPLES)
    for name, values in expected(family, fmt).items():
        got = made[name]
        if got.dtype == mx.uint32:
            scales = made[name.removesuffix("weight") + "scales"]
            got = mx.dequantize(got, scales, mode="mxfp8", group_size=32, bits=8, dtype=mx.float32)
        rounded = values if got.dtype == mx.float32 else values.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(np.array(got.astype(mx.float32)), rounded), name
