"""Choices for single modules: --q-override, --recipe and the recipes for MLA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversion import convert

from mla_tools.cli import main, options_of, parser
from mla_tools.errors import CheckpointError, UsageError
from mla_tools.quantization import RECIPES, QuantSpec, recipe_spec
from mla_tools.samples import write_sample


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overrides") / "source"
    write_sample("glm4_moe_lite", folder)
    return folder


def section(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())["quantization"]


def test_the_last_override_that_is_found_counts(source: Path, tmp_path: Path) -> None:
    flags = ["--q-override", "self_attn=8,32", "--q-override", r"layers\.2\..*o_proj=float"]
    plan = convert(source, tmp_path / "out", "-q", *flags)
    made = {t.name: t.codec.name for step in plan.steps for t in step.targets}
    assert made["model.layers.1.self_attn.o_proj.weight"] == "affine 8-bit g32"
    assert made["model.layers.2.self_attn.o_proj.weight"] == "bf16"
    assert made["model.layers.2.self_attn.embed_q.weight"] == "affine 8-bit g32"
    assert made["model.layers.2.mlp.switch_mlp.up_proj.weight"] == "affine 4-bit g64"
    config = section(tmp_path / "out")
    assert config["model.layers.1.self_attn.o_proj"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert "model.layers.2.self_attn.o_proj" not in config


def test_overrides_alone_quantize_what_they_name(source: Path, tmp_path: Path) -> None:
    plan = convert(source, tmp_path / "out", "--q-override", "switch_mlp=4,32,mxfp4")
    words = {t.codec.name for step in plan.steps for t in step.targets if "switch_mlp" in t.name}
    others = {t.codec.name for step in plan.steps for t in step.targets if "switch_mlp" not in t.name}
    assert words == {"mxfp4"}
    assert others == {"bf16", "f32"}


def test_a_recipe_file_says_the_same(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'quantize: 4,32\nembed_q: float\noverrides:\n  "embed_q|unembed_out": 8\n  lm_head: float\n'
    )
    args = parser().parse_args(["plan", str(source), "--recipe", str(recipe), "--q-override", "gate_proj=6"])
    options = options_of(args)
    assert options.quantize == QuantSpec("affine", 4, 32)
    assert options.embed_q == "float"
    assert options.overrides == (
        ("embed_q|unembed_out", QuantSpec(bits=8)),
        ("lm_head", None),
        ("gate_proj", QuantSpec(bits=6)),
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--q-override", "nothing_like_it=8"], "nothing_like_it: matches no module"),
        (["--q-override", "(=8"], "not a regular expression"),
        (["--q-override", "lm_head"], "give REGEX=BITS"),
        (["--q-override", "lm_head=9"], "9"),
        (["--recipe", "missing.yaml"], "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_mistakes_are_usage_errors(
    source: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), "-q", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a list\n", "bits: 4\n", "overrides: [1]\n", "a: b: c\n"])
def test_recipes_that_are_none(source: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError):
        options_of(parser().parse_args(["plan", str(source), "--recipe", str(recipe)]))


def test_a_group_that_does_not_divide_is_refused_where_it_was_asked_for(source: Path, tmp_path: Path) -> None:
    # embed_q's last axis is qk_nope_head_dim, 64 here.
    with pytest.raises(CheckpointError, match=r"multiple of 128\n  found   64\n  The override 'embed_q'"):
        convert(source, tmp_path / "out", "-q", "--q-override", "embed_q=4,128")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("mla_")])
def test_recipes_for_mla_keep_what_all_tokens_go_through(recipe: str, source: Path, tmp_path: Path) -> None:
    plain = recipe.removeprefix("mla_")
    for path in ("model.layers.1.mlp.switch_mlp.down_proj", "lm_head", "model.layers.2.self_attn.o_proj"):
        assert recipe_spec(recipe, path, 4) == recipe_spec(plain, path, 4)
    for part in ("embed_q", "unembed_out", "q_a_proj", "kv_a_proj_with_mqa", "indexer.wk"):
        assert recipe_spec(recipe, f"model.layers.1.self_attn.{part}", 4) == QuantSpec("affine", 8, 64)
    convert(source, tmp_path / "out", "-q", "--quant-predicate", recipe)
    assert section(tmp_path / "out")["model.layers.0.self_attn.embed_q"]["bits"] == 8
