"""What CONTRIBUTING.md says of a new family and a new format, done with the code that stands there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from conversion import convert
from mlx_lm.models import deepseek_v3
from mlx_lm.utils import load_model
from support import loaded, mlx_lm_reads, same

from mla_tools import codecs
from mla_tools import convert as library
from mla_tools.architectures import MODEL_TYPES, blocks
from mla_tools.codecs import FORMATS
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.names import template
from mla_tools.ops import Stack
from mla_tools.options import Options
from mla_tools.plan import make_plan
from mla_tools.rules import Param, Rule
from mla_tools.samples import sample_config, write_sample
from mla_tools.spec import DType

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = [
    dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", GUIDE, re.DOTALL | re.MULTILINE)
]

Import = Callable[[str, str], ModuleType]


def block(word: str) -> str:
    """Return the one code block that has a word."""
    (found,) = (text for text in BLOCKS if word in text)
    return found


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Return what imports a text as a module, as long as the test runs."""

    def load(name: str, text: str) -> ModuleType:
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        # A dataclass looks up the types of its fields here.
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def register(imported: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what does steps 2, 4 and 5 of a new family: the file, the line and the sample's config."""

    def add(text: str) -> None:
        monkeypatch.setitem(MODEL_TYPES, "example9", imported("example9", text).FAMILY)
        like = sample_config("deepseek_v3")
        config = {**like, "model_type": "example9", "architectures": ["Example9ForCausalLM"]}
        folder = tmp_path / "configs"
        folder.mkdir()
        (folder / "example9.json").write_text(json.dumps(config))
        (folder / "deepseek_v3.json").write_text(json.dumps(like))
        monkeypatch.setattr("mla_tools.samples.model._CONFIGS", folder)

    return add


@pytest.fixture
def fp8_row(imported: Import, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Do steps 2 and 3 of a new format."""
    module = imported("fp8_row", block("def claim("))
    monkeypatch.setattr(codecs, "BUNDLING", (*codecs.BUNDLING, module.claim))
    for name, sample in module.SAMPLES.items():
        monkeypatch.setitem(FORMATS, name, sample)
    return module


def names(folder: Path) -> set[str]:
    return {name.split(".self_attn.")[1] for name in loaded(folder) if ".3.self_attn." in name}


def runs(folder: Path) -> None:
    """See that mlx-lm loads a folder and computes with it."""
    model, _ = load_model(folder, strict=True)
    model.set_dtype(mx.float32)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all().item()


def test_the_family_of_the_guide_is_as_short_as_it_looks() -> None:
    assert len(block("FAMILY = ").splitlines()) <= 20


@pytest.mark.parametrize("fmt", ["bf16", "fp8-row"])
@pytest.mark.parametrize("flags", [(), ("-q",)], ids=["plain", "affine"])
def test_the_family_of_the_guide_converts_and_runs(
    fmt: str,
    flags: tuple[str, ...],
    register: Callable[[str], None],
    fp8_row: ModuleType,
    tmp_path: Path,
) -> None:
    register(block("FAMILY = "))
    assert not mlx_lm_reads("example9")
    for family in ("example9", "deepseek_v3"):
        write_sample(family, tmp_path / family, fmt)
        plan = convert(tmp_path / family, tmp_path / f"{family}-out", *flags)
        assert plan.family is MODEL_TYPES[family]
    assert "out_proj.weight" in names(tmp_path / "example9")
    assert "o_proj.weight" not in names(tmp_path / "example9")
    ours, wanted = loaded(tmp_path / "example9-out"), loaded(tmp_path / "deepseek_v3-out")
    # A value of a sample depends on the model's name, so both stand for the same model.
    assert ours.keys() == wanted.keys()
    assert all(same(ours[name], wanted[name]) for name in wanted)
    runs(tmp_path / "example9-out")
    assert library.verify(tmp_path / "example9-out").files


def test_the_family_of_the_guide_goes_through_the_library(
    register: Callable[[str], None], tmp_path: Path
) -> None:
    register(block("FAMILY = "))
    write_sample("example9", tmp_path / "source")
    assert not library.inspect(tmp_path / "source").problems
    assert library.plan(tmp_path / "source").model.family.name == "example9"
    library.convert(tmp_path / "source", tmp_path / "out")
    runs(tmp_path / "out")


class OutProj(deepseek_v3.DeepseekV3Attention):  # type: ignore[misc]
    """Attention whose output projection is a parameter of another name."""

    @property
    def o_proj(self) -> Any:
        return self["out_proj"]


class Model(deepseek_v3.Model):  # type: ignore[misc]
    """DeepSeek V3 with out_proj."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        for layer in self.layers:
            attention = layer.self_attn
            attention["out_proj"] = attention.pop("o_proj")
            attention.__class__ = OutProj


def test_a_class_of_other_names_is_the_same_word_on_the_other_side(
    register: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert '`model={"o_proj": "out_proj"}`' in GUIDE
    in_mlx_lm = ModuleType("mlx_lm.models.example9")
    vars(in_mlx_lm).update(Model=Model, ModelArgs=deepseek_v3.ModelArgs)
    monkeypatch.setitem(sys.modules, in_mlx_lm.__name__, in_mlx_lm)
    register(
        block("FAMILY = ").replace("hub=", "model=").replace('"deepseek_v3", build', '"example9", build')
    )
    assert mlx_lm_reads("example9")
    write_sample("example9", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "-q")
    assert "o_proj.weight" in names(tmp_path / "source")
    assert {"out_proj.weight", "out_proj.scales"} <= names(tmp_path / "out")
    assert not any(name.startswith("o_proj") for name in names(tmp_path / "out"))
    runs(tmp_path / "out")
    assert library.verify(tmp_path / "out").files


def test_the_format_of_the_guide_is_decoded_as_ml_dtypes_decodes_it(
    fp8_row: ModuleType, tmp_path: Path
) -> None:
    write_sample("deepseek_v3", tmp_path / "source", "fp8-row")
    library.convert(tmp_path / "source", tmp_path / "out", Options(dtype=DType.F32), max_memory="1GB")
    stored, found = loaded(tmp_path / "source"), loaded(tmp_path / "out")
    name = "model.layers.3.self_attn.o_proj"
    assert {f"{name}.weight", f"{name}.row_scale"} <= stored.keys()
    codes = np.array(stored[f"{name}.weight"]).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(np.array(found[f"{name}.weight"]), codes * np.array(stored[f"{name}.row_scale"]))
    runs(tmp_path / "out")
    assert library.verify(tmp_path / "out").files


def test_the_format_of_the_guide_is_a_target(fp8_row: ModuleType, tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "source")
    write_sample("deepseek_v3", tmp_path / "wanted", "fp8-row")
    convert(tmp_path / "source", tmp_path / "mlx")
    there = replace(open_checkpoint(tmp_path / "mlx"), config=open_checkpoint(tmp_path / "source").config)
    options = Options(layout="hub", format=fp8_row.Fp8Row(), dtype=DType.BF16)
    execute(make_plan(there, options), tmp_path / "hub")
    written, wanted = loaded(tmp_path / "hub"), loaded(tmp_path / "wanted")
    experts = [name for name in written if ".experts." in name]
    assert len(experts) == 3 * 8 * 3 * 2
    assert all(same(written[name], wanted[name]) for name in experts)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["quantization_config"] == fp8_row.SECTION
    again = convert(tmp_path / "hub", tmp_path / "again")
    assert "fp8 with row_scale" in {source.codec.name for step in again.steps for source in step.sources}


def test_a_scale_of_the_guides_format_that_does_not_fit_is_a_problem(
    fp8_row: ModuleType, tmp_path: Path
) -> None:
    write_sample("deepseek_v3", tmp_path / "source", "fp8-row", shards=1)
    (file,) = (tmp_path / "source").glob("*.safetensors")
    stored = mx.load(str(file))
    stored["model.layers.3.self_attn.o_proj.row_scale"] = mx.ones((7, 1))
    mx.save_safetensors(str(file), stored)
    problems = library.inspect(tmp_path / "source").problems
    assert {problem.subject for problem in problems} == {"model.layers.3.self_attn.o_proj"}
    assert problems[0].found == "row_scale is F32 [7, 1], but weight [256, 256] needs F32 [256, 1]"


def test_the_rule_of_the_guide_is_that_of_the_blocks() -> None:
    inner, hidden, count, sparse = 6, 4, 3, range(1, 3)
    known = {"Rule": Rule, "Stack": Stack, "Param": Param}
    numbers = {"inner": inner, "hidden": hidden, "count": count, "sparse": sparse}
    rule = eval(block("Rule.of("), {**known, **numbers})
    mlp = "model.layers.{l}.mlp"
    wanted = blocks.experts(f"{mlp}.experts", f"{mlp}.switch_mlp", count, hidden, inner, {"l": sparse})[1]
    assert (rule.target, rule.where, rule.param) == (wanted.target, wanted.where, wanted.param)
    (form,), (other,) = rule.forms, wanted.forms
    assert (form.source, form.shapes, form.op, form.where) == (
        other.source,
        other.shapes,
        other.op,
        other.where,
    )
    assert template(form.source[0]).indices == ("l", "e")


def test_every_file_and_name_of_the_guide_is_there() -> None:
    root = Path(__file__).parents[1]
    paths = set(re.findall(r"`((?:src|tests|docs)/[\w/.]+)`", GUIDE))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if "NAME" not in path and not (root / path).exists()] == []
    oracle = (root / "tests" / "reference.py").read_text()
    lists = ("FAMILIES", "_CLASSES", "KEPT", "_STORED_F32", "_SALTS", "_plain_name", "_expert_names")
    assert all(f"`{name}`" in GUIDE and re.search(rf"\b{name}\b", oracle) for name in lists)
