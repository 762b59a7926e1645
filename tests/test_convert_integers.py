"""Whole checkpoints in the integer formats: what comes out is what the source says, number by number."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conversion import convert
from integers import awq, compressed, gptq
from mlx_lm.utils import load_model
from numpy.typing import NDArray
from support import loaded, same, sample

from mla_tools.errors import CheckpointError, MlaToolsError
from mla_tools.plan import Plan
from mla_tools.weights import sanitize

FAMILIES = ("deepseek_v3", "kimi_linear")
# format -> its float dtype, whether MLX's parts are exact in it
FORMATS = {
    "ct-int4": (mx.bfloat16, True),
    "ct-int4-asym": (mx.bfloat16, False),
    "ct-int8": (mx.bfloat16, True),
    "awq": (mx.float16, False),
    "gptq": (mx.float16, True),
}
FLAGS = {"default": [], "float32": ["--dtype", "float32", "--embed-q", "8,32"], "dequantize": ["-d"]}

each_format = pytest.mark.parametrize("fmt", FORMATS)
each_family = pytest.mark.parametrize("family", FAMILIES)

Weights = dict[str, mx.array]


@cache
def converted(family: str, fmt: str, flags: str) -> tuple[Plan, Weights]:
    out = Path(mkdtemp()) / "out"
    plan = convert(sample(family, fmt), out, *FLAGS[flags])
    load_model(out, strict=True)
    return plan, loaded(out)


@cache
def truth(family: str, fmt: str) -> Weights:
    """Return what the source's tensors become when it is decoded here, in float32, and then converted."""
    weights = loaded(sample(family, fmt))
    dense: Weights = {}
    for name, array in weights.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ("weight_packed", "qweight"):
            dense[f"{stem}.weight"] = mx.array(decoded(weights, stem, leaf, fmt))
        elif f"{stem}.weight_packed" not in weights and f"{stem}.qweight" not in weights:
            dense[name] = array.astype(mx.float32)
    assert len(dense) < len(weights)
    folder = Path(mkdtemp())
    mx.save_safetensors(str(folder / "model.safetensors"), dense)
    config = json.loads((sample(family, fmt) / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, folder / "out", "--dtype", "float32")
    return loaded(folder / "out")


def decoded(weights: Weights, stem: str, leaf: str, fmt: str) -> NDArray[Any]:
    def parts(prefix: str) -> dict[str, NDArray[Any]]:
        found = {name.removeprefix(prefix): a for name, a in weights.items() if name.startswith(prefix)}
        floats = (mx.bfloat16, mx.float16)
        return {n: np.array(a.astype(mx.float32) if a.dtype in floats else a) for n, a in found.items()}

    if leaf == "weight_packed":
        held = parts(f"{stem}.weight")
        return compressed(held, 8 if fmt == "ct-int8" else 4, int(held["_shape"][1]))
    held = parts(f"{stem}.")
    return awq(held) if fmt == "awq" else gptq(held, 4, 1)


def dequantized(plan: Plan, weights: Weights, name: str, biases: mx.array | None = None) -> mx.array:
    module = name.removesuffix(".weight")
    section = plan.config["quantization"].get(module, plan.config["quantization"])
    scales = weights[f"{module}.scales"].astype(mx.float32)
    biases = weights[f"{module}.biases"].astype(mx.float32) if biases is None else biases
    return mx.dequantize(weights[name], scales, biases, section["group_size"], section["bits"])


@each_family
@each_format
def test_float32_output_is_the_decoded_source(family: str, fmt: str) -> None:
    plan, weights = converted(family, fmt, "float32")
    kinds = set()
    for name, wanted in truth(family, fmt).items():
        if weights[name].dtype != mx.uint32:
            # Not all are cast: mlx-lm keeps the dtype of a router's bias.
            assert same(weights[name].astype(mx.float32), wanted), name
            kinds.add("dense")
        elif name.endswith("embed_q.weight"):
            section = plan.config["quantization"][name.removesuffix(".weight")]
            again = mx.quantize(wanted, group_size=section["group_size"], bits=section["bits"])
            assert same(weights[name], again[0]), name
            kinds.add("K")
        else:
            assert same(dequantized(plan, weights, name), wanted), name
            kinds.add("V" if name.endswith("unembed_out.weight") else "linear")
    assert kinds == {"dense", "linear", "K", "V"}
    words = Counter(target.exactness for step in plan.steps for target in step.targets)
    assert words.keys() == {"copied", "repacked", "requantized"}


@each_family
@each_format
def test_default_output_has_the_codes_and_scales_and_says_what_is_rounded(family: str, fmt: str) -> None:
    plan, weights = converted(family, fmt, "default")
    _, exact = converted(family, fmt, "float32")
    dtype, is_exact = FORMATS[fmt]
    words = {target.name: target.exactness for step in plan.steps for target in step.targets}
    assert weights.keys() == exact.keys()
    for name, word in words.items():
        if word in ("repacked", "rounded"):
            assert word == ("repacked" if is_exact else "rounded"), name
            stem = name.removesuffix("weight")
            assert same(weights[name], exact[name]), name
            # The scales are not rounded, and each bias is, once.
            assert weights[f"{stem}scales"].dtype == dtype
            assert same(weights[f"{stem}scales"].astype(mx.float32), exact[f"{stem}scales"]), name
            assert same(weights[f"{stem}biases"], exact[f"{stem}biases"].astype(dtype)), name
            if is_exact:
                assert same(dequantized(plan, weights, name), truth(family, fmt)[name]), name
        elif word == "copied":
            assert same(weights[name].astype(mx.float32), truth(family, fmt)[name]), name
    assert set(words.values()) == {"copied", "requantized", "repacked" if is_exact else "rounded"}


@each_family
@each_format
def test_dequantized_output_is_the_decoded_source_rounded_once(family: str, fmt: str) -> None:
    plan, weights = converted(family, fmt, "dequantize")
    assert "quantization" not in plan.config
    wanted = truth(family, fmt)
    assert weights.keys() == wanted.keys()
    for name, array in weights.items():
        assert same(array, wanted[name].astype(array.dtype)), name
    words = Counter(target.exactness for step in plan.steps for target in step.targets)
    assert words.keys() == {"copied", "decoded"}


@each_family
@each_format
def test_some_layers_packed_and_others_not(family: str, fmt: str, tmp_path: Path) -> None:
    weights = loaded(sample(family, fmt))
    floats = {f"model.layers.{layer}." for layer in (1, 2)}
    mixed: Weights = {}
    for name, array in weights.items():
        stem, _, leaf = name.rpartition(".")
        packed = {"weight_packed", "qweight"} & {n.removeprefix(f"{stem}.") for n in weights if stem in n}
        if not packed or not name.startswith(tuple(floats)):
            mixed[name] = array
        elif leaf in packed:
            mixed[f"{stem}.weight"] = mx.array(decoded(weights, stem, leaf, fmt))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), mixed)
    (tmp_path / "config.json").write_bytes((sample(family, fmt) / "config.json").read_bytes())
    plan = convert(tmp_path, tmp_path / "out", "--dtype", "float32")
    load_model(tmp_path / "out", strict=True)
    made, kinds = loaded(tmp_path / "out"), set()
    for name, wanted in truth(family, fmt).items():
        if made[name].dtype != mx.uint32:
            assert same(made[name].astype(mx.float32), wanted), name
        elif not name.endswith("embed_q.weight"):
            assert not name.startswith(tuple(floats))
            assert same(dequantized(plan, made, name), wanted), name
        if name.endswith("unembed_out.weight"):
            kinds.add(made[name].dtype)
    assert kinds == ({mx.uint32, mx.float32} if family == "deepseek_v3" else {mx.uint32})


