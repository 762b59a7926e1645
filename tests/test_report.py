"""Reports: short for people, complete for machines."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mla_tools.errors import CheckpointError, Problem
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import Plan, make_plan, make_steps
from mla_tools.quantization import QuantSpec
from mla_tools.report import (
    human_bytes,
    plan_json,
    plan_text,
    summary_text,
    survey_json,
    survey_text,
)
from mla_tools.samples import write_sample

BYTES = [
    (0, "0 B"),
    (1, "1 B"),
    (999, "999 B"),
    (1000, "1.0 kB"),
    (1049, "1.0 kB"),
    (1051, "1.1 kB"),
    (999_949, "999.9 kB"),
    (999_950, "1.0 MB"),
    (1_000_000, "1.0 MB"),
    (16_777_216, "16.8 MB"),
    (999_949_999, "999.9 MB"),
    (999_950_000, "1.0 GB"),
    (688_586_727_753, "688.6 GB"),
    (999_950_000_000, "1.0 TB"),
    (1_340_000_000_000, "1.3 TB"),
    (5_000_000_000_000_000, "5000.0 TB"),
]


@pytest.mark.parametrize(("count", "text"), BYTES)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "deepseek_v3"
    write_sample("deepseek_v3", folder, "fp8")
    return folder


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return make_plan(open_checkpoint(source), Options(quantize=QuantSpec()))


def test_a_plan_is_folded(plan: Plan) -> None:
    lines = plan_text(plan).splitlines()
    tensors = sum(len(step.targets) for step in plan.steps)
    assert lines[0].startswith(f"deepseek_v3: {len(plan.checkpoint.tensors):,} stored tensors, ")
    assert f"-> {tensors:,} tensors, " in lines[0]
    assert lines[0].endswith(" in 1 file")
    assert sum(" x model." in line for line in lines) > 20
    folded = [line for line in lines if re.search(r"model\.layers\.\d+\.", line)]
    # Layer 0 has another MLP than the rest, and layer 4 is dropped; no other layer stands alone.
    assert {re.search(r"layers\.(\d+)\.", line)[1] for line in folded} <= {"0", "4"}  # type: ignore[index]
    assert all(len(line) < 200 for line in lines)
    assert [line for line in lines if line.endswith("4 x model.layers.{0..3}.self_attn.unembed_out")]
    (experts,) = [
        line for line in lines if line.strip().startswith("<-") and "experts.{0..7}.up_proj" in line
    ]
    assert experts.endswith("24 x model.layers.{1..3}.mlp.experts.{0..7}.up_proj")


def test_a_plan_tells_each_tensors_change_drops_config_and_notes(plan: Plan) -> None:
    text = plan_text(plan)
    for step in plan.steps:
        for target in step.targets:
            assert target.exactness in text
            assert target.codec.name in text
    assert f"dropped: {len(plan.drops)} tensors" in text
    assert {drop.reason for drop in plan.drops} <= {line.strip() for line in text.splitlines()}
    assert all(change in text for change in plan.config_changes)
    assert all(note in text for note in plan.notes)
    assert "fp8 128x128 -> affine 4-bit g64" in text
    assert (
        "\n\ncopied files\n  generation_config.json, tokenizer.json, tokenizer_config.json\n\n"
        "skipped files\n  config.json, model.safetensors.index.json: written anew\n\n"
    ) in text


def test_a_long_plan_has_a_line_for_each_tensor(plan: Plan) -> None:
    lines = plan_text(plan, long=True).splitlines()
    assert not any(" x " in line.partition("dropped")[0] for line in lines if "{" in line)
    table = lines[2 : lines.index("made from") - 1]
    targets = [target.name for step in plan.steps for target in step.targets]
    assert [line.split()[-1] for line in table] == [name.removesuffix(".weight") for name in targets]
    arrow = "    <- "
    made = [line.removeprefix(arrow) for line in lines if line.startswith(arrow)]
    changed = [step for step in plan.steps if step.sources[0].name != step.targets[0].name]
    assert made == [source.label for step in changed for source in step.sources]
    dropped = {drop.source.label for drop in plan.drops}
    assert dropped <= {line.strip() for line in lines}


def test_skipped_files_are_told_by_their_reasons(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    for number in range(1, 41):
        (folder / f"pytorch_model-{number:05}-of-00040.bin").touch()
        (folder / f"notes about {number}").mkdir()
    (folder / ".bad\x1bname").touch()
    plan = make_plan(open_checkpoint(folder), Options())
    text = plan_text(plan)
    assert "  40 x pytorch_model-{00001..00040}-of-00040.bin: weights in another format" in text
    start = text.index("skipped files")
    files = text[start:].partition("\n\n")[0]
    assert all(len(line) <= 110 for line in files.splitlines())
    assert files.count("notes about ") == 40
    assert files.count("a folder") == 1
    assert "'.bad\\x1bname'" in files
    value = plan_json(plan, plan.workload())["skipped_files"]
    assert {"name": "config.json", "reason": "written anew"} in value
    assert len(value) == 2 + 40 + 40 + 1


def test_a_file_that_an_added_one_replaces_is_skipped(tmp_path: Path) -> None:
    write_sample("deepseek_v4", tmp_path / "model")
    (tmp_path / "model" / "deepseek_v4.py").write_text("")
    plan = make_plan(open_checkpoint(tmp_path / "model"), Options())
    value = plan_json(plan, plan.workload())
    assert "deepseek_v4.py" in value["added_files"]
    assert "deepseek_v4.py" not in value["copied_files"]
    assert {"name": "deepseek_v4.py", "reason": "written anew"} in value["skipped_files"]


def test_a_summary_counts_every_tensor_once(plan: Plan) -> None:
    text = summary_text(plan, Path("out"))
    words = Counter(target.exactness for step in plan.steps for target in step.targets)
    assert text.startswith(f"out: deepseek_v3, {human_bytes(plan.nbytes)} in 1 file")
    for word, count in words.items():
        assert f"{count} {word}" in text
    assert f"  {words.total()} tensors: " in text
    assert f"{len(plan.drops)} dropped" in text


def test_plan_json_is_json_and_complete(plan: Plan, source: Path) -> None:
    workload = plan.workload()
    value = plan_json(plan, workload)
    assert json.loads(json.dumps(value)) == value
    assert value["family"] == "deepseek_v3"
    assert value["source"] == {
        "path": str(source),
        "stored_tensors": len(plan.checkpoint.tensors),
        "bytes": plan.source_nbytes,
    }
    used = {name for tensor in value["tensors"] for name in tensor["sources"]}
    dropped = {drop["name"] for drop in value["dropped"]}
    stored = {name for name in plan.checkpoint.tensors if not name.endswith("_scale_inv")}
    assert used | dropped == stored
    assert not used & dropped
    written = {name: there for tensor in value["tensors"] for name, there in tensor["stored"].items()}
    files = {name: spec for file in plan.files for name, spec in file.tensors.items()}
    assert written == {
        name: {"shape": list(spec.shape), "dtype": spec.dtype.name} for name, spec in files.items()
    }
    assert value["bytes"] == plan.nbytes
    assert value["parameters"] == plan.parameters
    assert (value["peak_bytes"], value["threads"]) == (workload.peak_bytes, workload.threads)
    assert value["config"] == plan.config
    assert value["config_changes"] == list(plan.config_changes)
    assert value["notes"] == list(plan.notes)
    assert value["files"] == [{"name": file.name, "bytes": file.layout.size} for file in plan.files]
    assert value["copied_files"] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert all(drop["reason"] for drop in value["dropped"])


def survey(folder: Path) -> tuple[dict[str, Any], list[Problem]]:
    checkpoint = open_checkpoint(folder)
    stored = {name: at.spec for name, at in checkpoint.tensors.items()}
    made = make_steps(stored, checkpoint.config, Options(), lost=checkpoint.lost)
    return survey_json(checkpoint, made), [*checkpoint.problems, *made.problems]


def test_a_survey_counts_every_tensor_and_byte(source: Path) -> None:
    value, problems = survey(source)
    assert problems == []
    assert json.loads(json.dumps(value)) == value
    tensors = open_checkpoint(source).tensors
    scales = sum(name.endswith("_scale_inv") for name in tensors)
    formats = value["formats"]
    assert set(formats) == {"fp8 128x128", "bf16", "f32"}
    assert formats["fp8 128x128"]["tensors"] == scales
    assert sum(counts["tensors"] for counts in formats.values()) == len(tensors) - scales
    assert sum(counts["bytes"] for counts in formats.values()) == value["bytes"]
    assert value["bytes"] == sum(at.spec.nbytes for at in tensors.values())
    assert value["geometry"]["kv_lora_rank"] == 128
    assert (value["files"], value["stored_tensors"], value["problems"]) == (2, len(tensors), [])
    text = survey_text(value, None)
    assert text.splitlines()[-1] == "no problems"
    assert "fp8 128x128" in text


def test_a_survey_of_a_damaged_checkpoint_lists_the_problems(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["n_routed_experts"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    paths = [*source.glob("model*")]
    assert paths
    for path in paths:
        (tmp_path / path.name).symlink_to(path)
    value, problems = survey(tmp_path)
    assert problems
    assert [problem["subject"] for problem in value["problems"]] == [p.subject for p in problems]
    assert json.loads(json.dumps(value)) == value
    assert str(CheckpointError(problems)) in survey_text(value, CheckpointError(problems))
