"""--keep-vision: vision tensors are copied bit for bit, and the language model is as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from conversion import convert
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file
from support import same, sample

from mla_tools.cli import main
from mla_tools.plan import Plan
from mla_tools.samples import write_sample

# family -> the modules beside the language model, under the names of the hub.
MODULES = {
    "kimi_k25": ("vision_tower", "mm_projector"),
    "kimi_k3": ("vision_tower", "mm_projector"),
    "kimi_vl": ("vision_tower", "multi_modal_projector"),
    "mistral3": ("vision_tower", "multi_modal_projector"),
}


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0))


# Any values will do, and each dtype and number of axes must.
VISION: dict[str, mx.array] = {
    "patch_embed.proj.weight": normal(8, 3, 2, 2).astype(mx.bfloat16),
    "encoder.blocks.0.wqkv.weight": normal(24, 8).astype(mx.float32),
    "encoder.blocks.0.wqkv.bias": normal(24).astype(mx.float16),
    "position_ids": mx.arange(6, dtype=mx.int64).reshape(1, 6),
    "scale": mx.array(0.5, dtype=mx.float32),
}
VISION_CONFIG = {"model_type": "moonvit", "hidden_size": 8}


def written(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        found |= loaded
    assert found, f"{folder} holds no weights"
    return found


def source_of(family: str, folder: Path, more: dict[str, mx.array], **config: Any) -> Path:
    """Write a sample with the tensors in `more` in place of its own vision tensors."""
    write_sample(family, folder)
    weights = {k: v for k, v in written(folder).items() if "language_model" in k or "lm_head" in k}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights | more)
    numbers = json.loads((folder / "config.json").read_text())
    numbers |= {"vision_config": VISION_CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(numbers))
    return folder


@pytest.mark.parametrize("flags", [[], ["-q"], ["--dtype", "float16"]], ids=" ".join)
@pytest.mark.parametrize("family", MODULES)
def test_vision_tensors_are_copied_and_the_language_model_is_the_same(
    family: str, flags: list[str], tmp_path: Path
) -> None:
    vision = {f"{module}.{name}": array for module in MODULES[family] for name, array in VISION.items()}
    source = source_of(family, tmp_path / "source", vision)
    dropped = convert(source, tmp_path / "text", *flags)
    plan = convert(source, tmp_path / "both", *flags, "--keep-vision")
    text, both = written(tmp_path / "text"), written(tmp_path / "both")
    assert {name: same(both[name], vision[name]) for name in vision} == dict.fromkeys(vision, True)
    assert both.keys() == text.keys() | vision.keys()
    assert {name: same(both[name], text[name]) for name in text} == dict.fromkeys(text, True)
    assert {drop.source.name for drop in dropped.drops} == set(vision)
    assert plan.drops == ()
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config.pop("vision_config") == VISION_CONFIG
    assert config == json.loads((tmp_path / "text" / "config.json").read_text())
    whole = family not in ("kimi_vl", "mistral3")
    reads = "mlx-vlm loads the whole model" if whole else "mlx-vlm 0.7.10 cannot load this output"
    assert reads in vision_note(plan)
    # What the plan says: mlx_lm.load opens it strictly, and has the language model.
    for folder in ("text", "both"):
        model, _ = load_model(tmp_path / folder)
        assert dict(tree_flatten(model.parameters())).keys() == text.keys()


def vision_note(plan: Plan) -> str:
    (note,) = [note for note in plan.notes if note.startswith("copied unchanged")]
    return note


def test_vision_tensors_in_the_names_of_transformers_get_those_of_the_hub(tmp_path: Path) -> None:
    vision = {f"model.vision_tower.{name}": array for name, array in VISION.items()}
    source = source_of("mistral3", tmp_path / "source", vision)
    convert(source, tmp_path / "out", "--keep-vision")
    found = written(tmp_path / "out")
    for name, array in VISION.items():
        assert same(found[f"vision_tower.{name}"], array), name


def test_one_vision_tensor_under_two_names_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = {f"{place}vision_tower.scale": VISION["scale"] for place in ("", "model.")}
    source = source_of("mistral3", tmp_path / "source", vision)
    assert main(["plan", str(source), "--keep-vision"]) == 1
    assert "vision_tower.scale: duplicate" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["-q", "--q-bits", "8"], ["-d"]], ids=" ".join)
@pytest.mark.parametrize("own", [True, False], ids=["own-entry", "default-entry"])
def test_quantized_images_keep_their_entry(flags: list[str], own: bool, tmp_path: Path) -> None:
    name = "vision_tower.encoder.blocks.0.wqkv"
    packed, scales, biases = mx.quantize(normal(24, 128), group_size=32 if own else 64)
    vision = {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
    entry = {"group_size": 32 if own else 64, "bits": 4, "mode": "affine"}
    section: dict[str, Any] = {"group_size": 64, "bits": 4} | ({name: entry} if own else {})
    source = source_of("kimi_k25", tmp_path / "source", vision, quantization=section)
    convert(source, tmp_path / "out", *flags, "--keep-vision")
    found = written(tmp_path / "out")
    assert {part: same(found[part], vision[part]) for part in vision} == dict.fromkeys(vision, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"][name] == entry
    load_model(tmp_path / "out")


def test_a_checkpoint_of_mlx_with_its_images_is_copied(tmp_path: Path) -> None:
    vision = {f"vision_tower.{name}": array for name, array in VISION.items()}
    source = source_of("kimi_k25", tmp_path / "source", vision)
    convert(source, tmp_path / "first", "-q", "--keep-vision")
    plan = convert(tmp_path / "first", tmp_path / "second", "--keep-vision")
    assert {target.exactness for step in plan.steps for target in step.targets} == {"copied"}
    assert plan.config_changes == ()


def test_fp8_vision_tensors_are_decoded(tmp_path: Path) -> None:
    name = "vision_tower.encoder.blocks.0.wo"
    source = source_of("kimi_k25", tmp_path / "source", {})
    weights = load_file(source / "model.safetensors")
    codes = torch.randn(128, 128, generator=torch.manual_seed(0)).to(torch.float8_e4m3fn)
    weights |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": torch.tensor([[0.5]])}
    save_file(weights, source / "model.safetensors")
    plan = convert(source, tmp_path / "out", "--keep-vision")
    (target,) = [t for step in plan.steps for t in step.targets if t.name == f"{name}.weight"]
    assert target.exactness == "decoded"
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(found.float(), codes.float() / 2)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v41"])
def test_keeping_what_is_not_there_is_an_error(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(sample(family)), "--keep-vision"]) == 2
    assert "--keep-vision: there are no vision tensors" in capsys.readouterr().err
