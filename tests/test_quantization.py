"""`quantization` against mlx and mlx-lm, and the block-float modes against ml_dtypes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.models import deepseek_v3, kimi_k25, longcat_flash
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import infer_quant_config

from mla_tools.errors import UsageError
from mla_tools.quantization import (
    MODES,
    RECIPES,
    QuantSpec,
    dequantize,
    dequantize_multilinear,
    infer_spec,
    quantize,
    quantize_multilinear,
    recipe_spec,
)

FLOATS = pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16], ids=lambda dtype: str(dtype).split(".")[-1]
)
ALL_SPECS = [
    QuantSpec(mode, bits, group_size)
    for mode, (all_bits, group_sizes) in MODES.items()
    for bits in all_bits
    for group_size in group_sizes
]
BLOCK_FLOATS = [QuantSpec(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")]
ONE_PER_MODE = [QuantSpec(), *BLOCK_FLOATS]


def same_bits(left: mx.array, right: mx.array) -> bool:
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[left.dtype.size]
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and bool(mx.array_equal(left.view(words), right.view(words)))


def random(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@pytest.mark.parametrize("module", ["mla_tools.quantization", "mla_tools.mla", "mla_tools.kv_b"])
def test_importing_does_not_import_mlx(module: str) -> None:
    code = f"import sys, {module}; print(*({{'mlx', 'mlx_lm'}} & set(sys.modules)), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- QuantSpec


@pytest.mark.parametrize(
    ("spec", "config", "text"),
    [
        (QuantSpec(), {"group_size": 64, "bits": 4, "mode": "affine"}, "affine 4-bit g64"),
        (QuantSpec(bits=8), {"group_size": 64, "bits": 8, "mode": "affine"}, "affine 8-bit g64"),
        (QuantSpec("affine", 3, 128), {"group_size": 128, "bits": 3, "mode": "affine"}, "affine 3-bit g128"),
        (QuantSpec("mxfp4"), {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mxfp4"),
        (QuantSpec("mxfp8"), {"group_size": 32, "bits": 8, "mode": "mxfp8"}, "mxfp8"),
        (QuantSpec("nvfp4", 4, 16), {"group_size": 16, "bits": 4, "mode": "nvfp4"}, "nvfp4"),
    ],
    ids=str,
)
def test_spec_config_and_text(spec: QuantSpec, config: dict[str, Any], text: str) -> None:
    assert spec.config == config
    assert str(spec) == text
    assert spec.has_biases == (config["mode"] == "affine")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: QuantSpec("int4"), "'int4' does not exist; the modes are affine, mxfp4, mxfp8, nvfp4"),
        (lambda: QuantSpec(bits=7), "affine quantization has no bits 7; it takes 2, 3, 4, 5, 6, 8"),
        (lambda: QuantSpec(bits=0), "affine quantization has no bits 0; it takes 2, 3, 4, 5, 6, 8"),
        (lambda: QuantSpec(group_size=16), "affine quantization has no group size 16; it takes 32, 64, 128"),
        (lambda: QuantSpec("mxfp4", 8), "mxfp4 quantization has no bits 8; it takes 4"),
        (lambda: QuantSpec("mxfp8", 8, 64), "mxfp8 quantization has no group size 64; it takes 32"),
        (lambda: QuantSpec("nvfp4", group_size=32), "nvfp4 quantization has no group size 32; it takes 16"),
    ],
    ids=["mode", "bits", "zero-bits", "group", "mxfp4-bits", "mxfp8-group", "nvfp4-group"],
)
def test_spec_refuses_what_mlx_does_not_have(make: Any, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert text in str(caught.value)


def test_spec_is_a_value() -> None:
    spec = QuantSpec(bits=8)
    assert spec == QuantSpec("affine", 8, 64)
    assert len({spec, QuantSpec("affine", 8, 64), QuantSpec()}) == 2
    assert replace(spec, group_size=32) == QuantSpec("affine", 8, 32)
    with pytest.raises(FrozenInstanceError):
        spec.bits = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("8", QuantSpec("affine", 8, 64)),
        ("8,32", QuantSpec("affine", 8, 32)),
        ("8, 32", QuantSpec("affine", 8, 32)),
        ("8,32,mxfp8", QuantSpec("mxfp8")),
        ("3,128,affine", QuantSpec("affine", 3, 128)),
    ],
)
def test_parse(text: str, spec: QuantSpec) -> None:
    assert QuantSpec.parse(text) == spec


@pytest.mark.parametrize("text", ["", "mxfp4", "8,", "8,,mxfp8", "-8", "8.0", "8,32,mxfp8,4", "\u0668"])
def test_parse_refuses_nonsense(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a quantization; write BITS\[,GROUP\[,MODE\]\]"):
        QuantSpec.parse(text)


@pytest.mark.parametrize("text", ["7", "8,16", "8,32,mxfp4", "8,32,int"])
def test_parse_refuses_what_mlx_does_not_have(text: str) -> None:
    with pytest.raises(UsageError, match=r"it takes|the modes are"):
        QuantSpec.parse(text)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_packed_shapes_are_those_of_mlx(spec: QuantSpec) -> None:
    for width in (128, 384):
        weight, scales, *_ = mx.quantize(random(2, width), spec.group_size, spec.bits, mode=spec.mode)
        assert (spec.packed_width(width), spec.groups(width)) == (weight.shape[-1], scales.shape[-1])
        assert spec.divides(width)


@pytest.mark.parametrize("width", [0, 1, 65, 96])
def test_indivisible_width(width: int) -> None:
    spec = QuantSpec()
    assert not spec.divides(width)
    for method in (spec.packed_width, spec.groups):
        with pytest.raises(ValueError, match=f"group size 64 does not divide rows of {width} elements"):
            method(width)


# ---- infer_spec


@given(spec=st.sampled_from(ALL_SPECS), count=st.integers(1, 40))
def test_infer_is_the_inverse_of_the_shapes(spec: QuantSpec, count: int) -> None:
    width = spec.group_size * count
    inferred = infer_spec(
        width=width,
        packed_width=spec.packed_width(width),
        groups=spec.groups(width),
        scales_are_uint8=not spec.has_biases,
    )
    assert inferred == spec


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_infer_agrees_with_mlx_lm(spec: QuantSpec) -> None:
    layer = MultiLinear(256, 4, 2)
    weights = {f"a.{part}": array for part, array in quantize(layer.weight, spec).items()}
    assert infer_quant_config("a", layer, weights) == spec.config


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            (64, 9, 2, False),
            "64 elements stored as 9 uint32 words with 2 float scales: 4.5 bits and group size 32",
        ),
        (
            (64, 8, 3, False),
            "64 elements stored as 8 uint32 words with 3 float scales: 4 bits and group size 21.3",
        ),
        (
            (64, 14, 2, False),
            "64 elements stored as 14 uint32 words with 2 float scales: 7 bits and group size 32",
        ),
        (
            (64, 8, 4, False),
            "64 elements stored as 8 uint32 words with 4 float scales: 4 bits and group size 16",
        ),
        (
            (64, 16, 4, True),
            "64 elements stored as 16 uint32 words with 4 uint8 scales: 8 bits and group size 16",
        ),
        (
            (64, 8, 1, True),
            "64 elements stored as 8 uint32 words with 1 uint8 scales: 4 bits and group size 64",
        ),
        (
            (64, 8, 0, True),
            "64 elements stored as 8 uint32 words with 0 uint8 scales: 4 bits and group size ?",
        ),
        (
            (0, 0, 0, False),
            "0 elements stored as 0 uint32 words with 0 float scales: ? bits and group size ?",
        ),
    ],
    ids=lambda case: "-".join(map(str, case)) if isinstance(case, tuple) else "",
)
def test_infer_refuses_what_no_mode_has(case: tuple[int, int, int, bool], text: str) -> None:
    width, packed_width, groups, in_uint8 = case
    with pytest.raises(ValueError) as caught:
        infer_spec(width=width, packed_width=packed_width, groups=groups, scales_are_uint8=in_uint8)
    assert text in str(caught.value)


# ---- quantize and dequantize


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
@FLOATS
def test_bits_are_those_of_mlx(spec: QuantSpec, dtype: mx.Dtype) -> None:
    array = random(2, 3, 128, dtype=dtype)
    parts = quantize(array, spec)
    theirs = mx.quantize(array, spec.group_size, spec.bits, mode=spec.mode)
    assert list(parts) == ["weight", "scales", "biases"][: 2 + spec.has_biases]
    assert all(same_bits(ours, other) for ours, other in zip(parts.values(), theirs, strict=True))

    decoded = mx.dequantize(*theirs, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    assert same_bits(dequantize(parts, spec), decoded)
    assert dequantize(parts, spec).dtype == (dtype if spec.mode == "affine" else mx.bfloat16)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("affine", 8, 32)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_affine_in_float32_is_exact(spec: QuantSpec, dtype: mx.Dtype) -> None:
    codes = np.random.default_rng(0).integers(0, 2**spec.bits, (4, 128), dtype=np.uint64)
    per_word = 32 // spec.bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(spec.bits)
    packed = (codes.reshape(4, -1, per_word) << shifts).sum(-1).astype(np.uint32)
    scales = random(4, spec.groups(128), dtype=dtype, seed=1)
    biases = random(4, spec.groups(128), dtype=dtype, seed=2)

    # A code times a 16-bit float fits float64 many times over, and float32 is reached by rounding once
    # the product and once the sum.
    scale, bias = (np.array(x.astype(mx.float32)).repeat(spec.group_size, -1) for x in (scales, biases))
    expected = codes.astype(np.float32) * scale + bias
    parts = {"weight": mx.array(packed), "scales": scales, "biases": biases}
    assert same_bits(dequantize(parts, spec, mx.float32), mx.array(expected))
    # What mx.dequantize(dtype=float32) makes of it is rounded to the dtype of the scales on the way.
    loose = mx.dequantize(*parts.values(), group_size=spec.group_size, bits=spec.bits, dtype=mx.float32)
    assert not mx.array_equal(loose, mx.array(expected))


@pytest.mark.parametrize("spec", BLOCK_FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16], ids=["default", "float32", "float16"])
def test_block_floats_decode_as_ml_dtypes_says(spec: QuantSpec, dtype: mx.Dtype | None) -> None:
    rng = np.random.default_rng(0)
    # Codes without E4M3's two NaNs; scales in the range that weights have.
    codes = rng.integers(0, 2**spec.bits, (64, 64), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = rng.integers(100, 120, (64, spec.groups(64)), dtype=np.uint8)
    if spec.bits == 4:
        packed, element = codes[:, ::2] | codes[:, 1::2] << 4, ml_dtypes.float4_e2m1fn
    else:
        packed, element = codes, ml_dtypes.float8_e4m3fn
    scale = ml_dtypes.float8_e4m3fn if spec.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu

    values = codes.view(element).astype(np.float64)
    expected = values * scales.view(scale).astype(np.float64).repeat(spec.group_size, -1)
    parts = {"weight": mx.array(packed.view(np.uint32)), "scales": mx.array(scales)}
    decoded = dequantize(parts, spec, dtype)
    assert decoded.dtype == (mx.bfloat16 if dtype is None else dtype)
    if decoded.dtype == mx.float16:
        expected = expected.astype(np.float16)
    np.testing.assert_array_equal(np.array(decoded.astype(mx.float32)), expected.astype(np.float32))


def test_another_dtype_is_rounded_once() -> None:
    spec = QuantSpec()
    parts = quantize(random(8, 128, dtype=mx.bfloat16), spec)
    assert same_bits(
        dequantize(parts, spec, mx.float16), dequantize(parts, spec, mx.float32).astype(mx.float16)
    )
    assert same_bits(dequantize(parts, spec, mx.bfloat16), dequantize(parts, spec))


def test_affine_without_biases_has_biases_of_zero() -> None:
    spec = QuantSpec(bits=8)
    parts = quantize(random(8, 128, dtype=mx.bfloat16), spec)
    zeros = parts | {"biases": mx.zeros_like(parts["scales"])}
    del parts["biases"]
    for dtype in (None, mx.float32):
        assert same_bits(dequantize(parts, spec, dtype), dequantize(zeros, spec, dtype))
    assert "biases" not in parts


@pytest.mark.parametrize(
    ("shape", "text"), [((4, 100), "divisible by the quantization group size 64"), ((64,), "at least 2 dim")]
)
def test_quantize_refuses(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantize(mx.zeros(shape), QuantSpec())


# ---- MultiLinear


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_multilinear_round_trip(spec: QuantSpec) -> None:
    layer = MultiLinear(128, 6, 3)
    layer.weight = random(3, 6, 128, dtype=mx.bfloat16)
    quantized = quantize_multilinear(layer, spec)
    theirs = layer.to_quantized(spec.group_size, spec.bits, spec.mode).parameters()
    ours = quantized.parameters()
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[part], theirs[part]) for part in theirs)

    dense = dequantize_multilinear(quantized)
    assert type(dense) is MultiLinear
    assert dense.parameters().keys() == {"weight"}
    assert dense.weight.shape == layer.weight.shape
    decoded = mx.dequantize(*ours.values(), group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    assert same_bits(dense.weight, decoded)
    # Each side is what the other computes with: quantized_matmul against a plain one.
    inputs = random(2, 3, 5, 128, seed=1)
    # 0.005 is what rounding an affine weight to bfloat16 costs.
    assert mx.linalg.norm(quantized(inputs) - dense(inputs)) < 0.01 * mx.linalg.norm(dense(inputs))


@FLOATS
def test_multilinear_keeps_the_dtype_of_affine_scales(dtype: mx.Dtype) -> None:
    layer = MultiLinear(64, 2, 2)
    layer.weight = layer.weight.astype(dtype)
    assert dequantize_multilinear(quantize_multilinear(layer, QuantSpec())).weight.dtype == dtype


def test_multilinear_dequantizes_without_biases() -> None:
    quantized = quantize_multilinear(MultiLinear(64, 2, 2), QuantSpec())
    quantized.biases = mx.zeros_like(quantized.scales)
    expected = dequantize_multilinear(quantized).weight
    quantized.biases = None
    assert same_bits(dequantize_multilinear(quantized).weight, expected)


def test_multilinear_refuses_a_group_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="group size 64 does not divide rows of 96 elements"):
        quantize_multilinear(MultiLinear(96, 2, 2), QuantSpec())


# ---- recipes

TINY = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "qk_nope_head_dim": 4,
}


def deepseek(num_layers: int) -> Any:
    config = TINY | {"model_type": "deepseek_v3", "num_hidden_layers": num_layers}
    return deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))


def kimi(num_layers: int) -> Any:
    text = TINY | {"model_type": "kimi_k2", "num_hidden_layers": num_layers}
    return kimi_k25.Model(kimi_k25.ModelArgs.from_dict({"model_type": "kimi_k25", "text_config": text}))


def longcat(num_layers: int) -> Any:
    config = {key: value for key, value in TINY.items() if key != "intermediate_size"} | {
        "model_type": "longcat_flash",
        "num_layers": num_layers,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 8,
        "expert_ffn_hidden_size": 8,
        "moe_topk": 1,
        "n_routed_experts": 2,
        "zero_expert_num": 1,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
    }
    return longcat_flash.Model(longcat_flash.ModelArgs.from_dict(config))


def test_recipes_are_those_of_mlx_lm() -> None:
    ours = [recipe for recipe in RECIPES if not recipe.startswith("mla_")]
    assert ours == QUANT_RECIPES


@pytest.mark.parametrize("recipe", QUANT_RECIPES)
@pytest.mark.parametrize(
    ("build", "num_layers"),
    [(deepseek, 1), (deepseek, 8), (deepseek, 17), (deepseek, 61), (kimi, 17), (longcat, 9)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_recipe_agrees_with_mlx_lm(recipe: str, build: Any, num_layers: int) -> None:
    model = build(num_layers)
    predicate = mixed_quant_predicate_builder(recipe, model, 32)
    paths = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    # The fused name is what a conversion sees before mlx-lm's classes split it.
    paths += [path.replace("embed_q", "kv_b_proj") for path in paths if "embed_q" in path]
    theirs = {path: predicate(path, None) for path in paths}
    assert {path: recipe_spec(recipe, path, num_layers, 32).config for path in paths} == theirs
    assert len(paths) > 9 * num_layers
    # Both of the recipe's bit widths occur, so the comparison can tell them apart.
    assert len({entry["bits"] for entry in theirs.values()}) == 2


def test_a_path_without_a_layer_number_counts_as_index_0() -> None:
    path = "model.ngram_embeddings.embedders.0"
    predicate = mixed_quant_predicate_builder("mixed_3_6", deepseek(17))
    with pytest.raises(ValueError, match="embedders"):
        predicate(path, None)
    for suffix in ("", ".down_proj", ".other"):
        expected = predicate(f"model.layers.0{suffix}", None)
        assert recipe_spec("mixed_3_6", path + suffix, 17).config == expected
    assert recipe_spec("mixed_3_6", "model.layers", 17).bits == 3
    assert recipe_spec("mixed_3_6", "model.layers.norm.down_proj", 17).bits == 6


@pytest.mark.parametrize(
    ("recipe", "group_size", "text"),
    [
        ("mixed_2_8", 64, "predicate 'mixed_2_8' does not exist; the predicates are mixed_2_6, mixed_3_4,"),
        ("mixed_2_6", 48, "affine quantization has no group size 48"),
    ],
)
def test_recipe_refuses(recipe: str, group_size: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        recipe_spec(recipe, "lm_head", 8, group_size)
