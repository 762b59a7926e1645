"""Affine tensors without biases among others with biases: refused, or zeros with --missing-biases zero."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conversion import convert
from support import loaded, same, sample

import mla_tools
from mla_tools.cli import main
from mla_tools.errors import CheckpointError, UsageError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import make_plan
from mla_tools.samples import sample_config

KV_B = "model.layers.{}.self_attn.kv_b_proj"
ZERO = ("--missing-biases", "zero")


def packed(folder: Path, *bare: str) -> dict[str, mx.array]:
    """Write a checkpoint whose matrices are affine; those named have no biases."""
    weights = loaded(sample("deepseek_v3"))
    for name in [name for name in weights if name.endswith("_proj.weight") and weights[name].ndim == 2]:
        module = name.removesuffix(".weight")
        parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weights.pop(name)), strict=True))
        if module in bare:
            del parts["biases"]
        weights |= {f"{module}.{part}": array for part, array in parts.items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = {**sample_config("deepseek_v3"), "quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def test_they_are_refused_with_the_way_out(tmp_path: Path) -> None:
    packed(tmp_path / "source", KV_B.format(2))
    with pytest.raises(CheckpointError) as caught:
        make_plan(open_checkpoint(tmp_path / "source"), Options())
    (problem,) = caught.value.problems
    assert (problem.subject, problem.what) == (KV_B.format(2), "its biases are missing")
    assert "--missing-biases zero" in problem.cause
    assert "--missing-biases zero" in str(caught.value)


def test_zeros_are_those_of_the_helper_for_model_files(tmp_path: Path) -> None:
    bare = KV_B.format(2)
    weights = packed(tmp_path / "source", bare)
    plan = convert(tmp_path / "source", tmp_path / "out", "--embed-q", "source", *ZERO)
    assert f"1 tensor without biases, which are taken as zeros (--missing-biases): {bare}" in plan.notes
    made = loaded(tmp_path / "out")
    place = bare.removesuffix(".kv_b_proj")
    held = {name: array for name, array in weights.items() if name.startswith(bare)}
    split = mla_tools.split_kv_b_proj_weights(
        held, place, num_heads=4, qk_nope_head_dim=64, v_head_dim=64, kv_lora_rank=128
    )
    assert len(split) == 6
    for name, array in split.items():
        assert same(made[name], array), name
    assert not mx.any(made[f"{place}.unembed_out.biases"]).item()


def test_one_expert_of_many(tmp_path: Path) -> None:
    layer, bare = "model.layers.1.mlp", "model.layers.1.mlp.experts.3.up_proj"
    weights = packed(tmp_path / "source", bare)
    plan = convert(tmp_path / "source", tmp_path / "out", *ZERO)
    assert [note for note in plan.notes if "biases" in note] == [
        f"1 tensor without biases, which are taken as zeros (--missing-biases): {bare}"
    ]
    made = loaded(tmp_path / "out")
    stacked = made[f"{layer}.switch_mlp.up_proj.biases"]
    assert not mx.any(stacked[3]).item()
    assert same(stacked[2], weights[f"{layer}.experts.2.up_proj.biases"])
    assert same(made[f"{layer}.switch_mlp.up_proj.weight"][3], weights[f"{bare}.weight"])


def test_floats_are_made_with_zeros_too(tmp_path: Path) -> None:
    bare = "model.layers.0.mlp.up_proj"
    weights = packed(tmp_path / "source", bare)
    convert(tmp_path / "source", tmp_path / "out", "-d", *ZERO)
    scales = weights[f"{bare}.scales"]
    wanted = mx.dequantize(weights[f"{bare}.weight"], scales, mx.zeros_like(scales), 64, 4)
    assert same(loaded(tmp_path / "out")[f"{bare}.weight"], wanted)


def test_the_record_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(tmp_path / "source", *map(KV_B.format, range(4)))
    command = ["convert", str(tmp_path / "source"), "--mlx-path", str(tmp_path / "out")]
    assert main(command) == 1
    assert "--missing-biases zero" in capsys.readouterr().err
    assert main([*command, *ZERO]) == 0
    record = json.loads((tmp_path / "out" / "mla_tools.json").read_text())
    assert record["options"]["missing_biases"] == "zero"
    (note,) = (note for note in record["notes"] if "--missing-biases" in note)
    assert note.startswith("4 tensors without biases")
    assert note.endswith("4 x model.layers.{0..3}.self_attn.kv_b_proj")


def test_where_none_is_missing_the_option_changes_nothing(tmp_path: Path) -> None:
    packed(tmp_path / "source")
    found = open_checkpoint(tmp_path / "source")
    plan, plain = (make_plan(found, Options(missing_biases=value)) for value in ("zero", None))  # type: ignore[arg-type]
    assert [note for note in plan.notes if note not in plain.notes] == [
        "--missing-biases has no effect: no affine tensor lacks biases"
    ]
    assert plan.steps == plain.steps


def test_where_all_are_missing_the_option_is_asked_for(tmp_path: Path) -> None:
    packed(tmp_path / "source")
    found = open_checkpoint(tmp_path / "source")
    held = {name: entry for name, entry in found.tensors.items() if not name.endswith(".biases")}
    found = replace(found, tensors=held)
    with pytest.raises(CheckpointError, match="If zeros are meant: --missing-biases zero"):
        make_plan(found, Options())
    assert any(
        "(--missing-biases)" in note for note in make_plan(found, Options(missing_biases="zero")).notes
    )


def test_a_global_scale_is_missed_all_the_same() -> None:
    found = open_checkpoint(sample("deepseek_v3", "modelopt-nvfp4"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_2"
    assert name in found.tensors
    held = {other: entry for other, entry in found.tensors.items() if other != name}
    with pytest.raises(CheckpointError, match="its global scale is missing") as caught:
        make_plan(replace(found, tensors=held), Options(missing_biases="zero"))
    assert "--missing-biases" not in str(caught.value)


@pytest.mark.parametrize("value", ["zeros", True, 0])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match='missing_biases is "zero" or None'):
        Options(missing_biases=value)
