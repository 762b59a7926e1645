"""Configs and checkpoints that transformers 5 has written convert as the hub's do."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conversion import convert
from mlx_lm.utils import _get_classes
from reference import FAMILIES, checkpoint, mlx_logits, relative_error, truth
from safetensors.torch import load_file
from support import loaded, same, sample
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mla_tools
from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.convert import inspect
from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.models import deepseek_v4
from mla_tools.options import Options
from mla_tools.plan import Plan, make_plan
from mla_tools.samples import sample_config

TOLERANCE = 1e-5

YARN = reference._YARN

# The families for which transformers 5.23 has a config class, with its model_type. It has none for the
# others: those are read with code from the hub, which writes the hub's config again.
CLASSES = {
    "bailing_hybrid": "bailing_hybrid",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm_moe_dsa": "glm_moe_dsa",
    "kimi_k25": "kimi_k25",
    "kimi_linear": "kimi_linear",
    "longcat_flash": "longcat_flash",
    "minicpm3": "minicpm3",
    "mistral3": "mistral3",
    "mistral4": "mistral4",
    "youtu_llm": "youtu",
}
FLAT = [family for family in CLASSES if "text_config" not in sample_config(family)]


def hubs_config(family: str) -> dict[str, Any]:
    """The config of the sample in float32, also inside of another."""
    config = copy.deepcopy(open_checkpoint(sample(family, "f32")).config)
    if "text_config" in config:
        config["text_config"]["torch_dtype"] = "float32"
    return config


def written(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """What a config class writes."""
    folder.mkdir()
    config.save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def read_back(family: str, folder: Path) -> dict[str, Any]:
    """The hub's config.json, read by AutoConfig and saved again."""
    folder.mkdir()
    hub = {**hubs_config(family), "model_type": CLASSES[family]}
    (folder / "config.json").write_text(json.dumps(hub))
    return written(AutoConfig.from_pretrained(folder), folder / "again")


def from_scratch(family: str, folder: Path) -> dict[str, Any]:
    """The config class with the numbers of the sample, under the names that it has for them."""
    keys = hubs_config(family)
    if "text_config" in keys:
        return written(CONFIG_MAPPING[CLASSES[family]](**keys), folder)
    if keys.get("rope_parameters") is None and family != "deepseek_v4":
        rope = keys.pop("rope_scaling", None) or {"rope_type": "default"}
        keys["rope_parameters"] = {"rope_theta": keys["rope_theta"], **rope}
    if family == "kimi_linear":
        linear = keys["linear_attn_config"]
        full = linear["full_attn_layers"]
        layers = range(1, keys["num_hidden_layers"] + 1)
        keys["layer_types"] = [f"{'full' if n in full else 'linear'}_attention" for n in layers]
        keys["linear_head_dim"], keys["linear_num_heads"] = linear["head_dim"], linear["num_heads"]
    if family == "deepseek_v4":
        kinds = {
            0: "sliding_attention",
            4: "compressed_sparse_attention",
            128: "heavily_compressed_attention",
        }
        keys["layer_types"] = [kinds[ratio] for ratio in keys["compress_ratios"][:4]]
        keys["mlp_layer_types"] = ["hash_moe", "moe", "moe", "moe"]
        keys["partial_rotary_factor"] = keys["qk_rope_head_dim"] / keys["head_dim"]
        scaling = {**keys["rope_scaling"], "rope_type": "yarn"}
        keys["rope_parameters"] = {key: value for key, value in scaling.items() if key != "type"}
    kind = CONFIG_MAPPING[CLASSES[family]]
    known = {field.name for field in dataclasses.fields(kind)} | {
        *kind.attribute_map,
        *kind.attribute_map.values(),
    }
    known -= {"dtype", "architectures"}
    return written(kind(**{key: value for key, value in keys.items() if key in known}), folder)


WAYS = {"scratch": from_scratch, "read-back": read_back}


