"""Checkpoints whose stored tensors contradict one another: refused by name, before a byte is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from support import loaded, sample

from mla_tools.errors import CheckpointError, DataError
from mla_tools.execute import execute
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.parsing import parse_object
from mla_tools.options import Options
from mla_tools.plan import make_plan
from mla_tools.quantization import QuantSpec

EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def rewritten(fmt: str, folder: Path, changes: dict[str, mx.array | None]) -> Path:
    """Return a copy of a sample in one file, with tensors added, replaced, or (None) left out.

    Only for formats whose dtypes mx.load and mx.save_safetensors keep.
    """
    source = sample("deepseek_v3", fmt)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    arrays = {name: array for name, array in {**loaded(source), **changes}.items() if array is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def problems(folder: Path, options: Options | None = None) -> dict[str, tuple[str, str]]:
    with pytest.raises(CheckpointError) as refused:
        make_plan(open_checkpoint(folder), options or Options())
    return {problem.subject: (problem.what, problem.found) for problem in refused.value.problems}


@pytest.mark.parametrize("fmt", ["ct-int4", "awq", "gptq"])
def test_a_weight_in_two_formats_is_refused(fmt: str, tmp_path: Path) -> None:
    weight = {f"{EXPERT}.weight": mx.ones((128, 256), mx.bfloat16)}
    found = problems(rewritten(fmt, tmp_path / "source", weight))
    what, why = found[EXPERT]
    assert what == "its stored tensors do not fit together"
    assert "weight is stored in two formats" in why


@pytest.mark.parametrize("options", [Options(), Options(quantize=QuantSpec())], ids=["plain", "-q"])
@pytest.mark.parametrize("dtype", [mx.int32, mx.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "name", ["model.norm", "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.kv_b_proj", EXPERT]
)
def test_integers_where_floats_belong_are_refused(
    name: str, dtype: mx.Dtype, options: Options, tmp_path: Path
) -> None:
    array = loaded(sample("deepseek_v3"))[f"{name}.weight"].astype(dtype)
    found = problems(rewritten("bf16", tmp_path / "source", {f"{name}.weight": array}), options)
    assert {subject: what for subject, (what, _) in found.items()} == {name: "dtype mismatch"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("fmt", "part"), [("ct-int4", "weight_scale"), ("awq", "scales"), ("gptq", "scales")]
)
@pytest.mark.parametrize("options", [Options(), Options(dequantize=True)], ids=["plain", "-d"])
def test_scales_of_integer_codes_that_are_no_numbers_end_the_run(
    fmt: str, part: str, value: float, options: Options, tmp_path: Path
) -> None:
    scales = loaded(sample("deepseek_v3", fmt))[f"{EXPERT}.{part}"] + 0
    scales[0, 0] = value
    source = rewritten(fmt, tmp_path / "source", {f"{EXPERT}.{part}": scales})
    with pytest.raises(DataError, match=f"{EXPERT}: .*{part} holds"):
        execute(make_plan(open_checkpoint(source), options), tmp_path / "out")


DUPLICATES = [
    '{"a": 1, "a" :2}',
    '{"a" :1, "a": 2}',
    '{"a": 1, "a"\t: 2}',
    '{"a": 1, "a"\n: 2}',
    '{"a": 1, "\\u0061": 2}',
    '{"a": 1, "\\u0061" :2}',
    '{"x": {"a": 1, "a" :2}}',
    '{"x" :{"b": 1}, "x": {"b": 1}}',
    '{"x": {"y": {"a": 1, "a" :2}}}',
    '{"x": [{"a": 1, "a" :2}]}',
]


@pytest.mark.parametrize("text", DUPLICATES)
def test_a_duplicate_key_is_found_however_it_is_written(text: str) -> None:
    assert len(parse_object(text.encode())[1]) == 1
    # The same without the duplicate, in the same style.
    once = json.dumps(json.loads(text), separators=(" ,", " : "))
    assert parse_object(once.encode()) == (json.loads(text), [])
