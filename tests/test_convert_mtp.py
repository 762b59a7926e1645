"""The MTP layers of DeepSeek V4: dropped with a reason, or written for mlx-vlm's drafters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from listing import checkpoint
from mlx_vlm.utils import load_model
from safetensors.torch import load_file, save_file
from support import loaded

from mla_tools.cli import main
from mla_tools.errors import CheckpointError, MlaToolsError, UsageError
from mla_tools.files.checkpoint import Checkpoint, open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import make_mtp_plan, make_plan
from mla_tools.samples import write_sample

DSPARK = {"dspark_block_size": 4, "dspark_target_layer_ids": [1, 2, 3], "dspark_noise_token_id": 7}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "deepseek_v4"
    write_sample("deepseek_v4", folder, "deepseek-v4", shards=1)
    return folder


def stages(sample: Path, folder: Path, **keys: Any) -> Path:
    """Return a checkpoint with three stages of DSpark, made of the sample's one MTP layer."""
    held = load_file(sample / "model-00001-of-00001.safetensors")
    ends = ("mtp.0.norm.", "mtp.0.hc_head_", "mtp.0.enorm", "mtp.0.hnorm", "mtp.0.e_proj", "mtp.0.h_proj")
    tensors = {name: tensor for name, tensor in held.items() if not name.startswith(ends)}
    block = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.0.")}
    for number in (1, 2):
        copies = {name.replace("mtp.0.", f"mtp.{number}."): tensor.clone() for name, tensor in block.items()}
        tensors |= copies
    last = {name.replace("mtp.0.", "mtp.2."): held[name] for name in held if name.startswith(ends[:2])}
    wide = held["mtp.0.e_proj.weight"].repeat(1, 3)
    tensors |= last | {
        "mtp.0.main_proj.weight": wide.contiguous(),
        "mtp.0.main_proj.scale": held["mtp.0.e_proj.scale"].repeat(1, 3).contiguous(),
        "mtp.0.main_norm.weight": held["mtp.0.enorm.weight"],
        "mtp.2.markov_head.markov_w1.weight": torch.ones(512, 64, dtype=torch.bfloat16),
        "mtp.2.markov_head.markov_w2.weight": torch.ones(512, 64, dtype=torch.bfloat16),
        "mtp.2.confidence_head.proj.weight": torch.ones(1, 320, dtype=torch.bfloat16),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((sample / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def test_they_are_dropped_with_a_reason_by_default(sample: Path) -> None:
    plan = make_plan(open_checkpoint(sample), Options())
    assert plan.drops
    assert {drop.source.name.split(".")[0] for drop in plan.drops} == {"mtp"}
    assert {drop.reason for drop in plan.drops} == {
        "multi-token prediction (mtp), not part of the model's 4 layers"
    }


def test_an_mtp_layer_is_what_mlx_vlms_drafter_reads(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(sample), "--mlx-path", str(out), "--keep-mtp"]) == 0
    mtp = tmp_path / "out-mtp"
    assert not any("decoder" in name for name in loaded(out))
    model = load_model(mtp)
    assert type(model).__name__ == "DeepseekV4MTPDraftModel"
    held, made = load_file(sample / "model-00001-of-00001.safetensors"), loaded(mtp)
    for theirs, ours in {"mtp.0.e_proj": "e_proj", "mtp.0.attn.wo_a": "decoder.attn.wo_a"}.items():
        codes = held[f"{theirs}.weight"].view(torch.uint8).numpy().reshape(-1)
        assert np.array_equal(np.array(made[f"{ours}.weight"].view(mx.uint8)).reshape(-1), codes)
    experts = np.stack([held[f"mtp.0.ffn.experts.{e}.w2.weight"].view(torch.uint8).numpy() for e in range(8)])
    made_experts = np.array(made["decoder.ffn.switch_mlp.down_proj.weight"].view(mx.uint8))
    assert np.array_equal(made_experts, experts)
    assert json.loads((mtp / "config.json").read_text())["block_size"] == 2


def test_stages_of_dspark_are_what_mlx_vlms_drafter_reads(sample: Path, tmp_path: Path) -> None:
    source = stages(sample, tmp_path / "source", **DSPARK)
    plan = make_plan(open_checkpoint(source), Options())
    assert any("num_nextn_predict_layers is 1" in note and "has 3" in note for note in plan.notes)
    assert main(["convert", str(source), "--mlx-path", str(tmp_path / "out"), "--keep-mtp"]) == 0
    model = load_model(tmp_path / "out-mtp")
    assert type(model).__name__ == "DeepseekV4DsparkDraftModel"
    assert len(model.stages) == 3
    assert model.config.target_layer_ids == [1, 2, 3]
    mtp = make_mtp_plan(open_checkpoint(source), Options())
    assert [drop.source.name for drop in mtp.drops] == ["mtp.2.confidence_head.proj.weight"]


def test_a_config_that_does_not_say_how_stages_draft_is_refused(sample: Path, tmp_path: Path) -> None:
    source = stages(sample, tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError) as caught:
        make_mtp_plan(open_checkpoint(source), Options())
    assert [problem.what for problem in caught.value.problems] == [f"{key} cannot be used" for key in DSPARK]
    assert main(["convert", str(source), "--mlx-path", str(out), "--keep-mtp"]) == 1
    assert not out.exists()


def without(found: Checkpoint, *beginnings: str) -> Checkpoint:
    held = {name: entry for name, entry in found.tensors.items() if not name.startswith(beginnings)}
    return replace(found, tensors=held)


def test_a_missing_tensor_of_an_mtp_layer_is_missed(sample: Path) -> None:
    found = open_checkpoint(sample)
    with pytest.raises(CheckpointError, match=r"decoder\.ffn\.switch_mlp\.up_proj: expert 3 is missing"):
        make_mtp_plan(without(found, "mtp.0.ffn.experts.3.w3."), Options())
    with pytest.raises(CheckpointError, match=r"e_proj"):
        make_mtp_plan(without(found, "mtp.0.e_proj."), Options())


def test_layers_that_no_drafter_reads_are_refused(sample: Path) -> None:
    found = open_checkpoint(sample)
    second = {name.replace("mtp.0.", "mtp.1."): entry for name, entry in found.tensors.items()}
    with pytest.raises(MlaToolsError, match=r"mlx-vlm has no drafter for these layers"):
        make_mtp_plan(replace(found, tensors={**found.tensors, **second}), Options())


def test_no_mtp_layers_to_keep_is_said_before_anything_is_written(sample: Path, tmp_path: Path) -> None:
    found = open_checkpoint(sample)
    odd = {"mtp.norm.weight": found.tensors["norm.weight"]}
    with pytest.raises(UsageError, match=r"no MTP layers here"):
        make_mtp_plan(replace(found, tensors=odd), Options())
    with pytest.raises(UsageError, match=r"no MTP layers here"):
        make_mtp_plan(without(open_checkpoint(sample), "mtp."), Options())
    write_sample("deepseek_v3", tmp_path / "v3")
    assert main(["convert", str(tmp_path / "v3"), "--mlx-path", str(tmp_path / "out"), "--keep-mtp"]) == 2
    assert not (tmp_path / "out").exists()


def test_both_folders_must_be_free(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "out-mtp").mkdir()
    assert main(["convert", str(sample), "--mlx-path", str(tmp_path / "out"), "--keep-mtp"]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("listing", "keys", "tensors", "dropped"),
    [("deepseek_v4_flash", {}, 32, 0), ("deepseek_v4_flash_0731", DSPARK, 80, 1)],
    ids=["mtp", "dspark"],
)
def test_the_mtp_layers_of_real_checkpoints_are_complete(
    listing: str, keys: dict[str, Any], tensors: int, dropped: int
) -> None:
    found = checkpoint(listing)
    plan = make_mtp_plan(replace(found, config={**found.config, **keys}), Options())
    assert sum(len(step.targets) for step in plan.steps) == tensors
    assert len(plan.drops) == dropped
    used = [part for step in plan.steps for source in step.sources for part in source.parts.values()]
    used += [part for drop in plan.drops for part in drop.source.parts.values()]
    assert sorted(used) == sorted(name for name in found.tensors if name.startswith("mtp."))


def test_the_source_is_checked_once_for_model_and_mtp(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr("mla_tools.execute.check_source", lambda plan, group: checked.append(plan))
    out = tmp_path / "out"
    assert main(["convert", str(sample), "--mlx-path", str(out), "--keep-mtp", "--check-source"]) == 0
    assert len(checked) == 1
    for folder in (out, tmp_path / "out-mtp"):
        assert json.loads((folder / "mla_tools.json").read_text())["source_checked"] is True


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_the_json_has_the_plan_of_the_mtp_layers(
    command: str, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--mlx-path", str(tmp_path / "out")] if command == "convert" else []
    assert main([command, str(sample), "--keep-mtp", "--json", *out]) == 0
    model = json.loads(capsys.readouterr().out)
    names = [tensor["name"] for tensor in model["mtp"]["tensors"]]
    assert "decoder.attn.wq_a.weight" in names
    assert model["mtp"]["family"] == "deepseek_v4_mtp"
    assert model["family"] == "deepseek_v4"