def plan_of(family: str, config: dict[str, Any] | None = None) -> Plan:
    """The plan of a family's sample, with another config if one is given."""
    found = open_checkpoint(sample(family, "f32"))
    return make_plan(found if config is None else dataclasses.replace(found, config=config), Options())


def class_of(config: dict[str, Any]) -> Any:
    """The ModelArgs of a config."""
    if config["model_type"] == "deepseek_v4":
        return deepseek_v4.ModelArgs
    return _get_classes(config)[1]


def read(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm's class reads in a config, with a rope in one spelling."""
    config = json.loads(json.dumps(config))
    if config["model_type"] == "mistral3":
        # Its class makes the one of the text model.
        config = config["text_config"]
    found = dataclasses.asdict(class_of(config).from_dict(config))
    found |= found.pop("text_config", {})
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := found.get(key), dict):
            kind = rope.pop("type", None) or rope.pop("rope_type")
            rest = {k: v for k, v in rope.items() if k not in ("rope_type", *UNREAD_ROPE)}
            found[key] = {"kind": kind, **rest}
    return {key: value for key, value in found.items() if key not in UNREAD}


# Keys of ModelArgs that no class here reads, and of a rope. The class of V4 has no attention_factor: it
# computes as with the 1 that transformers writes.
UNREAD = ("model_type", "num_nextn_predict_layers", "head_dim", "qk_head_dim")
UNREAD_ROPE = ("partial_rotary_factor", "rope_theta", "attention_factor")
# Where head_dim is read.
HEADS = ("bailing_hybrid", "deepseek_v4")


def model_of(family: str, config: dict[str, Any]) -> Any:
    """mlx-lm's model for a config, without weights."""
    config = json.loads(json.dumps(MODEL_TYPES[family].rewritten(config)))
    if family == "deepseek_v4":
        return deepseek_v4.Model(deepseek_v4.ModelArgs.from_dict(config))
    model, args = _get_classes(config)
    return model(args.from_dict(config))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_config_of_transformers_makes_what_the_hubs_makes(family: str, way: str, tmp_path: Path) -> None:
    hub, config = plan_of(family), WAYS[way](family, tmp_path / "config")
    plan = plan_of(family, config)
    assert plan.steps == hub.steps
    assert plan.drops == hub.drops
    assert read(plan.config) == read(hub.config)
    if family in HEADS:
        assert plan.config["head_dim"] == hub.config["head_dim"]
    # And what was written says the same when it is read again.
    again = MODEL_TYPES[plan.config["model_type"]].rewritten(plan.config)
    assert read(again) == read(hub.config)


def test_every_family_with_a_config_class_is_here() -> None:
    known = {family for family in MODEL_TYPES if family in CONFIG_MAPPING}
    assert known == {*CLASSES} - {"youtu_llm"} | {"youtu"}


# --- whole checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "kimi_k2"])
def test_a_model_that_transformers_saved_keeps_its_logits(family: str, tmp_path: Path) -> None:
    hub = checkpoint(family, "f32")
    config = json.loads((hub / "config.json").read_text())
    weights = {k: v for file in hub.glob("model*.safetensors") for k, v in load_file(file).items()}
    model = reference._transformers_model(config)
    model.load_state_dict(reference._from_hub(weights, config, model.state_dict()), strict=True)
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "out")
    assert max(relative_error(mlx_logits(tmp_path / "out"), truth(hub))) <= TOLERANCE


def test_kimi_k25_as_transformers_saves_it_keeps_its_logits(tmp_path: Path) -> None:
    # Its layers get the name of those in the vision tower. With a tied head, which is the default of this
    # class alone, it would have no lm_head.
    keys = {**hubs_config("kimi_k25"), "tie_word_embeddings": False}
    keys["vision_config"] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING["kimi_k25"](**keys)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    model.save_pretrained(tmp_path / "saved")
    plan = convert(tmp_path / "saved", tmp_path / "out")
    assert plan.checkpoint.config["architectures"] == ["Kimi_K25ForConditionalGeneration"]
    assert all("not part of the language model" in drop.reason for drop in plan.drops)
    wanted = reference.torch_logits(model)
    assert max(relative_error(mlx_logits(tmp_path / "out"), wanted)) <= TOLERANCE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bailing_hybrid", "kimi_linear", "glm4_moe_lite"])
