"""The installed mlx-lm with `enable()`: what it loads, what its commands do, and that it can be undone."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import support
from launching import run_ranks
from mlx.utils import tree_flatten
from mlx_lm import server, utils
from pairs import PUBLISHED, pairs, product
from support import loaded, same

from mla_tools import CheckpointError
from mla_tools.architectures import MODEL_TYPES
from mla_tools.codecs import FORMATS
from mla_tools.convert import plan
from mla_tools.integrations.mlx_lm import disable, enable
from mla_tools.integrations.mlx_lm.sharding import shard
from mla_tools.weights import as_converted

# Those for whose classes mlx-lm has no `shard`.
UNSHARDED = ["bailing_hybrid", "kimi_linear", "kimi_vl", "minicpm3", "mistral3", "youtu_llm"]

# The commands of mlx-lm that load a model; evaluate needs a package that is not installed.
COMMANDS = [
    *("benchmark", "cache_prompt", "chat", "convert", "fuse", "generate", "lora", "perplexity", "server"),
    *("quant.awq", "quant.dwq", "quant.dynamic_quant", "quant.gptq"),
]

BOMB = "raise SystemExit('the code of the checkpoint was run')\n"


@pytest.fixture(autouse=True)
def _is_undone() -> Iterator[None]:
    before = utils.load_model, utils._get_classes, utils.create_model_card
    yield
    disable()
    assert (utils.load_model, utils._get_classes, utils.create_model_card) == before


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_same(got: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert same(got[name], wanted[name]), name


def copied(source: Path, folder: Path, **changes: object) -> Path:
    """Return a copy of a checkpoint whose config.json has these keys, too."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


# --- what is loaded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fmt"), product(MODEL_TYPES, FORMATS, pairs(MODEL_TYPES, FORMATS, PUBLISHED))
)
def test_the_hubs_layout_loads_as_what_a_conversion_writes(family: str, fmt: str) -> None:
    folder = support.sample(family, fmt)
    hub = json.loads((folder / "config.json").read_text())
    with enable():
        model, config = utils.load_model(folder, lazy=True)
    wanted = as_converted(loaded(folder), hub, strict=True)
    assert_same(parameters(model), wanted)
    assert config.get("quantization") == plan(folder).model.config.get("quantization")
    assert config.get("quantization_config") == config.get("quantization")


@pytest.mark.parametrize(
    ("family", "fmt"),
    [
        ("glm4_moe_lite", "fp8"),
        ("kimi_linear", "fp8"),
        ("kimi_linear", "ct-int4"),
        ("deepseek_v3", "ct-int4-asym"),
        ("deepseek_v3", "ct-fp8-channel"),
        ("deepseek_v3", "gptq"),
        ("deepseek_v3", "modelopt-nvfp4"),
        ("kimi_k2", "ct-nvfp4"),
        ("deepseek_v4", "deepseek-v4"),
    ],
)
def test_what_mlx_lm_alone_refuses(family: str, fmt: str) -> None:
    folder = support.sample(family, fmt)
    with pytest.raises((ValueError, KeyError, UnboundLocalError)):
        utils.load_model(folder, lazy=True)
    with enable():
        utils.load_model(folder, lazy=True)
    with pytest.raises((ValueError, KeyError, UnboundLocalError)):
        utils.load_model(folder, lazy=True)


def test_what_the_text_config_says_of_a_format_is_no_longer_true(tmp_path: Path) -> None:
    source = support.sample("kimi_k25", "ct-fp8-channel")
    config = json.loads((source / "config.json").read_text())
    inside = {**config["text_config"], "quantization_config": config.pop("quantization_config")}
    folder = copied(source, tmp_path / "it")
    (folder / "config.json").write_text(json.dumps({**config, "text_config": inside}))
    with enable():
        _, found = utils.load_model(folder, lazy=True)
    assert "quantization_config" not in {**found, **found["text_config"]}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_folder_without_weights_is_loaded_for_its_class(family: str, tmp_path: Path) -> None:
    shutil.copy(support.sample(family, "fp8") / "config.json", tmp_path)
    with enable():
        model, _ = utils.load_model(tmp_path, lazy=True, strict=False)
    assert hasattr(model, "shard")
    assert parameters(model)


