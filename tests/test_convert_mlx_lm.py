"""Dense checkpoints converted by us and by mlx_lm.convert, compared bit for bit.

Where mlx-lm has no class for the model_type on the hub, it is given our conversion without any flag: that
shows what the flags do. What is in such a conversion, test_layouts.py and test_samples.py show.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import pytest
from conversion import convert
from mlx_lm.convert import convert as mlx_lm_convert
from pairs import pairs, product
from support import loaded, mlx_lm_reads

from mla_tools.architectures import MODEL_TYPES
from mla_tools.samples import write_sample

# id -> (our flags, mlx_lm.convert's arguments)
FLAGS: dict[str, tuple[list[str], dict[str, object]]] = {
    "plain": ([], {}),
    "float16": (["--dtype", "float16"], {"dtype": "float16"}),
    "bfloat16": (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    "float32": (["--dtype", "float32"], {"dtype": "float32"}),
    "affine": (["-q"], {"quantize": True}),
    "affine_8_32": (
        ["-q", "--q-bits", "8", "--q-group-size", "32"],
        {"quantize": True, "q_bits": 8, "q_group_size": 32},
    ),
    # 128 divides some last axes and not others: those stay unquantized.
    "affine_4_128": (["-q", "--q-group-size", "128"], {"quantize": True, "q_group_size": 128}),
    "affine_float16": (["-q", "--dtype", "float16"], {"quantize": True, "dtype": "float16"}),
    "mxfp4": (["-q", "--q-mode", "mxfp4"], {"quantize": True, "q_mode": "mxfp4"}),
    "mxfp8": (["-q", "--q-mode", "mxfp8"], {"quantize": True, "q_mode": "mxfp8"}),
    "nvfp4": (["-q", "--q-mode", "nvfp4"], {"quantize": True, "q_mode": "nvfp4"}),
    **{
        recipe: (["-q", "--quant-predicate", recipe], {"quantize": True, "quant_predicate": recipe})
        for recipe in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    },
}

# A second name of a family needs no second comparison.
NAMES = [name for name, family in MODEL_TYPES.items() if family.name == name]

CASES = product(NAMES, FLAGS, pairs(NAMES, FLAGS))
DTYPES = [
    ("deepseek_v3-f32", "plain"),
    ("deepseek_v3-f32", "affine"),
    ("kimi_linear-f32", "bfloat16"),
    ("longcat_flash-f32", "mxfp4"),
]

# mlx_lm.convert's mixed recipes read a layer number out of "model.ngram_embeddings.embedders.0" and
# end in a ValueError, so there is nothing to compare with.
CRASHES = {("longcat_flash_ngram", recipe) for recipe in FLAGS if recipe.startswith("mixed")}


@cache
def sample(family: str) -> tuple[Path, Path]:
    """Return a dense sample of a family, "-f32" for float32, and what mlx_lm.convert is given of it."""
    name, _, fmt = family.partition("-")
    folder = Path(mkdtemp()) / family
    write_sample(name, folder, fmt or "bf16")
    if name == "deepseek_v3":
        remove_mtp_layer(folder)
    if name == "minicpm3":
        write_output_head(folder)
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("model_type", MODEL_TYPES[name].model_type)
    (folder / "config.json").write_text(json.dumps(config))
    if name == "kimi_vl":
        return folder, as_kimi_k25(folder, folder.with_name("theirs"))
    if mlx_lm_reads(name):
        return folder, folder
    # Where the class is ours, it comes with the output.
    convert(folder, folder.with_name("theirs"))
    return folder, folder.with_name("theirs")


def remove_mtp_layer(folder: Path) -> None:
    """Remove layer 4 of 4: mlx-lm's class drops the MTP layer of V3 only where its number is 61."""
    files = [*folder.glob("model*.safetensors")]
    assert files
    for file in files:
        kept = {k: v for k, v in mx.load(str(file)).items() if not k.startswith("model.layers.4.")}
        mx.save_safetensors(str(file), kept)
    (folder / "model.safetensors.index.json").unlink()


def write_output_head(folder: Path) -> None:
    """Untie the embedding: where it is tied, mlx-lm's class forgets to scale the logits, and we untie it."""
    (file,) = [
        file for file in folder.glob("model*.safetensors") if "model.norm.weight" in mx.load(str(file))
    ]
    weights = loaded(folder)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"][::-1]}
    mx.save_safetensors(str(file), {**mx.load(str(file)), **head})
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def as_kimi_k25(source: Path, folder: Path) -> Path:
    """Return a copy that mlx-lm reads: its kimi_vl has the same modules, but does not split kv_b_proj."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k25"}))
    return folder


def resolved(section: dict[str, object] | None) -> dict[str, object] | None:
    """Return a quantization config with the defaults written out that mlx-lm leaves to its reader.

    mlx-lm writes no mode where it is affine, and a null group size where a recipe is used and none is
    given; both are read back as these values. We write them.
    """
    if section is None:
        return None

    def fill(entry: dict[str, object]) -> dict[str, object]:
        return {**entry, "mode": entry.get("mode", "affine"), "group_size": entry.get("group_size") or 64}

    return {
        **fill({k: v for k, v in section.items() if not isinstance(v, dict)}),
        **{k: fill(v) for k, v in section.items() if isinstance(v, dict)},
    }


@pytest.mark.parametrize(
    ("family", "flags"),
    [case for case in CASES if case.values not in CRASHES]
    + [pytest.param(*c, id="-".join(c)) for c in DTYPES],
)
def test_equals_mlx_lm_convert(family: str, flags: str, tmp_path: Path) -> None:
    ours, theirs = FLAGS[flags]
    source, given = sample(family)
    convert(source, tmp_path / "ours", *ours)
    mlx_lm_convert(str(given), str(tmp_path / "theirs"), trust_remote_code=True, **theirs)

    got, wanted = loaded(tmp_path / "ours"), loaded(tmp_path / "theirs")
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        bits = mx.view(got[name], mx.uint8), mx.view(array, mx.uint8)
        assert mx.array_equal(*bits).item(), name
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert resolved(configs[0].get("quantization")) == resolved(configs[1].get("quantization"))
    assert configs[0].get("quantization") == configs[0].get("quantization_config")


@pytest.mark.parametrize(("family", "flags"), sorted(CRASHES))
def test_recipes_work_where_mlx_lm_ends_in_an_error(family: str, flags: str, tmp_path: Path) -> None:
    source, given = sample(family)
    with pytest.raises(ValueError, match="invalid literal for int"):
        mlx_lm_convert(str(given), str(tmp_path / "theirs"), **FLAGS[flags][1])
    convert(source, tmp_path / "ours", *FLAGS[flags][0])