def test_sanitize_and_inspect_read_such_a_config_too(family: str, way: str, tmp_path: Path) -> None:
    config = WAYS[way](family, tmp_path / "config")
    folder = sample(family, "f32")
    weights = loaded(folder)
    made = mla_tools.sanitize(weights, config)
    wanted = mla_tools.sanitize(weights, open_checkpoint(folder).config)
    assert made.keys() == wanted.keys()
    assert all(same(made[name], wanted[name]) for name in wanted)
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "config.json").write_text(json.dumps(config))
    assert not inspect(copied).problems


# --- what is left out --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FLAT)
def test_a_config_class_writes_every_key_that_is_read(family: str, tmp_path: Path) -> None:
    # to_diff_dict leaves out what equals the default of all configs, and no number of a model is among it.
    kind = CONFIG_MAPPING[CLASSES[family]]
    config = kind()
    names = {field.name for field in dataclasses.fields(kind)}
    names = {kind.attribute_map.get(name, name) for name in names if not name.startswith("_")}
    left_out = names - written(config, tmp_path / "config").keys()
    asked = {field.name for field in dataclasses.fields(class_of(plan_of(family).config))}
    assert left_out & asked == set()


def asked_for(family: str, config: dict[str, Any], key: str) -> bool:
    """Whether the lack of a key is a problem that names it."""
    try:
        table_of(config)
    except CheckpointError as error:
        return any(key in problem.what for problem in error.problems)
    return [problem.what for problem in MODEL_TYPES[family].lacking(config)] == [f"{key} is missing"]


# Sizes of tensors have no default here: without the key, tensors are unknown or missing. The rest is not
# read by mlx-lm's classes, or is where tensors are tied: MiniCPM3 is untied.
NO_DEFAULT = {
    "n_routed_experts",
    "n_shared_experts",
    "num_shared_experts",
    "num_key_value_heads",
    "qk_head_dim",
    # Read for the ropes of long texts alone, which these models do not have.
    "max_position_embeddings",
}
ELSEWHERE = {"minicpm3": {"tie_word_embeddings"}, "mistral4": {"head_dim"}}