def test_a_part_of_the_layers_is_loaded_quantized(tmp_path: Path) -> None:
    source = support.sample("deepseek_v3", "fp8-ue8m0")
    weights = loaded(source)
    shutil.copy(source / "config.json", tmp_path)
    part = {name: array for name, array in weights.items() if ".layers.2." in name}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), part)
    with enable():
        found = parameters(utils.load_model(tmp_path, lazy=True, strict=False)[0])
        whole = parameters(utils.load_model(source, lazy=True)[0])
    there = [name for name in whole if ".layers.2." in name]
    assert any(name.endswith(".scales") for name in there)
    assert_same({name: found[name] for name in there}, {name: whole[name] for name in there})


def test_other_models_load_as_before(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = utils.load_model(tmp_path, lazy=True, strict=False)
    with enable():
        after = utils.load_model(tmp_path, lazy=True, strict=False)
    assert type(before[0]) is type(after[0])
    assert before[1] == after[1]


def test_a_config_that_mlx_lms_class_reads_wrongly_is_refused(tmp_path: Path) -> None:
    folder = copied(support.sample("deepseek_v3"), tmp_path / "it", num_nextn_predict_layers=1, ep_size=1)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with enable(), pytest.raises(ValueError, match="parameters"):
        utils.load_model(folder, lazy=True)
    index = next(folder.glob("model-*.safetensors"))
    index.unlink()
    with enable(), pytest.raises(CheckpointError, match="missing"):
        utils.load_model(folder, lazy=True)


# --- it can be undone --------------------------------------------------------------------------------


def test_enabling_twice_is_enabling_once() -> None:
    before = utils.load_model, utils._get_classes
    enable()
    once = utils.load_model
    enable()
    assert utils.load_model is once is not before[0]
    disable()
    assert (utils.load_model, utils._get_classes) == before
    disable()
    assert (utils.load_model, utils._get_classes) == before


def test_the_end_of_an_inner_block_leaves_the_outer_one_enabled() -> None:
    before = utils.load_model
    enable()
    ours = utils.load_model
    with enable():
        pass
    assert utils.load_model is ours
    with enable():
        disable()
        assert utils.load_model is before
    with enable():
        ours = utils.load_model
        with enable():
            pass
        assert utils.load_model is ours is not before
    assert utils.load_model is before


def test_what_somebody_else_replaced_since_stays() -> None:
    before, classes = utils.load_model, utils._get_classes

    def other(*arguments: Any, **named: Any) -> Any:
        return before(*arguments, **named)

    enable()
    utils.load_model = other
    try:
        disable()
        assert utils.load_model is other
        assert utils._get_classes is classes
        with enable():
            assert utils.load_model is not other
        assert utils.load_model is other
    finally:
        utils.load_model = before


def test_an_error_within_leaves_mlx_lm_as_it_was() -> None:
    before = utils.load_model
    with pytest.raises(ZeroDivisionError), enable():
        raise ZeroDivisionError
    assert utils.load_model is before


def test_classes_of_the_caller_count() -> None:
    folder = support.sample("deepseek_v3")
    asked = []

    def classes(config: dict[str, Any]) -> Any:
        asked.append(config["model_type"])
        return utils._get_classes(config)

    with enable():
        utils.load_model(folder, lazy=True, get_model_classes=classes)
    assert asked == ["deepseek_v3"]


# --- a checkpoint's code -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fmt", "loads"), [("deepseek_v4", "deepseek-v4", True), ("deepseek_v3", "fp8", False)]
)
def test_the_code_of_a_checkpoint_is_not_run(family: str, fmt: str, loads: bool, tmp_path: Path) -> None:
    folder = copied(support.sample(family, fmt), tmp_path / "it", model_file="model.py")
    (folder / "model.py").write_text(BOMB)
    with enable():
        if loads:
            _, config = utils.load_model(folder, lazy=True)
            assert "model_file" not in config
        else:
            with pytest.raises(ValueError, match="trust"):
                utils.load_model(folder, lazy=True)
        with pytest.raises(SystemExit, match="was run"):
            utils.load_model(folder, lazy=True, trust_remote_code=True)


