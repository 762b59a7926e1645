"""Kimi K2.5 is Kimi K2 beside a vision encoder, Kimi-VL a DeepSeek-V3: they give the logits of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conversion import convert
from reference import Storage, checkpoint, mlx_logits, reference_truth, relative_error
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5

# family -> its language model, its class, and its projector.
FAMILIES = {
    "kimi_k25": ("kimi_k2", "KimiK25ForConditionalGeneration", "mm_projector"),
    "kimi_vl": ("deepseek_v3", "KimiVLForConditionalGeneration", "multi_modal_projector"),
}

# One of each kind. Source: the header listing of Kimi K2.5.
VISION = {
    "vision_tower.patch_embed.pos_emb.weight": (4, 4, 64),
    "vision_tower.patch_embed.proj.weight": (64, 3, 14, 14),
    "vision_tower.patch_embed.proj.bias": (64,),
    **{
        f"vision_tower.encoder.blocks.{layer}.{module}.{part}": shape
        for layer in range(2)
        for module in ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1")
        for part, shape in (("weight", (64, 64)), ("bias", (64,)))
    },
    "vision_tower.encoder.final_layernorm.weight": (64,),
    "vision_tower.encoder.final_layernorm.bias": (64,),
}


def vision_tensors(family: str) -> dict[str, tuple[int, ...]]:
    """Return the vision tensors, with their shapes."""
    projector = FAMILIES[family][2]
    return VISION | {
        f"{projector}.{module}.{part}": shape
        for module in ("pre_norm", "proj.0", "proj.2")
        for part, shape in (("weight", (64, 64)), ("bias", (64,)))
    }


def wrap(family: str, source: Path, folder: Path) -> Path:
    """Write a checkpoint as the language model of a family with vision tensors."""
    folder.mkdir()
    numbers = json.loads((source / "config.json").read_text())
    config = {
        "architectures": [FAMILIES[family][1]],
        "model_type": family,
        "torch_dtype": numbers.pop("torch_dtype"),
        "text_config": numbers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    files = sorted(source.glob("model*.safetensors"))
    assert files
    for file in files:
        held = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
        save_file(held, folder / file.name, metadata={"format": "pt"})
    ones = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in vision_tensors(family).items()}
    save_file(ones, folder / "model-vision.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("storage", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_language_model(
    family: str, storage: Storage, dtype: str, tmp_path: Path
) -> None:
    inner = FAMILIES[family][0]
    source = wrap(family, checkpoint(inner, storage), tmp_path / "source")
    plan = convert(source, tmp_path / "out", "--dtype", dtype)
    left_out = [drop.source.name for drop in plan.drops if drop.reason.startswith("vision ")]
    assert sorted(left_out) == sorted(vision_tensors(family))
    wanted = reference_truth(inner, storage, None if dtype == "float32" else dtype)
    prefill, decode = relative_error(mlx_logits(tmp_path / "out", float32=True), wanted)
    assert prefill <= TOLERANCE
    assert decode <= TOLERANCE


def test_rotary_buffers_inside_are_left_out(tmp_path: Path) -> None:
    source = wrap("kimi_k25", checkpoint("kimi_k2", "bf16"), tmp_path / "source")
    plan = convert(source, tmp_path / "out")
    assert sum(drop.source.name.endswith(".rotary_emb.inv_freq") for drop in plan.drops) == 3