@pytest.mark.parametrize("family", FLAT)
def test_a_key_that_is_left_out_has_the_value_of_transformers_or_is_asked_for(family: str) -> None:
    config, found = sample_config(family), MODEL_TYPES[family]
    default = CONFIG_MAPPING[CLASSES[family]]()
    args = class_of(found.rewritten(config))
    skipped = {"model_type", "rope_scaling", "rope_parameters"} | NO_DEFAULT | ELSEWHERE.get(family, set())
    compared = 0
    for key in {field.name for field in dataclasses.fields(args)} - skipped:
        less = {name: value for name, value in config.items() if name != key}
        if asked_for(family, less, key):
            continue
        value = getattr(args.from_dict(found.rewritten(less)), key)
        if key == "rope_theta":
            # Where a config has none, the class has a default of its own.
            assert value == getattr(default, "rope_theta", default.default_theta) or "rope_parameters" in less
        elif hasattr(default, key):
            # None means true to the class of Mistral 4, as the default of transformers does.
            assert value == getattr(default, key) or (key, value) == ("rope_interleave", None), key
        compared += 1
    assert compared > 1


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_model_args_asks_for_is_known(family: str) -> None:
    config = MODEL_TYPES[family].rewritten(sample_config(family))
    args = class_of(config["text_config"] if family == "mistral3" else config)
    # The classes of some multimodal models have other ones for what is inside.
    module = import_module(args.__module__)
    args = getattr(module, "TextArgs", getattr(module, "TextConfig", args))
    asked = {
        field.name
        for field in dataclasses.fields(args)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    assert asked - {"model_type", "text_config"} == {*MODEL_TYPES[family].required}


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("glm_moe_dsa", "rms_norm_eps"),
        ("kimi_linear", "head_dim"),
        ("longcat_flash", "max_position_embeddings"),
        ("longcat_flash_ngram", "max_position_embeddings"),
        ("minicpm3", "rms_norm_eps"),
        ("mistral4", "num_experts_per_tok"),
    ],
)
@pytest.mark.parametrize("found", ["no such key", "null"])
def test_a_number_that_mlx_lm_asks_for_is_missing_while_planning(family: str, key: str, found: str) -> None:
    config = {**sample_config(family), key: None}
    if found != "null":
        del config[key]
    with pytest.raises(CheckpointError) as caught:
        plan_of(family, config)
    (problem,) = caught.value.problems
    assert (problem.subject, problem.what, problem.found) == ("config.json", f"{key} is missing", found)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_is_planned_the_class_can_be_made_of(family: str) -> None:
    config, found = sample_config(family), MODEL_TYPES[family]
    place = found.place(config)
    numbers = config[place] if place else config
    made = 0
    for key in numbers.keys() - {"model_type", "architectures"}:
        for less in ({k: v for k, v in numbers.items() if k != key}, {**numbers, key: None}):
            given = {**config, place: less} if place else less
            with suppress(CheckpointError):
                table_of(given)
                if not found.lacking(given) and not found.refusals(given):
                    model_of(family, given)
                    made += 1
    assert made > 10


ROPES = [
    ({"type": "yarn"}, "factor is missing in rope_scaling"),
    ({"rope_type": "yarn", "factor": None}, "factor is missing in rope_scaling"),
    ({"rope_type": "longrope", "short_factor": [1.0]}, "long_factor is missing in rope_scaling"),
    ({"rope_type": "spiral"}, "rope_scaling cannot be used"),
    ({"rope_type": ["yarn"]}, "rope_scaling cannot be used"),
]


@pytest.mark.parametrize(("rope", "what"), ROPES)
def test_a_rope_that_mlx_lm_cannot_make_is_a_problem_while_planning(rope: dict[str, Any], what: str) -> None:
    config = {**sample_config("glm4_moe_lite"), "rope_scaling": rope}
    with pytest.raises(CheckpointError, match=what):
        plan_of("glm4_moe_lite", config)
    # And rightly so.
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        model_of("glm4_moe_lite", config)
    model_of("glm4_moe_lite", {**config, "rope_scaling": {**YARN, "type": "yarn"}})


# As transformers reads them: an attention factor of its own, mscale without the other, and no rounding.
UNLIKE = [
    pytest.param({"attention_factor": 1.7}, [], id="attention_factor"),
    pytest.param({}, ["mscale"], id="mscale_all_dim alone"),
    pytest.param({"truncate": False}, [], id="truncate"),
    pytest.param({"mscale": 10**400}, [], id="too large"),
    pytest.param({"factor": 2.718281828459045, "mscale_all_dim": -10}, [], id="divides by zero"),
]


@pytest.mark.parametrize(("more", "less"), UNLIKE)
def test_a_yarn_that_mlx_lm_computes_otherwise_is_refused(more: dict[str, Any], less: list[str]) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = {**sample_config("deepseek_v3"), "rope_scaling": yarn}
    plan_of("deepseek_v3", config)
    plan_of("deepseek_v3", {**config, "rope_scaling": {**yarn, "attention_factor": 1.0}})
    rope = {key: value for key, value in {**yarn, **more}.items() if key not in less}
    with pytest.raises(CheckpointError, match="another yarn than transformers"):
        plan_of("deepseek_v3", {**config, "rope_scaling": rope})