# --- what mlx-lm saves -------------------------------------------------------------------------------

FILE = MODEL_TYPES["deepseek_v4"].model_file
TEXT = MODEL_TYPES["deepseek_v4"].added()[FILE]


def fused(source: Path, out: Path, *options: str) -> Path:
    """Return the folder that mlx_lm.fuse writes of a model with an adapter that changes nothing."""
    adapter = out.parent / f"adapter of {out.name}"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full"}))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {})
    arguments = ["fuse", "--model", source, "--adapter-path", adapter, "--save-path", out, *options]
    with pytest.MonkeyPatch.context() as patch, enable():
        patch.setattr(sys, "argv", [str(argument) for argument in arguments])
        import_module("mlx_lm.fuse").main()
    return out


def assert_mlx_lm_alone_loads(out: Path, source: Path) -> None:
    with enable():
        wanted = parameters(utils.load_model(source, lazy=True)[0])
    with pytest.raises(ValueError, match="trust"):
        utils.load_model(out, lazy=True)
    assert_same(parameters(utils.load_model(out, lazy=True, trust_remote_code=True)[0]), wanted)


@pytest.mark.parametrize("how", ["convert", "fuse"])
def test_what_is_saved_of_the_hubs_deepseek_v4_has_its_class(how: str, tmp_path: Path) -> None:
    # A file of this name that the hub has was not run, and is not what is named.
    source = copied(support.sample("deepseek_v4", "deepseek-v4"), tmp_path / "it")
    (source / FILE).write_text(BOMB)
    out = tmp_path / "out"
    if how == "convert":
        with enable():
            mlx_lm.convert(str(source), str(out))
    else:
        fused(source, out)
    assert json.loads((out / "config.json").read_text())["model_file"] == FILE
    assert (out / FILE).read_text() == TEXT
    assert_mlx_lm_alone_loads(out, source)


