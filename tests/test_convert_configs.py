"""Configs that mlx-lm's classes read differently from transformers: corrected, or refused for a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import reference
from conversion import convert
from reference import FAMILIES, make_checkpoint, mlx_logits, relative_error, truth
from safetensors.torch import load_file

from mla_tools.architectures import MODEL_TYPES
from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import Plan, make_plan
from mla_tools.samples import write_sample

TOLERANCE = 1e-5

YARN = reference._YARN
LONGROPE: dict[str, Any] = FAMILIES["minicpm3"]["rope_scaling"]
V2: dict[str, Any] = FAMILIES["deepseek_v2_lite"]["rope_scaling"]
PLAIN = {"rope_theta": 50000.0, "rope_type": "default"}


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


RIGHT = [
    pytest.param("youtu_llm", {"rope_scaling": without(YARN, "mscale", "mscale_all_dim")}, id="youtu-yarn"),
    pytest.param("youtu_llm", {"rope_theta": None, "rope_parameters": PLAIN}, id="youtu-parameters"),
    pytest.param("youtu_llm", {"rope_interleave": False}, id="youtu-halves"),
    pytest.param("youtu_llm", {"tie_word_embeddings": False}, id="youtu-untied"),
    pytest.param("minicpm3", {"rope_scaling": None}, id="minicpm3-no_rope"),
    pytest.param("minicpm3", {"rope_scaling": {**LONGROPE, "factor": 1.0}}, id="minicpm3-factor"),
    pytest.param(
        "minicpm3",
        {"rope_scaling": without(LONGROPE, "original_max_position_embeddings")},
        id="minicpm3-no_length",
    ),
    pytest.param(
        "minicpm3",
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8192}},
        id="minicpm3-longer",
    ),
    pytest.param("minicpm3", {"tie_word_embeddings": False}, id="minicpm3-untied"),
    pytest.param("mistral4", {"rope_parameters": None}, id="mistral4-no_rope"),
    pytest.param("mistral4", {"n_group": 2}, id="mistral4-groups"),
    pytest.param("glm_moe_dsa", {"rope_parameters": None, "rope_theta": 50000.0}, id="glm_moe_dsa-theta"),
    pytest.param("deepseek_v2_lite", {"rope_scaling": None}, id="deepseek_v2-no_rope"),
    pytest.param(
        "deepseek_v2_lite",
        {"rope_scaling": None, "rope_parameters": {**V2, "rope_theta": 20000.0}},
        id="deepseek_v2-parameters",
    ),
]

WRONG = [
    pytest.param("youtu_llm", {"rope_scaling": YARN}, "mscale_all_dim", id="youtu-mscale"),
    pytest.param("deepseek_v3", {"rope_interleave": False}, "turns pairs", id="deepseek_v3-halves"),
    pytest.param("glm4_moe_lite", {"rope_interleave": False}, "turns pairs", id="glm4_moe_lite-halves"),
    pytest.param(
        "minicpm3",
        {"rope_scaling": {**LONGROPE, "long_factor": [2.0] * 16}},
        "long_factor",
        id="minicpm3-long",
    ),
    pytest.param(
        "minicpm3", {"rope_scaling": {**LONGROPE, "attention_factor": 1.5}}, "ignores", id="minicpm3-factor"
    ),
    pytest.param(
        "deepseek_v2_lite",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "yarn",
        id="deepseek_v2-linear",
    ),
]


def folder_of(family: str, keys: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = {**copy.deepcopy(FAMILIES[family]), **keys}
    monkeypatch.setitem(FAMILIES, family, config)
    make_checkpoint(family, path / "source", "f32", mtp=False)
    return path / "source"


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(folder), Options())


def errors_of(source: Path, out: Path) -> float:
    convert(source, out, "--dtype", "float32")
    return max(relative_error(mlx_logits(out), truth(source)))


@pytest.mark.parametrize(("family", "keys"), RIGHT)
def test_the_written_config_gives_the_references_logits(
    family: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert errors_of(folder_of(family, keys, tmp_path, monkeypatch), tmp_path / "out") <= TOLERANCE


@pytest.mark.parametrize(("family", "keys", "reason"), WRONG)
def test_what_no_conversion_can_make_right_is_refused(
    family: str, keys: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(family, keys, tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=reason) as caught:
        plan_of(source)
    assert len(caught.value.problems) == 1
    # And rightly so: without the refusal, the logits are others.
    kind = reference.model_type(FAMILIES[family])
    monkeypatch.setitem(MODEL_TYPES, kind, replace(MODEL_TYPES[kind], refuse=None))
    assert errors_of(source, tmp_path / "out") > 1e-3


SHARING = [
    pytest.param({"indexer_types": ["full", "full", "shared"]}, {2}, id="types"),
    pytest.param({"index_topk_pattern": "FSS"}, {1, 2}, id="pattern"),
    pytest.param({"index_topk_freq": 2}, {2}, id="frequency"),
    pytest.param({"index_topk_freq": 2, "index_skip_topk_offset": 1}, {1}, id="offset"),
]


@pytest.mark.parametrize(("keys", "layers"), SHARING)
def test_layers_that_share_an_indexer_are_refused(
    keys: dict[str, Any], layers: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of("glm_moe_dsa", keys, tmp_path, monkeypatch)
    stored = open_checkpoint(source).tensors
    assert {n for n in range(3) if f"model.layers.{n}.self_attn.indexer.wk.weight" not in stored} == layers
    with pytest.raises(CheckpointError, match="lets each layer choose its keys") as caught:
        plan_of(source)
    # The table knows which layers have none: nothing is missing.
    assert len(caught.value.problems) == 1


def test_a_copied_indexer_does_not_choose_what_the_shared_one_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of("glm_moe_dsa", {"index_topk_pattern": "FSS"}, tmp_path, monkeypatch)
    wanted = truth(source)
    config = json.loads((source / "config.json").read_text())
    hub = reference.decoded({k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()})
    first = "model.layers.0.self_attn.indexer."
    for name in [name for name in hub if name.startswith(first)]:
        for layer in (1, 2):
            hub[name.replace("layers.0", f"layers.{layer}")] = hub[name]
    copied = reference.hub_logits(hub, without(config, "index_topk_pattern"), None)
    assert max(relative_error(copied, wanted)) > 1e-2


def test_glm_5_2_has_its_indexers_where_the_listing_of_the_hub_has_them() -> None:
    from mla_tools.architectures.glm_moe_dsa import sharing_layers

    own = {*range(78)} - sharing_layers({"index_topk_freq": 4, "index_skip_topk_offset": 3}, range(78))
    assert own == {0, 1, *range(2, 78, 4)}


def test_a_tied_embedding_of_minicpm3_is_written_twice(tmp_path: Path) -> None:
    write_sample("minicpm3", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "-q")
    weights = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in mx.load(str(f)).items()}  # type: ignore[union-attr]
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(weights[f"lm_head.{part}"], weights[f"model.embed_tokens.{part}"]).item()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    # And what was written can be converted again, as it is.
    again = plan_of(tmp_path / "out")
    assert {target.exactness for step in again.steps for target in step.targets} == {"copied"}


# --- a language model beside a vision tower ----------------------------------------------------------


def change(folder: Path, rename: Any = None, keys: Mapping[str, Any] | None = None) -> None:
    """Rewrite a checkpoint with other names and other config keys."""
    weights: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
        file.unlink()
    assert weights
    (folder / "model.safetensors.index.json").unlink()
    renamed = {rename(name) if rename else name: array for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), renamed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **(keys or {})}))


def in_memory(name: str) -> str:
    """The names of transformers 5 outside of files."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return name.replace("language_model.", "") if "lm_head" in name else f"model.{name}"