def test_what_a_rope_says_twice_is_what_transformers_reads() -> None:
    config = {**sample_config("deepseek_v3"), "rope_theta": 1e4}
    yarn = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    inner = plan_of("deepseek_v3", {**config, "rope_scaling": {**yarn, "rope_theta": 5e5}}).config
    assert (inner["rope_theta"], inner["rope_scaling"]) == (5e5, yarn)
    nested = {**sample_config("glm_moe_dsa"), "rope_parameters": {**yarn, "rope_type": "default"}}
    assert "type" not in plan_of("glm_moe_dsa", nested).config["rope_parameters"]
    newer = plan_of("deepseek_v3", {**config, "rope_scaling": {**yarn, "rope_type": "default"}}).config
    assert (newer["rope_theta"], newer["rope_scaling"]) == (1e4, None)


RUN = [
    ("deepseek_v3", {"rope_interleave": None}, "its rope turns pairs"),
    ("mistral4", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta is missing"),
    ("longcat_flash", {"mla_scale_q_lora": False}, "its latents are scaled"),
    ("longcat_flash_ngram", {"mla_scale_kv_lora": False}, "its latents are scaled"),
]


@pytest.mark.parametrize(("family", "keys", "what"), RUN)
def test_what_would_end_or_differ_only_when_it_runs_is_refused(
    family: str, keys: dict[str, Any], what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        plan_of(family, {**sample_config(family), **keys})


# --- words that cannot be said -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "keys"),
    [
        ("dsss", {"first_k_dense_replace": 1, "moe_layer_freq": 1}),
        ("ssss", {"first_k_dense_replace": 0, "moe_layer_freq": 1}),
        ("dddd", {"first_k_dense_replace": 4, "moe_layer_freq": 1}),
        ("sdsd", {"first_k_dense_replace": 0, "moe_layer_freq": 2}),
        ("ddsd", {"first_k_dense_replace": 2, "moe_layer_freq": 2}),
        ("sddd", {"first_k_dense_replace": 0, "moe_layer_freq": 4}),
        ("ddds", {"first_k_dense_replace": 3, "moe_layer_freq": 1}),
        ("dsssd", {"first_k_dense_replace": 1, "moe_layer_freq": 1}),
        ("dsds", None),
        ("ssds", None),
        ("dsx", None),
        ("ds", None),
    ],
)
def test_the_layers_with_experts_are_said_in_the_hubs_words(kinds: str, keys: dict[str, int] | None) -> None:
    words = {"d": "dense", "s": "sparse"}
    types = [words.get(letter, letter) for letter in kinds]
    hub = sample_config("glm4_moe_lite")
    config = {key: value for key, value in hub.items() if "dense" not in key and "freq" not in key}
    config["mlp_layer_types"] = types
    if keys is None:
        with pytest.raises(CheckpointError, match="mlp_layer_types cannot be used") as caught:
            table_of(config)
        assert len(caught.value.problems) == 1
        return
    assert table_of(config)[1].targets() == table_of({**hub, **keys})[1].targets()
    assert MODEL_TYPES["glm4_moe_lite"].rewritten(config).items() >= keys.items()


BAD = {
    "names": ({"n_group": 2, "num_expert_group": 4}, "n_group and num_expert_group differ"),
    "heads": ({"linear_num_heads": 8}, "num_attention_heads and linear_num_heads differ"),
    "kernel": ({"linear_conv_kernel_dim": 2}, "short_conv_kernel_size and linear_conv_kernel_dim differ"),
    "types": ({"layer_types": ["full_attention"] + ["linear_attention"] * 3}, "layer_types cannot be used"),
    "all": ({"layer_types": ["linear_attention"] * 4}, "layer_types cannot be used"),
    "words": ({"layer_types": ["mamba"] * 4}, "layer_types cannot be used"),
}


@pytest.mark.parametrize(("keys", "what"), BAD.values(), ids=BAD)
def test_what_the_hubs_keys_cannot_say_of_ling_is_refused(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what) as caught:
        table_of({**sample_config("bailing_hybrid"), **keys})
    assert len(caught.value.problems) == 1


def test_layer_types_go_before_the_group_size_of_ling() -> None:
    config, found = sample_config("bailing_hybrid"), MODEL_TYPES["bailing_hybrid"]
    types = ["linear_attention"] * 3 + ["full_attention"]
    assert found.rewritten({**config, "layer_types": types})["layer_group_size"] == 4


def test_layer_types_go_before_the_lists_of_kimi_linear() -> None:
    config, found = sample_config("kimi_linear"), MODEL_TYPES["kimi_linear"]
    types = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    # As transformers reads them, the sizes of linear_attn_config go before those beside it.
    keys = {"layer_types": types, "linear_head_dim": 8}
    linear = found.rewritten({**config, **keys})["linear_attn_config"]
    assert linear == {**config["linear_attn_config"], "full_attn_layers": [1, 4], "kda_layers": [2, 3]}
    with pytest.raises(CheckpointError, match="layer_types cannot be used"):
        table_of({**config, "layer_types": ["full_attention", "mamba", "x", 1]})


def test_the_shared_expert_of_ling_is_as_wide_as_the_others() -> None:
    config, found = sample_config("bailing_hybrid"), MODEL_TYPES["bailing_hybrid"]
    del config["moe_shared_expert_intermediate_size"]
    assert found.rewritten(config)["moe_shared_expert_intermediate_size"] == config["moe_intermediate_size"]


def test_zero_experts_are_dropped_and_others_are_not() -> None:
    config = sample_config("longcat_flash")
    found = open_checkpoint(sample("longcat_flash"))
    # transformers 5 writes them with the others, after the last one.
    stored = {
        name.replace("experts.0.", f"experts.{zero}."): entry
        for name, entry in found.tensors.items()
        if "experts.0." in name
        for zero in range(8, 12)
    }
    found = dataclasses.replace(found, tensors={**found.tensors, **stored})
    drops = [drop for drop in make_plan(found, Options()).drops if "zero_expert_num" in drop.reason]
    assert {drop.source.name for drop in drops} == stored.keys()
    with pytest.raises(CheckpointError) as caught:
        make_plan(dataclasses.replace(found, config={**config, "n_routed_experts": 7}), Options())
    assert {problem.subject for problem in caught.value.problems} > {
        name.removesuffix(".weight") for name in stored if "experts.11." in name
    }


STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**30, 0.5, float("nan"), "dense", "sparse"),
    *([], [1], [None] * 4, ["dense"] * 3, ["sparse", []] * 2, [["full_attention"]] * 4),
    *({}, {"head_dim": []}, {"type": []}, {"rope_type": {}}),
)
WORDS = (
    *("mlp_layer_types", "layer_types", "linear_attn_config", "linear_head_dim", "linear_num_heads"),
    *("linear_conv_kernel_dim", "num_expert_group", "model_max_length", "first_k_dense_replace"),
    *("moe_layer_freq", "layer_group_size", "num_hidden_layers", "rope_parameters", "rope_scaling"),
    *("compress_rates", "partial_rotary_factor", "moe_intermediate_size"),
)


@pytest.mark.parametrize("family", ["bailing_hybrid", "kimi_linear", "glm4_moe_lite", "mistral4"])
def test_no_value_of_such_a_key_is_more_than_a_problem(family: str) -> None:
    found, config = MODEL_TYPES[family], sample_config(family)
    types = ["linear_attention", "full_attention"] * 2
    for key in WORDS:
        for value in STRANGE:
            given = {**config, "layer_types": types, "mlp_layer_types": ["dense", "sparse"] * 2, key: value}
            with suppress(CheckpointError):
                table_of(given)
                assert all(problem.what for problem in (*found.lacking(given), *found.refusals(given)))
