"""What `mlx_lm.convert -d` and `mlx_lm.fuse --dequantize` leave in codes, and how the folder is mended."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import support
from conversion import convert
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.tuner.utils import linear_to_lora_layers
from support import same

from mla_tools.convert import inspect
from mla_tools.integrations.mlx_lm import enable
from mla_tools.report import survey_json
from mla_tools.samples import write_tokenizer

TOKENS = mx.array([[5, 9, 300, 17, 2, 44]])

FAMILIES = ["deepseek_v3", "kimi_linear", "longcat_flash"]


@pytest.fixture(params=FAMILIES)
def four_bits(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # MLX multiplies unquantized experts on a CPU in float32 alone.
    convert(support.sample(request.param, "f32"), tmp_path / "four", "-q", "--dtype", "float32")
    # mlx_lm.fuse runs no code of a tokenizer, as Kimi's have some.
    for path in (tmp_path / "four").glob("*token*"):
        path.unlink()
    write_tokenizer(tmp_path / "four")
    return tmp_path / "four"


def said(folder: Path) -> list[str]:
    """Return the notes that mla-sanitize inspect prints."""
    survey = inspect(folder)
    notes: list[str] = survey_json(survey.checkpoint, survey.made)["notes"]
    return notes


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_mended(broken: Path, wanted: Any, folder: Path) -> None:
    """Assert that a folder that mlx-lm does not load becomes, converted, the model that was to be saved."""
    with pytest.raises(ValueError, match="parameters not in model"):
        utils.load_model(broken)
    (note,) = (note for note in said(broken) if "names no quantization" in note)
    assert "embed_q" in note
    assert "unembed_out" in note
    assert "mla-sanitize convert" in note

    convert(broken, folder / "mended")
    assert not any("names no quantization" in note for note in said(folder / "mended"))
    with enable():
        straight, _ = utils.load_model(broken)
    for model in (utils.load_model(folder / "mended")[0], straight):
        found, needed = parameters(model), parameters(wanted)
        assert found.keys() == needed.keys()
        assert all(same(found[name], needed[name]) for name in needed)
        assert mx.array_equal(model(TOKENS), wanted(TOKENS))

    convert(broken, folder / "floats", "-d")
    floats, config = utils.load_model(folder / "floats")
    assert "quantization" not in config
    assert not any(name.endswith(".scales") for name in parameters(floats))
    assert mx.allclose(floats(TOKENS), wanted(TOKENS), rtol=1e-3, atol=1e-4)  # the order of sums


def test_what_convert_decodes_is_mended(four_bits: Path, tmp_path: Path) -> None:
    mlx_lm.convert(str(four_bits), str(tmp_path / "decoded"), dequantize=True)
    wanted = utils.dequantize_model(utils.load_model(four_bits)[0])
    assert_mended(tmp_path / "decoded", wanted, tmp_path)


def test_what_fuse_decodes_is_mended(
    four_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    model, _ = utils.load_model(four_bits)
    model.freeze()
    linear_to_lora_layers(model, 1, settings)
    trained = {name: mx.full(a.shape, 0.01) for name, a in tree_flatten(model.trainable_parameters())}
    assert trained
    mx.save_safetensors(str(adapters / "adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (adapters / "adapter_config.json").write_text(json.dumps(config))

    from mlx_lm import fuse

    fused = tmp_path / "fused"
    argv = ["fuse", "--model", four_bits, "--adapter-path", adapters, "--save-path", fused, "--dequantize"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    fuse.main()

    wanted = utils.load_adapters(utils.load_model(four_bits)[0], str(adapters))
    parts = [(n, m.fuse(dequantize=True)) for n, m in wanted.named_modules() if hasattr(m, "fuse")]
    wanted.update_modules(mlx_lm.utils.tree_unflatten(parts))
    assert_mended(fused, utils.dequantize_model(wanted), tmp_path)


def test_a_folder_in_floats_has_no_note(tmp_path: Path) -> None:
    convert(support.sample("deepseek_v3", "f32"), tmp_path / "floats")
    assert not any("quantization" in note for note in said(tmp_path / "floats"))
