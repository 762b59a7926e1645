"""What config.json says is compared with the tensors, and disagreements are noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conversion import convert
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import load_model
from support import sample

from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.names import short
from mla_tools.options import Options
from mla_tools.plan import make_plan
from mla_tools.samples import sample_config, write_sample


def edited(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def notes(folder: Path, *words: str) -> list[str]:
    found = make_plan(open_checkpoint(folder), Options()).notes
    return [note for note in found if all(word in note for word in words)]


# --- layer lists and counts --------------------------------------------------------------------------

# kda_layers, full_attn_layers -> what is said
LISTS = {
    "overlap": ([1, 2, 3], [3, 4], "3 in both"),
    "hole": ([1, 2], [4], "3 in neither"),
    "both": ([1, 2, 4], [4], "4 in both; 3 in neither"),
    "from-0": ([0, 1, 2], [3], "integers from 1 to 4"),
    "full-from-0": ([1, 2, 3], [0], "integers from 1 to 4"),
}


@pytest.mark.parametrize("family", ["kimi_linear", "kimi_k3"])
@pytest.mark.parametrize(("kda", "full", "said"), LISTS.values(), ids=LISTS)
def test_layer_lists_that_do_not_divide_the_layers_are_refused(
    family: str, kda: list[int], full: list[int], said: str
) -> None:
    sample = sample_config(family)
    numbers = sample.get("text_config", sample)
    lists = {**numbers["linear_attn_config"], "kda_layers": kda, "full_attn_layers": full}
    changed = {**numbers, "linear_attn_config": lists}
    config = {**sample, "text_config": changed} if "text_config" in sample else changed
    with pytest.raises(CheckpointError, match=said):
        table_of(config)


@pytest.mark.parametrize("count", [0, 2])
def test_a_count_of_mtp_layers_that_the_tensors_do_not_bear_out_is_noted(count: int, tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "source")
    assert notes(tmp_path / "source", "num_nextn_predict_layers") == []
    edited(tmp_path / "source", num_nextn_predict_layers=count)
    (note,) = notes(tmp_path / "source", "num_nextn_predict_layers")
    assert note == (
        f"num_nextn_predict_layers is {count} in config.json, but the checkpoint has 1: layers 4, dropped"
    )


# --- MLX's quantization ------------------------------------------------------------------------------


@pytest.fixture
def four_bits(tmp_path: Path) -> Path:
    write_sample("deepseek_v3", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "four", "-q")
    return tmp_path / "four"


def test_a_config_that_agrees_with_the_tensors_is_not_noted(four_bits: Path) -> None:
    assert notes(four_bits, "quantization") == []


def test_two_sections_that_disagree_are_noted(four_bits: Path, tmp_path: Path) -> None:
    edited(four_bits, quantization_config={"group_size": 32, "bits": 8, "mode": "affine"})
    (note,) = notes(four_bits, "quantization_config")
    assert "disagree; mlx_lm.load uses the first" in note
    convert(four_bits, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["bits"] == 4
    load_model(tmp_path / "again")


def test_a_section_that_the_tensors_do_not_bear_out_is_noted(four_bits: Path, tmp_path: Path) -> None:
    section = {"group_size": 32, "bits": 8, "mode": "affine"}
    edited(four_bits, quantization=section, quantization_config=section)
    (note,) = notes(four_bits, "quantization in config.json says")
    assert "says affine 8-bit g32 but the tensors are affine 4-bit g64, and this is used" in note
    convert(four_bits, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("key", ["mode", "bits", "group_size"])
def test_a_null_is_the_default_and_the_output_has_numbers(key: str, four_bits: Path, tmp_path: Path) -> None:
    section = {"group_size": 64, "bits": 4, "mode": "affine", key: None}
    edited(four_bits, quantization=section, quantization_config=section)
    assert notes(four_bits, "quantization") == []
    convert(four_bits, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_decoding_leaves_no_module_quantized_and_the_result_loads(family: str, tmp_path: Path) -> None:
    halves = [short(name) for name in table_of(sample_config(family))[1].targets()]
    halves = [path for path in halves if path.endswith(("embed_q", "unembed_out"))]
    both = ["--q-override", "embed_q|unembed_out=4,32"] if halves else []
    convert(sample(family), tmp_path / "packed", "-q", *both)
    packed = dict(load_model(tmp_path / "packed", lazy=True, trust_remote_code=True)[0].named_modules())
    convert(tmp_path / "packed", tmp_path / "out", "-d")
    model, config = load_model(tmp_path / "out", lazy=True, trust_remote_code=True)
    assert not [name for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")]
    assert "quantization" not in config
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], MultiLinear) for name in halves)
    assert all(type(packed[name]).__name__ == "QuantizedMultiLinear" for name in halves)


# --- a layout from another tool ----------------------------------------------------------------------


def test_stacked_experts_beside_a_fused_kv_b_both_packed(tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    weights: dict[str, mx.array] = {}
    for path in (tmp_path / "ours").glob("*.safetensors"):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        weights |= loaded
    # Some conversions were made before mlx-lm split kv_b_proj, when it stacked experts already.
    for layer in range(4):
        place = f"model.layers.{layer}.self_attn"
        k = weights.pop(f"{place}.embed_q.weight").swapaxes(-1, -2)
        v = weights.pop(f"{place}.unembed_out.weight")
        fused = mx.concatenate([k, v], axis=1).reshape(-1, k.shape[-1])
        weights[f"{place}.kv_b_proj.weight"] = fused
    entry = {"group_size": 64, "bits": 4}
    for name in [n for n in weights if "switch_mlp" in n or "kv_b_proj" in n]:
        parts = mx.quantize(weights.pop(name), **entry)
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            weights[f"{name.removesuffix('.weight')}.{part}"] = array
    folder = tmp_path / "other"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text((tmp_path / "ours" / "config.json").read_text())
    edited(folder, quantization=entry, quantization_config=entry)
    plan = convert(folder, tmp_path / "out")
    words = {t.name: t.exactness for step in plan.steps for t in step.targets}
    assert words["model.layers.1.mlp.switch_mlp.up_proj.weight"] == "copied"
    assert words["model.layers.1.self_attn.unembed_out.weight"] == "copied"
    assert words["model.layers.1.self_attn.embed_q.weight"] == "requantized"
    load_model(tmp_path / "out")