@each_family
@pytest.mark.parametrize("fmt", ["ct-int4", "ct-int8", "gptq"])
def test_the_rows_of_v_keep_the_bits_of_the_source(family: str, fmt: str) -> None:
    plan, weights = converted(family, fmt, "default")
    stored = loaded(sample(family, fmt))
    config = plan.checkpoint.config
    n, v = int(str(config["qk_nope_head_dim"])), int(str(config["v_head_dim"]))
    found = 0
    for name, array in stored.items():
        if name.endswith(("kv_b_proj.weight_packed", "kv_b_proj.qweight")):
            stem = name.replace("kv_b_proj", "unembed_out").rpartition(".")[0]
            if f"{stem}.weight" not in weights:  # the MTP layer
                continue
            rows = array.T if name.endswith("qweight") else array
            values = mx.contiguous(rows.reshape(-1, n + v, rows.shape[1])[:, n:]).view(mx.uint32)
            assert same(weights[f"{stem}.weight"], values), name
            found += 1
    assert found


@each_family
@each_format
def test_sanitize_gives_the_same_bits(family: str, fmt: str) -> None:
    plan, weights = converted(family, fmt, "default")
    config = json.loads((sample(family, fmt) / "config.json").read_text())
    embed_q = plan.options.embed_q
    made = sanitize(loaded(sample(family, fmt)), config, embed_q=embed_q)
    assert made.keys() == weights.keys()
    for name, array in weights.items():
        assert same(made[name].astype(array.dtype), array), name


# --- what must not be converted ----------------------------------------------------------------------


def rewritten(tmp_path: Path, fmt: str, change: Any, section: dict[str, object] | None = None) -> Path:
    """Return a copy of a sample with some tensors changed and keys added to its quantization section."""
    folder = tmp_path / "changed"
    folder.mkdir()
    weights = loaded(sample("deepseek_v3", fmt))
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((sample("deepseek_v3", fmt) / "config.json").read_text())
    config["quantization_config"] |= section or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("flags", FLAGS)
def test_columns_in_the_order_of_activations_stop_a_conversion(flags: str, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj"

    def change(weights: Weights) -> None:
        weights[f"{name}.g_idx"] = weights[f"{name}.g_idx"][::-1]

    folder = rewritten(tmp_path, "gptq", change)
    with pytest.raises(MlaToolsError, match=rf"^{name}: act-order \(g_idx\) is not supported"):
        convert(folder, tmp_path / "out", *FLAGS[flags])
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_expert_with_wrong_zero_points_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj"

    def change(weights: Weights) -> None:
        weights[f"{name}.qzeros"] += 1

    folder = rewritten(tmp_path, "gptq", change)
    with pytest.raises(MlaToolsError, match=rf"^{name}: config.json says sym"):
        convert(folder, tmp_path / "out")
    with pytest.raises(MlaToolsError, match=rf"^{name}: config.json says sym"):
        sanitize(loaded(folder), json.loads((folder / "config.json").read_text()))


def test_desc_act_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, "gptq", lambda weights: None, {"desc_act": True})
    with pytest.raises(CheckpointError, match=r"act-order \(desc_act in config.json\) is not supported"):
        convert(folder, tmp_path / "out")