@pytest.mark.parametrize("options", [(), ("--trust-remote-code",)])
def test_what_is_fused_with_an_output_of_ours_names_its_class(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    source = support.sample("deepseek_v4", "deepseek-v4")
    with enable():
        mlx_lm.convert(str(source), str(tmp_path / "made"))
    made = copied(tmp_path / "made", tmp_path / "it", model_file="own.py")
    (made / "own.py").write_text(TEXT)
    out = fused(made, tmp_path / "out", *options)
    # The file that was run, or ours.
    named = "own.py" if options else FILE
    assert json.loads((out / "config.json").read_text())["model_file"] == named
    assert (out / named).read_text() == TEXT
    assert_mlx_lm_alone_loads(out, source)


def test_what_is_saved_of_a_class_of_mlx_lm_names_no_file(tmp_path: Path) -> None:
    with enable():
        mlx_lm.convert(str(support.sample("deepseek_v3", "fp8")), str(tmp_path / "out"))
    assert "model_file" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


# --- commands ----------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "mla_tools.integrations.mlx_lm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_generate_of_the_hubs_deepseek_v4() -> None:
    folder = support.sample("deepseek_v4", "deepseek-v4")
    said = run("generate", "--model", folder, "--prompt", "Hello", "--max-tokens", "3")
    assert "Generation: 3 tokens" in said


def test_an_output_of_convert_is_loaded_by_mlx_lm_alone(tmp_path: Path) -> None:
    source = str(support.sample("kimi_linear", "fp8"))
    with enable():
        mlx_lm.convert(source, str(tmp_path / "out"), quantize=True, trust_remote_code=True)
    model, _ = utils.load_model(tmp_path / "out")
    assert any(name.endswith(".scales") for name in parameters(model))


def test_an_adapter_is_trained_and_fused_in_the_hubs_fp8(tmp_path: Path) -> None:
    source, adapters, out = (
        support.sample("glm4_moe_lite", "fp8-ue8m0"),
        tmp_path / "adapters",
        tmp_path / "out",
    )
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text('{"text": "one two three four"}\n' * 2)
    run(
        *("lora", "--train", "--model", source, "--data", data, "--adapter-path", adapters),
        *("--iters", "1", "--batch-size", "1", "--num-layers", "1", "--val-batches", "1"),
    )
    run("fuse", "--model", source, "--adapter-path", adapters, "--save-path", out)
    # mlx-lm alone, for what is fused is in its own format.
    fused = parameters(utils.load_model(out)[0])
    with enable():
        assert fused.keys() == parameters(utils.load_model(source, lazy=True)[0]).keys()


def test_the_server_loads_the_hubs_fp8() -> None:
    folder = support.sample("glm4_moe_lite", "fp8-ue8m0")
    settings = {"model": str(folder), "adapter_path": None, "draft_model": None, "pipeline": False}
    settings |= {"trust_remote_code": False, "chat_template": None, "use_default_chat_template": False}
    provider = server.ModelProvider(argparse.Namespace(**settings))
    with enable():
        provider.load("default_model")
    assert any(name.endswith(".scales") for name in parameters(provider.model))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_loads_by_what_is_replaced(command: str) -> None:
    module = import_module(f"mlx_lm.{command}")
    named = [module.__dict__[name] for name in ("load", "sharded_load") if name in module.__dict__]
    assert named
    for function in named:
        assert function.__globals__ is vars(utils)
        assert "load_model" in function.__code__.co_names


@pytest.mark.parametrize("how", ["pipeline_group", "tensor_group"])
def test_sharded_load_of_the_hubs_layout(how: str) -> None:
    folder = support.sample("deepseek_v3", "fp8-ue8m0")
    with enable():
        model, _ = utils.sharded_load(str(folder), **{how: mx.distributed.init()})
        whole = parameters(utils.load_model(folder, lazy=True)[0])
    assert_same(parameters(model), whole)


# --- several ranks -----------------------------------------------------------------------------------

RANKS = """
import json, sys
import mlx.core as mx
import mlx.nn as nn
from pathlib import Path
from mlx_lm import utils
from mla_tools.integrations.mlx_lm import enable

group = mx.distributed.init(strict=True)
tokens = mx.array([[5, 9, 300, 17, 2, 44, 101, 7]])
found = {}

def logits(model):
    cache = model.make_cache() if hasattr(model, "make_cache") else None
    if cache is None:
        return model(tokens)
    parts = [slice(0, 6), slice(6, 7), slice(7, 8)]
    return mx.concatenate([model(tokens[:, part], cache=cache) for part in parts], axis=1)

with enable():
    for folder in sys.argv[1:]:
        for bits in (None, 4):
            models = []
            for _ in range(2):
                model, _ = utils.load_model(Path(folder), lazy=True)
                if bits:
                    nn.quantize(model, group_size=32, bits=bits, class_predicate=lambda path, module:
                        hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0)
                models.append(model)
            whole = logits(models[0])
            size = sum(array.nbytes for _, array in nn.utils.tree_flatten(models[1].parameters()))
            models[1].shard(group)
            part = sum(array.nbytes for _, array in nn.utils.tree_flatten(models[1].parameters()))
            difference = mx.abs(logits(models[1]) - whole).max() / mx.abs(whole).max()
            found[f"{Path(folder).name} {bits}"] = [difference.item(), part / size]
print(json.dumps(found))
"""


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    folders = [str(support.sample(family, "f32")) for family in UNSHARDED]
    for code, said in run_ranks([sys.executable, "-c", RANKS, *folders], tmp_path):
        assert code == 0, said
        found = json.loads(said.splitlines()[-1])
        assert len(found) == 2 * len(folders)
        for name, (difference, share) in found.items():
            # Sums in another order, in float32.
            assert difference < 2e-5, name
            assert 0.4 < share < 0.95, name


@dataclass(frozen=True)
class SimulatedRank:
    """Stands in for a group of several processes."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


@pytest.mark.parametrize("family", UNSHARDED)
def test_ranks_that_do_not_divide_the_heads_are_refused(family: str) -> None:
    with enable():
        model, _ = utils.load_model(support.sample(family, "f32"), lazy=True)
    before = parameters(model)
    with pytest.raises(ValueError, match=r"num_heads = 4 heads cannot be shared by 3 ranks"):
        shard(model, SimulatedRank(0, 3))
    after = parameters(model)
    assert all(after[name] is array for name, array in before.items())