def test_the_prefix_may_be_written_as_transformers_does(tmp_path: Path) -> None:
    plans = []
    for name, rename in (("hub", None), ("memory", in_memory)):
        write_sample("mistral3", tmp_path / name)
        change(tmp_path / name, rename)
        plans.append(plan_of(tmp_path / name))
    hub, memory = ([target for step in plan.steps for target in step.targets] for plan in plans)
    assert hub == memory
    assert len(plans[0].drops) == len(plans[1].drops) == 2
    assert all("not part of the language model" in drop.reason for drop in plans[1].drops)


def test_the_config_keeps_its_text_config_and_loses_the_vision(tmp_path: Path) -> None:
    write_sample("mistral3", tmp_path / "source", "fp8")
    source = json.loads((tmp_path / "source" / "config.json").read_text())
    text = {**source["text_config"], "quantization_config": source["quantization_config"]}
    change(tmp_path / "source", keys={"quantization_config": None, "text_config": text})
    config = plan_of(tmp_path / "source").config
    assert config["model_type"] == "mistral3"
    assert config["text_config"] == source["text_config"]
    assert config.keys() & {"vision_config", "quantization_config"} == set()


def test_a_problem_of_the_text_config_names_its_key(tmp_path: Path) -> None:
    write_sample("mistral3", tmp_path / "source")
    change(tmp_path / "source", keys={"text_config": {"model_type": "mistral4", "hidden_size": "x"}})
    with pytest.raises(CheckpointError, match="hidden_size cannot be used"):
        plan_of(tmp_path / "source")


def test_experts_may_be_stored_one_by_one(tmp_path: Path) -> None:
    write_sample("mistral4", tmp_path / "fused")
    folder = tmp_path / "fused"
    wanted = convert(folder, tmp_path / "a")
    weights: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
        file.unlink()
    assert weights
    (folder / "model.safetensors.index.json").unlink()
    for name in [name for name in weights if ".experts." in name]:
        array, (block, _, part) = weights.pop(name), name.rpartition(".")
        for e in range(array.shape[0]):
            if part == "down_proj":
                weights[f"{block}.{e}.down_proj.weight"] = array[e]
            else:
                gate, up = mx.split(array[e], 2)
                weights |= {f"{block}.{e}.gate_proj.weight": gate, f"{block}.{e}.up_proj.weight": up}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert convert(folder, tmp_path / "b").files == wanted.files
    for made in wanted.files:
        assert (tmp_path / "a" / made.name).read_bytes() == (tmp_path / "b" / made.name).read_bytes()
